//! Draws from the kernel's generator: the store's id and secret, the core's seed, the broker's password.

use std::fs::File;
use std::io::{self, Read as _};

pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// `N` bytes as hexadecimal digits.
pub fn hex<const N: usize>() -> io::Result<String> {
    Ok(bytes::<N>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}
