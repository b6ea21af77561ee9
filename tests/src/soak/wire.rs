//! Network namespaces, and between them a wire that this program is: every packet passes through it, late, lost or not at
//! all, as it is told. Works on kernels without `netem`; namespaces and devices go with the processes that hold them.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Of networks of tests, by RFC 2544: no other machine has it.
pub const NETWORK: &str = "198.18.0.0/24";
const DEVICE: &str = "wire0";
const MTU: usize = 9000;
/// Packets under way; more are lost, as in any queue.
const QUEUE_MAX: usize = 20_000;
// From linux/if_tun.h.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const IFF_TUN: libc::c_short = 0x0001;
const IFF_NO_PI: libc::c_short = 0x1000;

/// One direction of a host's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    pub delay: Duration,
    /// Added to the delay: up to this much.
    pub jitter: Duration,
    pub lost_of_1000: u32,
}

impl Way {
    /// As in a building.
    pub const GOOD: Self =
        Self { delay: Duration::from_micros(200), jitter: Duration::from_micros(300), lost_of_1000: 0 };
    /// As over a long line.
    pub const FAIR: Self =
        Self { delay: Duration::from_millis(3), jitter: Duration::from_millis(4), lost_of_1000: 2 };
    pub const CUT: Self = Self { delay: Duration::ZERO, jitter: Duration::ZERO, lost_of_1000: 1000 };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    pub into: Way,
    pub out: Way,
}

impl Link {
    pub const fn both(way: Way) -> Self {
        Self { into: way, out: way }
    }
}

/// A packet on its way.
struct Parcel {
    due: Instant,
    /// Breaks ties, so that what was sent first comes first.
    number: u64,
    to: usize,
    bytes: Vec<u8>,
}

impl Ord for Parcel {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

impl PartialOrd for Parcel {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Parcel {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Parcel {}

struct State {
    links: Vec<Link>,
    queue: BinaryHeap<Reverse<Parcel>>,
    /// When the last packet from one host to another comes: those behind it come no sooner.
    last: Vec<Vec<Option<Instant>>>,
    random: fastrand::Rng,
    sent: u64,
    lost: u64,
}

struct Switch {
    state: Mutex<State>,
    more: Condvar,
    devices: Vec<File>,
}

/// Namespaces on one wire, numbered as they were named.
pub struct Wire {
    namespaces: Vec<OwnedFd>,
    switch: Arc<Switch>,
}

/// The address of the host with this number.
pub fn address(host: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 1)) + u32::try_from(host).unwrap_or(0))
}

/// The host that a packet is for.
fn destination(packet: &[u8], hosts: usize) -> Option<usize> {
    let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
    let host = u32::from_be_bytes(to).checked_sub(u32::from(address(0)))? as usize;
    (packet[0] >> 4 == 4 && host < hosts).then_some(host)
}

impl Wire {
    /// With a namespace for each of `links`. Needs root.
    pub fn new(links: Vec<Link>, seed: u64) -> Result<Self> {
        let count = links.len();
        let mut namespaces = Vec::new();
        let mut devices = Vec::new();
        for host in 0..count {
            let (namespace, device) =
                namespace().context("cannot make a network namespace (is this root?)")?;
            for words in [
                "link set lo up".to_owned(),
                format!("address add {}/24 dev {DEVICE}", address(host)),
                format!("link set {DEVICE} mtu {MTU} up"),
            ] {
                let mut command = Command::new("ip");
                enter(&namespace, command.args(words.split(' ')));
                let output = command.output().context("ip does not start: apt install iproute2")?;
                let said = String::from_utf8_lossy(&output.stderr);
                ensure!(output.status.success(), "ip {words}: {said}");
            }
            namespaces.push(namespace);
            devices.push(device);
        }
        let state = State {
            links,
            queue: BinaryHeap::new(),
            last: vec![vec![None; count]; count],
            random: fastrand::Rng::with_seed(seed),
            sent: 0,
            lost: 0,
        };
        let switch = Arc::new(Switch { state: Mutex::new(state), more: Condvar::new(), devices });
        // They end with the program.
        for host in 0..count {
            let switch = switch.clone();
            std::thread::spawn(move || switch.take(host));
        }
        let delivering = switch.clone();
        std::thread::spawn(move || delivering.deliver());
        Ok(Self { namespaces, switch })
    }

    /// Has a program run on this host.
    pub fn place(&self, host: usize, command: &mut Command) {
        enter(&self.namespaces[host], command);
    }

    pub fn set(&self, host: usize, link: Link) {
        self.switch.state().links[host] = link;
    }

