//! Tells systemd how the agent is (sd_notify(3)); silent where there is no systemd.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Sends a state such as `READY=1`. Nothing depends on its arrival.
pub fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&path),
    };
    let send = || -> std::io::Result<()> {
        UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address?).map(drop)
    };
    if let Err(error) = send() {
        tracing::debug!(%error, "systemd was not told {state}");
    }
}

/// How often systemd wants to hear that the agent lives: half of what it allows.
pub fn watchdog() -> Option<Duration> {
    let usec: u64 = std::env::var("WATCHDOG_USEC").ok()?.parse().ok()?;
    Some(Duration::from_micros(usec / 2))
}
