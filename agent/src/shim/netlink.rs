//! Links, addresses and routes by rtnetlink, some requests in one packet; no policy, no processes.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, RawFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sched::{CloneFlags, setns};

const REPLY_BYTES_MAX: usize = 8 * 1024;

/// A socket to the kernel, bound to the network namespace in which it was opened.
pub struct Netlink(Socket);

pub type Request = (RouteNetlinkMessage, u16);

impl Netlink {
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// In another network namespace; the calling thread, which must be the only one, visits it for a moment.
    pub fn open_in(namespace: &impl AsFd) -> io::Result<Self> {
        let own = std::fs::File::open("/proc/self/ns/net")?;
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
        let opened = Self::open();
        // Not to come back would put all that follows into the wrong namespace.
        setns(own.as_fd(), CloneFlags::CLONE_NEWNET)?;
        opened
    }

    /// Sends all requests at once; the first that fails is the error.
    pub fn send(&self, requests: Vec<Request>) -> io::Result<()> {
        let count = requests.len();
        let mut packet = Vec::new();
        for (sequence, (request, flags)) in requests.into_iter().enumerate() {
            let mut message = NetlinkMessage::from(request);
            message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
            message.header.sequence_number = sequence as u32 + 1;
            message.finalize();
            let start = packet.len();
            packet.resize(start + message.buffer_len().next_multiple_of(4), 0);
            message.serialize(&mut packet[start..]);
        }
        self.0.send(&packet, 0)?;
        let mut first = Ok(());
        let mut answered = 0;
        while answered < count {
            let mut reply = Vec::with_capacity(REPLY_BYTES_MAX);
            self.0.recv(&mut reply, 0)?;
            let mut rest = &reply[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|e| io::Error::other(e.to_string()))?;
                let length = (message.header.length as usize).next_multiple_of(4).max(4);
                rest = rest.get(length..).unwrap_or_default();
                if let NetlinkPayload::Error(error) = message.payload {
                    answered += 1;
                    if error.code.is_some() && first.is_ok() {
                        first = Err(error.to_io());
                    }
                }
            }
        }
        first
    }
}

const CREATE: u16 = NLM_F_CREATE | NLM_F_EXCL;

/// A pair of links: `name` here, up and on the bridge; `peer` with index `peer_index` in `namespace`.
pub fn add_veth(name: &str, bridge: u32, peer: &str, peer_index: u32, namespace: RawFd) -> Request {
    let mut other = LinkMessage::default();
    other.header.index = peer_index;
    other.attributes = vec![LinkAttribute::IfName(peer.to_owned()), LinkAttribute::NetNsFd(namespace)];
    let mut link = LinkMessage::default();
    link.header.flags = LinkFlags::Up;
    link.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Controller(bridge),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
        ]),
    ];
    (RouteNetlinkMessage::NewLink(link), CREATE)
}

pub fn add_bridge(name: &str) -> Request {
    let mut link = LinkMessage::default();
    link.header.flags = LinkFlags::Up;
    link.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
    ];
    (RouteNetlinkMessage::NewLink(link), CREATE)
}

pub fn set_up(index: u32) -> Request {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    (RouteNetlinkMessage::SetLink(link), 0)
}

pub fn delete(name: &str) -> Request {
    let mut link = LinkMessage::default();
    link.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    (RouteNetlinkMessage::DelLink(link), 0)
}

pub fn add_address(index: u32, address: Ipv4Addr, prefix: u8) -> Request {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = prefix;
    message.header.index = index;
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    message.attributes = vec![
        AddressAttribute::Local(IpAddr::V4(address)),
        AddressAttribute::Address(IpAddr::V4(address)),
        AddressAttribute::Broadcast(Ipv4Addr::from(u32::from(address) | !mask)),
    ];
    (RouteNetlinkMessage::NewAddress(message), CREATE)
}

pub fn add_default_route(index: u32, gateway: Ipv4Addr) -> Request {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: AddressFamily::Inet,
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Boot,
        scope: RouteScope::Universe,
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    };
    message.attributes =
        vec![RouteAttribute::Gateway(RouteAddress::Inet(gateway)), RouteAttribute::Oif(index)];
    (RouteNetlinkMessage::NewRoute(message), CREATE)
}

/// The index of a link in the caller's network namespace.
pub fn index(name: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(name).ok()
}
