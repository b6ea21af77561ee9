//! The clocks, and the names that the kernel and the machine give: the only place that reads them.

use std::fs;
use std::io::Read;
use std::path::Path;

use berth_protocol::ids::{BootId, Digest, HardwareId, IdError};
use berth_protocol::units::{BootMs, Timestamp};
use nix::time::{ClockId, clock_gettime};

use crate::core::Now;

pub fn now() -> Now {
    let boot = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        let (sec, nsec) = (time.tv_sec(), time.tv_nsec());
        // tv_sec is 32 bits wide on some machines.
        #[allow(clippy::useless_conversion, reason = "time_t and its like are narrower on 32-bit machines")]
        let ms = u64::try_from(i64::from(sec) * 1000 + i64::from(nsec) / 1_000_000);
        ms.unwrap_or(0)
    });
    Now { wall: Timestamp::from_system(std::time::SystemTime::now()), boot: BootMs(boot) }
}

/// 128 random bits in hexadecimal.
pub fn random_token() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
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
