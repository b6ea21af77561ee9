//! What specifications add to a container's OCI configuration.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use serde_json::{Map, Value, json};

use super::{Edits, Node, Spec, Specs};

impl Specs {
    /// The OCI configuration with what the devices of these qualified names, `vendor/class=name`, bring.
    ///
    /// # Errors
    /// Where a name is not there, or a device node of it is not on this machine.
    pub fn apply(&self, names: &[String], mut oci: Value) -> Result<Value, String> {
        // What all devices of a file share is added once, before the first of them.
        let mut begun: Vec<*const Spec> = Vec::new();
        for name in names {
            let (spec, device) = self.find(name)?;
            if !begun.contains(&std::ptr::from_ref(spec)) {
                begun.push(spec);
                add(&spec.container_edits, &mut oci)?;
            }
            add(&device.container_edits, &mut oci)?;
        }
        Ok(oci)
    }
}

fn add(edits: &Edits, oci: &mut Value) -> Result<(), String> {
    for entry in &edits.env {
        let name = entry.split_once('=').map(|(name, _)| name).filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| format!("`{entry}` is no setting of the environment"))?;
        let env = list(oci, &["process", "env"]);
        env.retain(|old| old.as_str().and_then(|old| old.split_once('=')).is_none_or(|(old, _)| old != name));
        env.push(json!(entry));
    }
    for node in &edits.device_nodes {
        add_node(node, oci)?;
    }
    for device in &edits.net_devices {
        object(oci, &["linux", "netDevices"])
            .insert(device.host_interface_name.clone(), json!({"name": device.name}));
    }
    for mount in &edits.mounts {
        let mounts = list(oci, &["mounts"]);
        mounts.retain(|old| old["destination"] != json!(mount.container_path));
        mounts.push(present(json!({
            "destination": mount.container_path, "source": mount.host_path,
            "type": mount.r#type, "options": mount.options,
        })));
    }
    for hook in &edits.hooks {
        list(oci, &["hooks", hook.hook_name.key()]).push(present(json!({
            "path": hook.path, "args": hook.args, "env": hook.env, "timeout": hook.timeout,
        })));
    }
    if let Some(rdt) = &edits.intel_rdt {
        object(oci, &["linux"]).insert("intelRdt".to_owned(), Value::Object(rdt.clone()));
    }
    for gid in edits.additional_gids.iter().filter(|gid| **gid != 0) {
        let gids = list(oci, &["process", "user", "additionalGids"]);
        if !gids.contains(&json!(gid)) {
            gids.push(json!(gid));
        }
    }
    Ok(())
}

/// A device node, what the specification leaves out taken from the machine's own.
fn add_node(node: &Node, oci: &mut Value) -> Result<(), String> {
    let host = node.host_path.clone().unwrap_or_else(|| (&node.path).into());
    let mut kind = node.r#type.clone();
    let (mut major, mut minor) = (node.major, node.minor);
    if kind.is_none() || (major.is_none() && kind.as_deref() != Some("p")) {
        let file = std::fs::metadata(&host)
            .map_err(|e| format!("{}: {e}; is the driver loaded?", host.display()))?;
        let found = match file.file_type() {
            t if t.is_char_device() => "c",
            t if t.is_block_device() => "b",
            t if t.is_fifo() => "p",
            _ => return Err(format!("{} is no device", host.display())),
        };
        if kind.as_deref().is_some_and(|kind| kind != found && !(kind == "u" && found == "c")) {
            return Err(format!("{} is of another type than its specification says", host.display()));
        }
        kind.get_or_insert_with(|| found.to_owned());
        major = major.or(Some(i64::from(libc::major(file.rdev()))));
        minor = minor.or(Some(i64::from(libc::minor(file.rdev()))));
    }
    let owner = |key: &str| oci["process"]["user"][key].as_u64().filter(|id| *id > 0);
    let device = present(json!({
        "path": node.path, "type": kind, "major": major, "minor": minor, "fileMode": node.file_mode,
        "uid": node.uid.map(u64::from).or_else(|| owner("uid")),
        "gid": node.gid.map(u64::from).or_else(|| owner("gid")),
    }));
    let devices = list(oci, &["linux", "devices"]);
    devices.retain(|old| old["path"] != json!(node.path));
    devices.push(device);
    let access = match node.permissions.as_deref() {
        None | Some("") => "rwm",
        Some("none") => "",
        Some(access) => access,
    };
    if matches!(kind.as_deref(), Some("b" | "c")) {
        list(oci, &["linux", "resources", "devices"]).push(json!({
            "allow": true, "type": kind, "major": major, "minor": minor, "access": access,
        }));
    }
    Ok(())
}

/// Without the fields that are null or empty, which the OCI configuration leaves out.
fn present(mut value: Value) -> Value {
    if let Value::Object(fields) = &mut value {
        fields.retain(|_, field| !field.is_null() && field.as_array().is_none_or(|list| !list.is_empty()));
    }
    value
}

fn object<'v>(value: &'v mut Value, path: &[&str]) -> &'v mut Map<String, Value> {
    as_object(place(value, path))
}

fn place<'v>(value: &'v mut Value, path: &[&str]) -> &'v mut Value {
    path.iter().fold(value, |value, key| as_object(value).entry(*key).or_insert(Value::Null))
}

fn as_object(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("it was just made one"),
    }
}

/// The list at that place, made where there is none.
fn list<'v>(value: &'v mut Value, path: &[&str]) -> &'v mut Vec<Value> {
    let place = place(value, path);
    if !place.is_array() {
        *place = Value::Array(Vec::new());
    }
    match place {
        Value::Array(list) => list,
        _ => unreachable!("it was just made one"),
    }
}