    /// Packets so far, and of these the lost ones.
    pub fn counts(&self) -> (u64, u64) {
        let state = self.switch.state();
        (state.sent, state.lost)
    }
}

impl Switch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what a host sends.
    fn take(&self, from: usize) {
        let mut buffer = vec![0; MTU + 100];
        loop {
            let Ok(length) = (&self.devices[from]).read(&mut buffer) else { return };
            let packet = &buffer[..length];
            let Some(to) = destination(packet, self.devices.len()) else { continue };
            self.state().send(from, to, packet.to_vec());
            self.more.notify_one();
        }
    }

    fn deliver(&self) {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            let wait = match state.queue.peek() {
                Some(Reverse(parcel)) if parcel.due > now => parcel.due - now,
                Some(_) => {
                    let Some(Reverse(parcel)) = state.queue.pop() else { continue };
                    drop(state);
                    // Where the host takes it no more it is lost, as on any wire.
                    let _ = (&self.devices[parcel.to]).write(&parcel.bytes);
                    state = self.state();
                    continue;
                }
                None => Duration::from_secs(1),
            };
            state = self.more.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    fn send(&mut self, from: usize, to: usize, bytes: Vec<u8>) {
        let ways = [self.links[from].out, self.links[to].into];
        self.sent += 1;
        let is_lost = ways.iter().any(|way| self.random.u32(0..1000) < way.lost_of_1000);
        if is_lost || self.queue.len() >= QUEUE_MAX {
            self.lost += 1;
            return;
        }
        let mut due = Instant::now();
        for way in ways {
            due += way.delay + way.jitter.mul_f64(self.random.f64());
        }
        due = self.last[from][to].map_or(due, |last| due.max(last));
        self.last[from][to] = Some(due);
        self.queue.push(Reverse(Parcel { due, number: self.sent, to, bytes }));
    }
}

/// A network namespace with this program's end of a device in it.
fn namespace() -> Result<(OwnedFd, File)> {
    let make = || -> Result<(OwnedFd, File)> {
        // SAFETY: no pointers; of this thread alone, which ends.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(io::Error::last_os_error().into());
        }
        let namespace = File::open("/proc/thread-self/ns/net")?.into();
        let device =
            File::options().read(true).write(true).open("/dev/net/tun").context("no /dev/net/tun")?;
        // SAFETY: all of it may be zero.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, byte) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
            *to = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = IFF_TUN | IFF_NO_PI;
        // SAFETY: the request outlives the call.
        if unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFF, &raw const request) } != 0 {
            return Err(io::Error::last_os_error()).context("cannot make a TUN device");
        }
        Ok((namespace, device))
    };
    std::thread::spawn(make)
        .join()
        .map_err(|_| anyhow::anyhow!("the thread that makes a namespace has died"))?
}

fn enter(namespace: &OwnedFd, command: &mut Command) {
    let namespace = namespace.as_raw_fd();
    // SAFETY: one system call between fork and exec, on a handle that the wire holds.
    unsafe {
        command.pre_exec(move || match libc::setns(namespace, libc::CLONE_NEWNET) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_name_their_host() {
        let mut packet = vec![0x45; 20];
        packet[16..20].copy_from_slice(&address(3).octets());
        assert_eq!(destination(&packet, 4), Some(3));
        assert_eq!(destination(&packet, 3), None);
        packet[0] = 0x60;
        assert_eq!(destination(&packet, 4), None);
        assert_eq!(destination(&[0x45; 19], 4), None);
    }

    #[test]
    fn a_link_delays_and_loses() {
        let slow = Way { delay: Duration::from_millis(20), ..Way::GOOD };
        let mut state = State {
            links: vec![Link::both(Way::GOOD), Link::both(slow), Link { into: Way::CUT, out: Way::GOOD }],
            queue: BinaryHeap::new(),
            last: vec![vec![None; 3]; 3],
            random: fastrand::Rng::with_seed(1),
            sent: 0,
            lost: 0,
        };
        let begun = Instant::now();
        state.send(0, 1, vec![1]);
        state.send(0, 1, vec![2]);
        state.send(0, 2, vec![3]);
        state.send(2, 0, vec![4]);
        assert_eq!((state.sent, state.lost), (4, 1));
        let order = std::iter::from_fn(|| state.queue.pop().map(|Reverse(parcel)| parcel));
        let parcels: Vec<Parcel> = order.collect();
        assert_eq!(parcels.iter().map(|parcel| parcel.bytes[0]).collect::<Vec<_>>(), [4, 1, 2]);
        assert!(parcels[1].due >= begun + Duration::from_millis(20));
    }
}
