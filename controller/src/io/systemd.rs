//! Tells the service manager how the program is (sd_notify(3)): a datagram to `$NOTIFY_SOCKET`. Without one: nothing.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

pub struct Notifier {
    to: Option<(UnixDatagram, SocketAddr)>,
}

impl Notifier {
    pub fn from_env() -> Self {
        let to = std::env::var("NOTIFY_SOCKET").ok().and_then(|name| {
            let address = match name.strip_prefix('@') {
                Some(name) => SocketAddr::from_abstract_name(name).ok()?,
                None => SocketAddr::from_pathname(&name).ok()?,
            };
            let socket = UnixDatagram::unbound().ok()?;
            socket.set_nonblocking(true).ok()?;
            Some((socket, address))
        });
        Self { to }
    }

    /// `READY=1`, `STOPPING=1`, `WATCHDOG=1`, `STATUS=…`. A service manager that does not listen is no reason to fail.
    pub fn send(&self, state: &str) {
        if let Some((socket, address)) = &self.to {
            let _ = socket.send_to_addr(state.as_bytes(), address);
        }
    }

    /// How often to send `WATCHDOG=1`: half of what the unit's WatchdogSec asks for.
    pub fn watchdog_period(&self) -> Option<Duration> {
        self.to.as_ref()?;
        let pid = std::env::var("WATCHDOG_PID").ok();
        if pid.is_some_and(|pid| pid != std::process::id().to_string()) {
            return None;
        }
        let micros: u64 = std::env::var("WATCHDOG_USEC").ok()?.parse().ok()?;
        Some(Duration::from_micros(micros / 2)).filter(|period| !period.is_zero())
    }
}
