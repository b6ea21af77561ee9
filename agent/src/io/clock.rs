//! The clocks, and the names that the kernel and the machine give: the only place that reads them.

use std::fs;
use std::io::Read;
use std::path::Path;

use berth_protocol::ids::{BootId, Digest, HardwareId, IdError};

use crate::core::Now;
use crate::shim::sys;

pub fn now() -> Now {
    Now { wall: sys::now(), boot: sys::boot_now() }
}

/// 128 random bits in hexadecimal.
pub fn random_token() -> std::io::Result<String> {
    Ok(random_bytes::<16>()?.iter().map(|b| format!("{b:02x}")).collect())
}

pub fn random_bytes<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The kernel's name for this boot.
pub fn boot_id() -> Result<BootId, IdError> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    BootId::parse(text.trim())
}

/// What stays the same when the system is installed anew: the firmware's id of the machine, else the system's.
pub fn hardware_id() -> Result<HardwareId, IdError> {
    let found = ["/sys/class/dmi/id/product_uuid", "/proc/device-tree/serial-number", "/etc/machine-id"]
        .iter()
        .find_map(|path| fs::read(Path::new(path)).ok().filter(|bytes| !bytes.is_empty()));
    // Hashed, since firmware prints all kinds of characters, and a machine-id is not for publishing.
    HardwareId::parse(&Digest::of(&found.unwrap_or_default()).hex()[..32])
}
