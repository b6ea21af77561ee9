//! The node's part of the pods' networks: one bridge an agent, its addresses, the way out. Pods' own links are their
//! shims' affair; which pod has which address the caller keeps.
//!
//! Several agents share a machine: each holds one of the numbered slots below `SLOTS_DIR` by a lock, and has the
//! bridge and the subnet of that number.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{Flock, FlockArg};

use crate::shim::netlink::{self, Netlink};
use crate::shim::network::has_links;
use crate::task::BridgeAddress;

mod guard;

pub const SLOTS_DIR: &str = "/run/berth/net";
/// Agents with a bridge on one machine.
pub const SLOTS_MAX: u8 = 64;
/// Pods on one bridge: a /24 without network, gateway and broadcast.
pub const ADDRESSES_MAX: u8 = 253;
const PREFIX: u8 = 24;

/// Why pods cannot have networks of their own; the node then says `bridge: false`.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    #[error("cannot use {path}: {source}")]
    Slots { path: PathBuf, source: io::Error },
    #[error("all {SLOTS_MAX} bridges of {SLOTS_DIR} are taken, or their subnets are in use on this machine")]
    NoSlot,
    #[error(
        "cannot make bridge {name}: {source}; the agent needs CAP_NET_ADMIN and the kernel module `bridge`"
    )]
    Bridge { name: String, source: io::Error },
    #[error("cannot switch on forwarding in /proc/sys/net/ipv4/ip_forward: {0}")]
    Forward(io::Error),
    #[error("cannot set up address translation: {nft}; {iptables}; install nftables (or iptables)")]
    Nat { nft: String, iptables: String },
    #[error(
        "cannot keep pods from this machine's own services: {nft}; {iptables}; install nftables (or iptables)"
    )]
    Guard { nft: String, iptables: String },
}

/// What the node's configuration lets pods on the bridge reach beyond other machines and each other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reach {
    /// Where clouds tell a machine who it is, and give it the keys to be that.
    pub metadata: bool,
    /// This machine's own, TCP.
    pub node_ports: Vec<u16>,
}

/// Clouds' own services for the machine alone: link-local addresses, Azure's, Alibaba's; and those of AWS and Google on
/// IPv6. Name servers at such an address stay.
const METADATA_V4: &str = "169.254.0.0/16,168.63.129.16,100.100.100.200";
const METADATA_V6: &str = "fd00:ec2::254,fd20:ce::254";
const DNS: u16 = 53;

/// An agent's bridge, held until it is closed or the process ends.
#[derive(Debug)]
pub struct Bridge {
    slot: u8,
    lock: Flock<File>,
}

/// The address of the pod with this index on the bridge of a slot; `index` is below `ADDRESSES_MAX`.
pub fn address(slot: u8, index: u8, dns: Vec<Ipv4Addr>) -> Option<BridgeAddress> {
    (index < ADDRESSES_MAX).then(|| BridgeAddress {
        bridge: name(slot),
        address: Ipv4Addr::from(u32::from(gateway(slot)) + 1 + u32::from(index)),
        prefix: PREFIX,
        gateway: gateway(slot),
        dns,
    })
}

/// The first index that none of `taken` has.
pub fn free_index(taken: impl IntoIterator<Item = Ipv4Addr>, slot: u8) -> Option<u8> {
    let first = u32::from(gateway(slot)) + 1;
    let taken: std::collections::BTreeSet<u32> =
        taken.into_iter().filter_map(|address| u32::from(address).checked_sub(first)).collect();
    (0..ADDRESSES_MAX).find(|index| !taken.contains(&u32::from(*index)))
}

fn name(slot: u8) -> String {
    format!("berth{slot}")
}

fn gateway(slot: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 213, slot, 1)
}

fn subnet(slot: u8) -> String {
    format!("10.213.{slot}.0/{PREFIX}")
}

