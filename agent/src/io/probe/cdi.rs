//! Which devices the installed CDI specifications name; only looks names up, the injecting is the shim's.
//!
//! Source: Container Device Interface specification, `cncf-tags/container-device-interface`.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde::Deserialize;

use super::gpus::Found;

const SPEC_BYTES_MAX: u64 = 4 << 20;
const SPECS_MAX: usize = 64;
const NAME_BYTES_MAX: usize = 253;

/// A device that a specification names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CdiDevice {
    /// Vendor and class, such as `nvidia.com/gpu`.
    pub kind: String,
    pub name: String,
    /// Paths of the device nodes that are the device's own.
    pub nodes: Vec<String>,
}

/// All devices of `/etc/cdi` and `/var/run/cdi`; what cannot be read names nothing.
pub fn devices(root: &Path) -> Vec<CdiDevice> {
    let mut all = Vec::new();
    for dir in ["etc/cdi", "var/run/cdi"] {
        let Ok(entries) = fs::read_dir(root.join(dir)) else { continue };
        let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort();
        for path in paths.iter().take(SPECS_MAX) {
            let parse = match path.extension().and_then(|extension| extension.to_str()) {
                Some("json") => from_json,
                Some("yaml") => from_yaml,
                _ => continue,
            };
            let mut text = String::new();
            let file = File::open(path).map(|file| file.take(SPEC_BYTES_MAX));
            if file.and_then(|mut file| file.read_to_string(&mut text)).is_ok() {
                all.extend(parse(&text));
            }
        }
    }
    all
}

/// The name for a device that was found: one that is its uuid, else one whose device nodes are exactly its own.
/// Numbers alone are not trusted: they shift when a device is taken out, and a pod must see no other's.
pub fn name_of(found: &Found, devices: &[CdiDevice]) -> Option<String> {
    let own: Vec<&str> = found.nodes.iter().filter_map(|node| node.to_str()).collect();
    let only_own = |device: &CdiDevice| {
        let mut numbered = device.nodes.iter().filter(|node| is_of_one_device(node)).peekable();
        numbered.peek().is_some() && numbered.all(|node| own.contains(&node.as_str()))
    };
    let named = devices.iter().find(|device| device.name == found.gpu.uuid);
    let device = named.or_else(|| devices.iter().find(|device| only_own(device)))?;
    Some(format!("{}={}", device.kind, device.name))
}

/// `/dev/nvidia0`, `/dev/dri/card0`, `/dev/dri/renderD128`; not `/dev/nvidiactl` or `/dev/kfd`, which all share.
fn is_of_one_device(node: &str) -> bool {
    ["/dev/nvidia", "/dev/dri/card", "/dev/dri/renderD"].iter().any(|prefix| {
        let number = node.strip_prefix(prefix);
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
    })
}

fn from_json(text: &str) -> Vec<CdiDevice> {
    #[derive(Deserialize)]
    struct Spec {
        kind: String,
        devices: Vec<Device>,
    }
    #[derive(Deserialize)]
    struct Device {
        name: String,
        #[serde(default, rename = "containerEdits")]
        edits: Edits,
    }
    #[derive(Default, Deserialize)]
    struct Edits {
        #[serde(default, rename = "deviceNodes")]
        nodes: Vec<Node>,
    }
    #[derive(Deserialize)]
    struct Node {
        path: String,
    }
    let Ok(spec) = serde_json::from_str::<Spec>(text) else { return Vec::new() };
    let devices = spec.devices.into_iter().map(|device| CdiDevice {
        kind: spec.kind.clone(),
        name: device.name,
        nodes: device.edits.nodes.into_iter().map(|node| node.path).collect(),
    });
    devices.filter(|device| device.name.len() <= NAME_BYTES_MAX).collect()
}

