//! Ports of loopback for real programs.

use std::net::TcpListener;

/// Below those that the kernel gives to clients (`ip_local_port_range`): what a server that is not there yet, or dead for
/// a while, is to listen on, none of them takes meanwhile.
const FIRST: u16 = 10_000;
const LAST: u16 = 32_000;

/// So many that were free a moment ago, no two alike.
pub fn free_ports(count: usize) -> Vec<u16> {
    let bind = |_| TcpListener::bind(("127.0.0.1", fastrand::u16(FIRST..=LAST)));
    let held: Vec<TcpListener> = std::iter::repeat(()).map(bind).filter_map(Result::ok).take(count).collect();
    held.iter().map(|port| port.local_addr().expect("it is bound").port()).collect()
}