impl Bridge {
    /// Makes, or finds again, the bridge of the agent whose data directory is `owner`. Blocks for some 10 ms.
    pub fn open(slots: &Path, owner: &Path, reach: &Reach) -> Result<Self, BridgeError> {
        fs::create_dir_all(slots).map_err(|source| BridgeError::Slots { path: slots.to_owned(), source })?;
        let bridge = claim(slots, owner)?;
        bridge.make(reach)?;
        Ok(bridge)
    }

    pub fn slot(&self) -> u8 {
        self.slot
    }

    fn make(&self, reach: &Reach) -> Result<(), BridgeError> {
        let name = name(self.slot);
        let failed = |source| BridgeError::Bridge { name: name.clone(), source };
        let link = Netlink::open().map_err(failed)?;
        // Before anybody can be on it.
        guard::set_up(&name, reach)?;
        there(link.send(vec![netlink::add_bridge(&name)])).map_err(failed)?;
        let index = netlink::index(&name).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        there(link.send(vec![netlink::add_address(index, gateway(self.slot), PREFIX)])).map_err(failed)?;
        link.send(vec![netlink::set_up(index)]).map_err(failed)?;
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(BridgeError::Forward)?;
        translate(self.slot)?;
        if pass_forwarding_firewall(self.slot) {
            // What was let through just now stands before what is not to pass.
            guard::set_up(&name, reach)?;
        }
        Ok(())
    }

    /// Takes the bridge away unless pods are still on it; then the next start finds it again.
    pub fn close(self) {
        let name = name(self.slot);
        if has_pods(self.slot) {
            return;
        }
        let _ = Netlink::open().and_then(|link| link.send(vec![netlink::delete(&name)]));
        let _ = run("nft", &["delete", "table", "ip", &name], "");
        let _ = masquerade("-D", self.slot);
        guard::take_away(&name);
        for rule in firewall_rules(self.slot) {
            let _ = run("iptables", &with_verb("-D", &rule), "");
        }
        let _ = self.lock.set_len(0);
    }
}

/// What is there already is as good as made.
fn there(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Where it cannot be told the bridge stays.
fn has_pods(slot: u8) -> bool {
    has_links(gateway(slot)).unwrap_or(true)
}

/// The slot that is the owner's already, else the first that is nobody's.
fn claim(slots: &Path, owner: &Path) -> Result<Bridge, BridgeError> {
    let mut free = None;
    for slot in 0..SLOTS_MAX {
        let path = slots.join(slot.to_string());
        let failed = |source| BridgeError::Slots { path: path.clone(), source };
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path);
        // Another agent lives there.
        let Ok(mut lock) = Flock::lock(file.map_err(failed)?, FlockArg::LockExclusiveNonblock) else {
            continue;
        };
        let mut text = String::new();
        lock.read_to_string(&mut text).map_err(failed)?;
        if Path::new(&text) == owner {
            return Ok(Bridge { slot, lock });
        }
        let unused = netlink::index(&name(slot)).is_none() && !route_overlaps(slot);
        let left = !text.is_empty() && !has_pods(slot);
        if free.is_none() && (unused || left) {
            free = Some((Bridge { slot, lock }, path));
        }
    }
    let (mut bridge, path) = free.ok_or(BridgeError::NoSlot)?;
    let file = &mut bridge.lock;
    let written = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| file.write_all(owner.as_os_str().as_encoded_bytes()));
    written.map_err(|source| BridgeError::Slots { path, source })?;
    Ok(bridge)
}

/// Does this machine reach the slot's subnet some other way than by default?
fn route_overlaps(slot: u8) -> bool {
    let text = fs::read_to_string("/proc/thread-self/net/route").unwrap_or_default();
    let own = u32::from(gateway(slot)) & 0xffff_ff00;
    // Interface, destination, gateway, flags, …, mask: numbers in the machine's byte order.
    text.lines().skip(1).any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let hex = |i: usize| fields.get(i).and_then(|f| u32::from_str_radix(f, 16).ok()).map(u32::from_be);
        match (hex(1), hex(7)) {
            (Some(destination), Some(mask)) if mask != 0 => {
                let common = mask & 0xffff_ff00;
                destination & common == own & common
            }
            _ => false,
        }
    })
}

