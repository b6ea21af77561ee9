//! Specifications of the Container Device Interface: which devices they name, and what a container that is given one
//! of them gets.
//!
//! Source: the CDI specification 1.1, `cncf-tags/container-device-interface`. That project's crate brings a JSON Schema
//! validator, a second cryptography library and an unmaintained YAML reader: a fifth of the agent's size.

mod edits;
mod yaml;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where specifications are looked for; of two that name one device the later directory's holds.
pub const DIRS: [&str; 2] = ["etc/cdi", "var/run/cdi"];
const SPEC_BYTES_MAX: u64 = 4 << 20;
const SPECS_MAX: usize = 64;
const NAME_BYTES_MAX: usize = 253;

/// A file of specifications. Unknown fields are refused: half of what a device needs is worse than none.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    cdi_version: String,
    /// Vendor and class, such as `nvidia.com/gpu`.
    pub kind: String,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
    pub devices: Vec<Device>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    pub name: String,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
    #[serde(default)]
    container_edits: Edits,
}

impl Device {
    /// Paths of the device nodes that are the device's own.
    pub fn nodes(&self) -> impl Iterator<Item = &str> {
        self.container_edits.device_nodes.iter().map(|node| node.path.as_str())
    }
}

/// What is added to a container.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Edits {
    env: Vec<String>,
    device_nodes: Vec<Node>,
    net_devices: Vec<NetDevice>,
    mounts: Vec<Mount>,
    hooks: Vec<Hook>,
    intel_rdt: Option<serde_json::Map<String, serde_json::Value>>,
    additional_gids: Vec<u32>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Node {
    path: String,
    host_path: Option<PathBuf>,
    r#type: Option<String>,
    major: Option<i64>,
    minor: Option<i64>,
    file_mode: Option<u32>,
    permissions: Option<String>,
    uid: Option<u32>,
    gid: Option<u32>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NetDevice {
    host_interface_name: String,
    name: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Mount {
    host_path: PathBuf,
    container_path: PathBuf,
    r#type: Option<String>,
    #[serde(default)]
    options: Vec<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Hook {
    hook_name: HookName,
    path: PathBuf,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    timeout: Option<i64>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "camelCase")]
enum HookName {
    Prestart,
    CreateRuntime,
    CreateContainer,
    StartContainer,
    Poststart,
    Poststop,
}

impl HookName {
    /// As the OCI configuration has it.
    fn key(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::StartContainer => "startContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }
}

/// All specifications of this machine.
#[derive(Debug, Default)]
pub struct Specs {
    /// The directory by its place in `DIRS`, and the specification.
    read: Vec<(usize, Spec)>,
    /// Of each file that could not be used its path, and why.
    refused: Vec<String>,
}

impl Specs {
    /// Those below `root`.
    pub fn read(root: &Path) -> Self {
        let mut specs = Self::default();
        for (priority, dir) in DIRS.iter().enumerate() {
            let Ok(entries) = fs::read_dir(root.join(dir)) else { continue };
            let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
            paths.sort();
            for path in paths.iter().take(SPECS_MAX) {
                let yaml = match path.extension().and_then(|extension| extension.to_str()) {
                    Some("json") => false,
                    Some("yaml") => true,
                    _ => continue,
                };
                match read_file(path, yaml) {
                    Ok(spec) => specs.read.push((priority, spec)),
                    Err(why) => specs.refused.push(format!("{}: {why}", path.display())),
                }
            }
        }
        specs
    }

    /// Every device with its specification, in the order of the files.
    pub fn devices(&self) -> impl Iterator<Item = (&Spec, &Device)> {
        self.read.iter().flat_map(|(_, spec)| spec.devices.iter().map(move |device| (spec, device)))
    }

    /// The device of that qualified name, `vendor/class=name`, from the directory that holds.
    fn find(&self, name: &str) -> Result<(&Spec, &Device), String> {
        let (kind, own) =
            name.split_once('=').ok_or_else(|| format!("`{name}` is not of the form vendor/class=device"))?;
        let of_kind = self.read.iter().filter(|(_, spec)| spec.kind == kind);
        let named = of_kind.filter_map(|(priority, spec)| {
            Some((*priority, spec, spec.devices.iter().find(|device| device.name == own)?))
        });
        let found: Vec<_> = named.collect();
        let highest = found.iter().map(|(priority, ..)| *priority).max();
        let mut holding = found.iter().filter(|(priority, ..)| Some(*priority) == highest);
        match (holding.next(), holding.next()) {
            (Some((_, spec, device)), None) => Ok((spec, device)),
            (Some((priority, ..)), Some(_)) => {
                Err(format!("two specifications in /{} name `{name}`: remove one", DIRS[*priority]))
            }
            (None, _) => {
                let refused = if self.refused.is_empty() {
                    String::new()
                } else {
                    format!("; not used were {}", self.refused.join("; "))
                };
                Err(format!("no specification in /{} names `{name}`{refused}", DIRS.join(" or /")))
            }
        }
    }
}

fn read_file(path: &Path, yaml: bool) -> Result<Spec, String> {
    let mut text = String::new();
    let file = File::open(path).map_err(|e| e.to_string())?;
    file.take(SPEC_BYTES_MAX + 1).read_to_string(&mut text).map_err(|e| e.to_string())?;
    if text.len() as u64 > SPEC_BYTES_MAX {
        return Err(format!("longer than {SPEC_BYTES_MAX} bytes"));
    }
    parse(&text, yaml)
}

fn parse(text: &str, yaml: bool) -> Result<Spec, String> {
    let spec: Spec = if yaml {
        serde_json::from_value(yaml::read(text)?).map_err(|e| e.to_string())?
    } else {
        serde_json::from_str(text).map_err(|e| e.to_string())?
    };
    let version = spec.cdi_version.trim_start_matches('v');
    if !["0.", "1.0.", "1.1."].iter().any(|known| version.starts_with(known)) {
        return Err(format!("CDI {version} is newer than the 1.1 known here"));
    }
    let named = |name: &str| !name.is_empty() && name.len() <= NAME_BYTES_MAX && !name.contains('=');
    if !named(&spec.kind) || spec.kind.split('/').filter(|part| !part.is_empty()).count() != 2 {
        return Err(format!("the kind `{}` is not of the form vendor/class", spec.kind));
    }
    if let Some(device) = spec.devices.iter().find(|device| !named(&device.name)) {
        return Err(format!("`{}` is no name of a device", device.name));
    }
    Ok(spec)
}

#[cfg(test)]
mod tests;