/// Reads the block style that generators write: a list `devices` at the top whose items have a `name`, and device
/// nodes with a `path`. A specification written otherwise names nothing, and its devices are given by their nodes.
fn from_yaml(text: &str) -> Vec<CdiDevice> {
    let mut kind = String::new();
    let mut devices: Vec<CdiDevice> = Vec::new();
    let mut within = false;
    // The columns of the list's dashes and of an item's keys.
    let mut item: Option<(usize, usize)> = None;
    for line in text.lines() {
        let content = line.trim_start();
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        let indent = line.len() - content.len();
        if indent == 0 && !content.starts_with("- ") {
            within = content.starts_with("devices:");
            item = None;
            if let Some(value) = value_of(content, "kind") {
                kind = value;
            }
            continue;
        }
        if !within {
            continue;
        }
        let stripped = content.trim_start_matches("- ").trim_start();
        let column = indent + content.len() - stripped.len();
        if content.starts_with("- ") && item.is_none_or(|(dash, _)| dash == indent) {
            item = Some((indent, column));
            devices.push(CdiDevice { kind: String::new(), name: String::new(), nodes: Vec::new() });
        }
        let (Some(device), Some((_, keys))) = (devices.last_mut(), item) else { continue };
        if column == keys {
            if let Some(name) = value_of(stripped, "name") {
                device.name = name;
            }
        } else if let Some(path) = value_of(stripped, "path") {
            device.nodes.push(path);
        }
    }
    devices.retain(|device| !device.name.is_empty() && device.name.len() <= NAME_BYTES_MAX);
    for device in &mut devices {
        device.kind.clone_from(&kind);
    }
    if kind.is_empty() { Vec::new() } else { devices }
}

fn value_of(line: &str, key: &str) -> Option<String> {
    let value = line.strip_prefix(key)?.strip_prefix(':')?.trim();
    Some(value.trim_matches(['"', '\'']).to_owned()).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const YAML: &str = r#"---
cdiVersion: 0.5.0
containerEdits:
  deviceNodes:
  - path: /dev/nvidiactl
  hooks:
  - name: not-a-device
devices:
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
    - path: /dev/dri/card1
    hooks:
    - hookName: createContainer
      name: deeper
  name: "0"
- name: GPU-b
  containerEdits:
    deviceNodes:
    - path: /dev/nvidia1
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
    - path: /dev/nvidia1
  name: all
kind: nvidia.com/gpu
"#;
    const JSON: &str = r#"{"cdiVersion":"0.5.0","kind":"amd.com/gpu","devices":[{"name":"0","containerEdits":
        {"deviceNodes":[{"path":"/dev/kfd"},{"path":"/dev/dri/renderD128"}]}},{"name":"all"}]}"#;

    fn device(kind: &str, name: &str, nodes: &[&str]) -> CdiDevice {
        let nodes = nodes.iter().map(|node| (*node).to_owned()).collect();
        CdiDevice { kind: kind.to_owned(), name: name.to_owned(), nodes }
    }

    #[test]
    fn specifications() {
        let nvidia = [
            device("nvidia.com/gpu", "0", &["/dev/nvidia0", "/dev/dri/card1"]),
            device("nvidia.com/gpu", "GPU-b", &["/dev/nvidia1"]),
            device("nvidia.com/gpu", "all", &["/dev/nvidia0", "/dev/nvidia1"]),
        ];
        assert_eq!(from_yaml(YAML), nvidia);
        let nested = |line: &str| {
            if line.starts_with([' ', '-']) { format!("  {line}\n") } else { format!("{line}\n") }
        };
        let indented: String = YAML.lines().skip(1).map(nested).collect();
        assert_eq!(from_yaml(&indented), nvidia, "{indented}");
        let amd = [
            device("amd.com/gpu", "0", &["/dev/kfd", "/dev/dri/renderD128"]),
            device("amd.com/gpu", "all", &[]),
        ];
        assert_eq!(from_json(JSON), amd);
        for nothing in
            ["", "devices:", "devices:\n- name: x\n", "kind: a/b\ndevices: [{name: x}]\n", "\t- :\n"]
        {
            assert_eq!(from_yaml(nothing), [], "{nothing}");
            assert_eq!(from_json(nothing), [], "{nothing}");
        }
    }
}
