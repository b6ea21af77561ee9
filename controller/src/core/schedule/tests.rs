//! What the tests of several modules here share.

use super::problem::{Device, Room};

pub fn room(cpu_milli: u64, memory_bytes: u64, devices: Vec<Device>) -> Room {
    Room { open: true, cpu_milli, memory_bytes, slots: 99, devices }
}
