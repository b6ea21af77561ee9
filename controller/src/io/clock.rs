//! Reads the two clocks that the core is told. Nothing else in the controller reads one for a decision.

use std::time::SystemTime;

use berth_protocol::units::{BootMs, Timestamp};

use crate::core::Now;

pub fn now() -> Now {
    Now { wall: Timestamp::from_system(SystemTime::now()), boot: boottime() }
}

/// CLOCK_BOOTTIME: counts through suspend, never jumps.
pub fn boottime() -> BootMs {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec to write to. The call cannot fail: every Linux since 2.6.39 has the clock.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    BootMs(time.tv_sec.unsigned_abs() * 1000 + time.tv_nsec.unsigned_abs() / 1_000_000)
}
