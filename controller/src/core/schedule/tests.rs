//! What the tests of several modules here share.

use super::problem::{Device, Room, Size};

pub fn room(cpu_milli: u64, memory_bytes: u64, devices: Vec<Device>) -> Room {
    Room { open: true, cpu_milli, memory_bytes, disk_bytes: 0, slots: 99, devices, size: Size::default() }
}
