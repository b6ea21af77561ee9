//! A pod's network namespace: its file, its links, and the files by which programs find names. The bridge itself is
//! the daemon's.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use super::init::Init;
use super::netlink::{self, Netlink};
use super::spec;
use crate::task::{BridgeAddress, Task, file};

const LOOPBACK: u32 = 1;
/// The link in the pod, and the index that it is given.
const LINK: &str = "eth0";
const LINK_INDEX: u32 = 2;
/// Of a node, told to a pod without one of its own.
const ADDRESSES_MAX: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error(
        "the bridge {0} is not there; it is made when the agent starts, so something has removed it: restart berth-agent"
    )]
    NoBridge(String),
    #[error("the task names no address on the bridge; this is a defect of berth-agent")]
    NoAddress,
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Io { what, source }
}

/// So far the names of links are alike whose addresses are of one /24.
const LINKS_OF_A_24: usize = "bv".len() + 6;

/// The node's end of a pod's link, named for the address, which is unique on a node.
fn node_link(address: Ipv4Addr) -> String {
    format!("bv{:08x}", u32::from(address))
}

/// Is the node's end of a pod's link there, of one with an address of the gateway's /24?
pub fn has_links(gateway: Ipv4Addr) -> io::Result<bool> {
    let subnet = &node_link(gateway)[..LINKS_OF_A_24];
    Ok(nix::ifaddrs::getifaddrs()?.any(|interface| interface.interface_name.starts_with(subnet)))
}

/// Names the namespace of the pod's init by a file in the pod's directory, and wires it. Returns the file's name there.
pub fn set_up(task: &Task, dir: &Path, init: &Init) -> Result<&'static str, NetworkError> {
    let bound = dir.join(file::NETNS);
    File::create(&bound).map_err(io_error("cannot make the network namespace's file"))?;
    let source = init.namespace("net");
    mount(Some(source.as_str()), &bound, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|e| io_error("cannot name the network namespace")(e.into()))?;
    let namespace = File::open(&bound).map_err(io_error("cannot open the network namespace"))?;
    let inside = Netlink::open_in(&namespace).map_err(io_error("cannot enter the network namespace"))?;
    let mut requests = vec![netlink::set_up(LOOPBACK)];
    if task.template.network == berth_protocol::job::Network::Bridge {
        let BridgeAddress { bridge, address, prefix, gateway, .. } =
            task.network.as_ref().ok_or(NetworkError::NoAddress)?;
        let index = netlink::index(bridge).ok_or_else(|| NetworkError::NoBridge(bridge.clone()))?;
        let outside = Netlink::open().map_err(io_error("cannot open a netlink socket"))?;
        let name = node_link(*address);
        let add = || vec![netlink::add_veth(&name, index, LINK, LINK_INDEX, namespace.as_raw_fd())];
        let added = outside.send(add()).or_else(|e| match e.kind() {
            // Left by a run whose namespace is only now going away.
            io::ErrorKind::AlreadyExists => {
                let _ = outside.send(vec![netlink::delete(&name)]);
                outside.send(add())
            }
            _ => Err(e),
        });
        added.map_err(io_error("cannot make the pod's link to the bridge"))?;
        requests.extend([
            netlink::add_address(LINK_INDEX, *address, *prefix),
            netlink::set_up(LINK_INDEX),
            netlink::add_default_route(LINK_INDEX, *gateway),
        ]);
    }
    inside.send(requests).map_err(io_error("cannot set up the pod's links"))?;
    Ok(file::NETNS)
}

/// Takes away the node's end of the link; that of the pod goes with it.
pub fn clean_up(task: &Task) -> io::Result<()> {
    let Some(BridgeAddress { address, .. }) = &task.network else { return Ok(()) };
    let name = node_link(*address);
    if netlink::index(&name).is_none() {
        return Ok(());
    }
    match Netlink::open()?.send(vec![netlink::delete(&name)]) {
        Err(e) if e.raw_os_error() != Some(libc::ENODEV) => Err(e),
        _ => Ok(()),
    }
}

/// Where the pod can be reached from outside: its own address, or the node's where it has none of its own.
pub fn addresses(task: &Task) -> io::Result<Vec<IpAddr>> {
    if spec::own_network(&task.template) {
        return Ok(task.network.iter().map(|network| IpAddr::V4(network.address)).collect());
    }
    let of_interface = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    };
    let link_local = |address: &IpAddr| matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let all = nix::ifaddrs::getifaddrs()?.filter_map(of_interface);
    Ok(all.filter(|address| !address.is_loopback() && !link_local(address)).take(ADDRESSES_MAX).collect())
}

/// Writes `etc/hostname`, `etc/hosts` and `etc/resolv.conf` for the pod's containers.
pub fn write_files(task: &Task, dir: &Path) -> io::Result<()> {
    let etc = dir.join(file::ETC_DIR);
    fs::create_dir_all(&etc)?;
    let hostname = spec::hostname(task);
    let own = spec::own_network(&task.template);
    fs::write(etc.join("hostname"), format!("{hostname}\n"))?;
    let node_file = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut hosts = match own {
        true => "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n".to_owned(),
        false => node_file("/etc/hosts"),
    };
    let address = task.network.as_ref().map_or(Ipv4Addr::LOCALHOST, |network| network.address);
    // Writing to a String cannot fail.
    let _ = writeln!(hosts, "{address} {hostname}");
    fs::write(etc.join("hosts"), hosts)?;
    let resolv = match (&task.network, own) {
        (_, false) => node_file("/etc/resolv.conf"),
        (Some(network), true) => network.dns.iter().map(|server| format!("nameserver {server}\n")).collect(),
        (None, true) => String::new(),
    };
    fs::write(etc.join("resolv.conf"), resolv)
}
