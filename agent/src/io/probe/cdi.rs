//! Which CDI device is one that was found; the injecting is the shim's.

use super::gpus::Found;
use crate::cdi::{Device, Specs};

/// The name for a device that was found: one that is its uuid, else one whose device nodes are exactly its own.
/// Numbers alone are not trusted: they shift when a device is taken out, and a pod must see no other's.
pub fn name_of(found: &Found, specs: &Specs) -> Option<String> {
    let own: Vec<&str> = found.nodes.iter().filter_map(|node| node.to_str()).collect();
    let only_own = |device: &Device| {
        let mut numbered = device.nodes().filter(|node| is_of_one_device(node)).peekable();
        numbered.peek().is_some() && numbered.all(|node| own.contains(&node))
    };
    let named = specs.devices().find(|(_, device)| device.name == found.gpu.uuid);
    let (spec, device) = named.or_else(|| specs.devices().find(|(_, device)| only_own(device)))?;
    Some(format!("{}={}", spec.kind, device.name))
}

/// `/dev/nvidia0`, `/dev/dri/card0`, `/dev/dri/renderD128`; not `/dev/nvidiactl` or `/dev/kfd`, which all share.
fn is_of_one_device(node: &str) -> bool {
    ["/dev/nvidia", "/dev/dri/card", "/dev/dri/renderD"].iter().any(|prefix| {
        let number = node.strip_prefix(prefix);
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
    })
}