/// What pods send beyond the bridge bears the node's address.
fn translate(slot: u8) -> Result<(), BridgeError> {
    let (name, subnet) = (name(slot), subnet(slot));
    let rules = format!(
        "table ip {name}\ndelete table ip {name}\ntable ip {name} {{\n chain out {{\n  \
         type nat hook postrouting priority 100;\n  ip saddr {subnet} oifname != \"{name}\" masquerade\n }}\n}}\n"
    );
    let Err(nft) = run("nft", &["-f", "-"], &rules) else { return Ok(()) };
    if masquerade("-C", slot).is_ok() {
        return Ok(());
    }
    masquerade("-A", slot).map_err(|iptables| BridgeError::Nat { nft, iptables })
}

fn masquerade(verb: &str, slot: u8) -> Result<(), String> {
    let (name, subnet) = (name(slot), subnet(slot));
    let rule = ["POSTROUTING", "-s", &subnet, "!", "-o", &name, "-j", "MASQUERADE"];
    run("iptables", &[&["-w", "-t", "nat", verb][..], &rule].concat(), "")
}

fn firewall_rules(slot: u8) -> [Vec<String>; 2] {
    let name = name(slot);
    let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
    [
        own(&["FORWARD", "-i", &name, "-j", "ACCEPT"]),
        own(&["FORWARD", "-o", &name, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT"]),
    ]
}

fn with_verb<'a>(verb: &'a str, rule: &'a [String]) -> Vec<&'a str> {
    ["-w", verb].into_iter().chain(rule.iter().map(String::as_str)).collect()
}

/// Where something else (Docker does) has closed forwarding by default, the pods' way is opened; was it?
fn pass_forwarding_firewall(slot: u8) -> bool {
    let closed = Command::new("iptables").args(["-w", "-S", "FORWARD"]).stderr(Stdio::null()).output();
    if !closed.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("-P FORWARD DROP")) {
        return false;
    }
    for rule in firewall_rules(slot) {
        if run("iptables", &with_verb("-C", &rule), "").is_err() {
            let _ = run("iptables", &with_verb("-I", &rule), "");
        }
    }
    true
}

fn run(program: &str, args: &[&str], input: &str) -> Result<(), String> {
    let failed = |e: io::Error| format!("{program}: {e}");
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).map_err(failed)?;
    }
    let output = child.wait_with_output().map_err(failed)?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// The name servers that pods can use: the node's own, without those that only its loopback reaches.
pub fn name_servers() -> Vec<Ipv4Addr> {
    // Where systemd-resolved is the node's, the first file names a loopback address, the second the real ones.
    let files = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
    files
        .iter()
        .map(|path| parse_name_servers(&fs::read_to_string(path).unwrap_or_default()))
        .find(|servers| !servers.is_empty())
        .unwrap_or_default()
}

fn parse_name_servers(text: &str) -> Vec<Ipv4Addr> {
    text.lines()
        .filter_map(|line| line.strip_prefix("nameserver")?.trim().parse().ok())
        .filter(|address: &Ipv4Addr| !address.is_loopback())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_a_function_of_the_index() {
        let first = address(3, 0, Vec::new()).unwrap();
        assert_eq!((first.bridge.as_str(), first.gateway), ("berth3", Ipv4Addr::new(10, 213, 3, 1)));
        assert_eq!(first.address, Ipv4Addr::new(10, 213, 3, 2));
        assert_eq!(address(3, 252, Vec::new()).unwrap().address, Ipv4Addr::new(10, 213, 3, 254));
        assert_eq!(address(3, 253, Vec::new()), None);
        let taken = [Ipv4Addr::new(10, 213, 3, 2), Ipv4Addr::new(10, 213, 3, 4), Ipv4Addr::new(10, 1, 1, 1)];
        assert_eq!(free_index(taken, 3), Some(1));
    }

    #[test]
    fn name_servers_of_the_loopback_are_of_no_use() {
        let text = "# x\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver ::1\nsearch x\n";
        assert_eq!(parse_name_servers(text), [Ipv4Addr::new(192, 0, 2, 1)]);
    }
}
