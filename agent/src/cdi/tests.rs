use std::fs;

use serde_json::{Value, json};

use super::*;

/// As nvidia-ctk writes it.
const NVIDIA: &str = r#"---
cdiVersion: 0.5.0
containerEdits:
  deviceNodes:
  - path: /dev/null
  env:
  - NVIDIA_VISIBLE_DEVICES=void
  hooks:
  - args:
    - nvidia-cdi-hook
    - update-ldcache
    hookName: createContainer
    path: /usr/bin/nvidia-cdi-hook
  mounts:
  - containerPath: /usr/bin/nvidia-smi
    hostPath: /usr/bin/nvidia-smi
    options: [ro, nosuid, "bind"]
devices:
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
      hostPath: /dev/full
      permissions: rw
  name: "0"
- name: GPU-b
  containerEdits:
    additionalGids: [44, 0, 44]
    deviceNodes:
    - path: /dev/zero
    env: [PATH=/opt]
kind: nvidia.com/gpu
"#;

fn specs(files: &[(&str, &str)]) -> Specs {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    Specs::read(root.path())
}

fn oci() -> Value {
    json!({
        "process": {"user": {"uid": 0, "gid": 7}, "env": ["PATH=/bin", "HOME=/"]},
        "mounts": [{"destination": "/usr/bin/nvidia-smi", "source": "other"}],
        "linux": {"devices": [{"path": "/dev/zero", "type": "c", "major": 9, "minor": 9}], "resources": {}},
    })
}

fn apply(specs: &Specs, names: &[&str]) -> Result<Value, String> {
    specs.apply(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), oci())
}

#[test]
fn a_container_gets_what_a_specification_says_and_what_is_shared_once() {
    let specs = specs(&[("etc/cdi/nvidia.yaml", NVIDIA)]);
    let names: Vec<_> =
        specs.devices().map(|(spec, device)| (spec.kind.as_str(), device.name.as_str())).collect();
    assert_eq!(names, [("nvidia.com/gpu", "0"), ("nvidia.com/gpu", "GPU-b")]);
    let done = apply(&specs, &["nvidia.com/gpu=0", "nvidia.com/gpu=GPU-b"]).unwrap();
    assert_eq!(done["process"]["env"], json!(["HOME=/", "NVIDIA_VISIBLE_DEVICES=void", "PATH=/opt"]));
    assert_eq!(done["process"]["user"]["additionalGids"], json!([44]));
    assert_eq!(
        done["linux"]["devices"],
        json!([
            {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "gid": 7},
            {"path": "/dev/nvidia0", "type": "c", "major": 1, "minor": 7, "gid": 7},
            {"path": "/dev/zero", "type": "c", "major": 1, "minor": 5, "gid": 7},
        ])
    );
    let access: Vec<_> = done["linux"]["resources"]["devices"].as_array().unwrap().iter().collect();
    assert_eq!(access[1], &json!({"allow": true, "type": "c", "major": 1, "minor": 7, "access": "rw"}));
    assert_eq!(
        done["mounts"],
        json!([{"destination": "/usr/bin/nvidia-smi", "source": "/usr/bin/nvidia-smi",
            "options": ["ro", "nosuid", "bind"]}])
    );
    let hook = json!({"path": "/usr/bin/nvidia-cdi-hook", "args": ["nvidia-cdi-hook", "update-ldcache"]});
    assert_eq!(done["hooks"]["createContainer"], json!([hook]));
}

#[test]
fn the_later_directory_holds_and_twins_are_refused() {
    let spec = |node: &str| {
        let edits = json!({"env": [format!("NODE={node}")]});
        let device = json!({"name": "0", "containerEdits": edits});
        json!({"cdiVersion": "0.6.0", "kind": "a.com/b", "devices": [device]}).to_string()
    };
    let (old, new) = (spec("old"), spec("new"));
    let both = specs(&[("var/run/cdi/x.json", &new), ("etc/cdi/y.json", &old)]);
    assert_eq!(apply(&both, &["a.com/b=0"]).unwrap()["process"]["env"][2], "NODE=new");
    let twins = specs(&[("etc/cdi/x.json", &new), ("etc/cdi/y.json", &old)]);
    assert!(apply(&twins, &["a.com/b=0"]).unwrap_err().contains("two specifications"));
}

#[test]
fn what_cannot_be_followed_whole_is_not_followed() {
    let device = |edits: Value| json!({"cdiVersion": "1.0.0", "kind": "a.com/b", "devices": [{"name": "0", "containerEdits": edits}]});
    let with = |key: &str, value: Value| {
        let mut spec = device(json!({}));
        spec[key] = value;
        spec
    };
    for (spec, why) in [
        (device(json!({"surprise": []})), "unknown field `surprise`"),
        (device(json!({"hooks": [{"hookName": "never", "path": "/x"}]})), "unknown variant `never`"),
        (with("cdiVersion", json!("2.0.0")), "newer than"),
        (with("kind", json!("gpu")), "vendor/class"),
        (with("devices", json!([{"name": ""}])), "no name of a device"),
    ] {
        let why_not = apply(&specs(&[("etc/cdi/x.json", &spec.to_string())]), &["a.com/b=0"]).unwrap_err();
        assert!(why_not.contains("/etc/cdi/x.json: ") && why_not.contains(why), "{why_not}");
    }
    for (edits, why) in [
        (json!({"deviceNodes": [{"path": "/dev/nonesuch"}]}), "is the driver loaded"),
        (json!({"deviceNodes": [{"path": "/etc/hostname"}]}), "is no device"),
        (json!({"deviceNodes": [{"path": "/dev/full", "type": "b"}]}), "another type"),
        (json!({"env": ["=x"]}), "no setting"),
    ] {
        let specs = specs(&[("etc/cdi/x.json", &device(edits).to_string())]);
        let why_not = apply(&specs, &["a.com/b=0"]).unwrap_err();
        assert!(why_not.contains(why), "{why_not}");
    }
    assert!(apply(&Specs::default(), &["0"]).unwrap_err().contains("vendor/class=device"));
}

#[test]
fn yaml_reads_as_its_json_twin() {
    let json = r#"{"a": [1, -2, 0.5, true, null, "1", "", {"b": {}}], "c d": "x: y", "e": []}"#;
    assert_eq!(yaml::read(json).unwrap(), serde_json::from_str::<Value>(json).unwrap());
    assert_eq!(
        yaml::read("mode: 0o666\nhex: 0x1F\nno: no\n").unwrap(),
        json!({"mode": 438, "hex": 31, "no": "no"})
    );
    let deep = "[".repeat(40) + &"]".repeat(40);
    for (text, why) in [
        ("a: &x 1", "anchors"),
        ("a: !!int 1", "tags"),
        ("a: 1\na: 2", "twice"),
        ("? [a]\n: 1", "a key must be text"),
        ("a: 1\n---\nb: 2", "a second document"),
        ("a: [", "not YAML"),
        ("", "empty"),
        (deep.as_str(), "deeper"),
    ] {
        let why_not = yaml::read(text).unwrap_err();
        assert!(why_not.contains(why), "{text}: {why_not}");
    }
}
