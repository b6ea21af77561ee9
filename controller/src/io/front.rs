//! TLS in front of the embedded broker, which speaks plain MQTT on loopback behind it: rmqtt's own would bring a second
//! cryptography library along, and TLS 1.2. The broker is told who is at the other end by the port of the connection
//! that is made for it here.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_protocol::ids::Namespace;
use berth_protocol::join::Role;
use berth_protocol::tls::Peer;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::members::Members;
use super::metrics::Refusals;
use super::vouch::Voucher;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes under way at once; with one more the oldest ends. Who does not go on keeps nobody out.
const HANDSHAKES_MAX: usize = 4096;
/// Each way of each connection.
const BUFFER_BYTES: usize = 2 * 1024;

/// How clients show who they are.
#[derive(Clone)]
pub struct Tls {
    pub config: Arc<ServerConfig>,
    pub members: Arc<Members>,
    /// Of what they ask for.
    pub voucher: Voucher,
}

/// Who is behind each connection to the broker, by its address on loopback.
#[derive(Clone)]
pub struct Guests {
    at: Arc<Mutex<BTreeMap<SocketAddr, (Peer, IpAddr)>>>,
    members: Arc<Members>,
    voucher: Voucher,
}

impl Guests {
    pub fn new(tls: &Tls) -> Self {
        Self { at: Arc::default(), members: tls.members.clone(), voucher: tls.voucher.clone() }
    }

    pub fn voucher(&self) -> &Voucher {
        &self.voucher
    }

    /// Who it is, and from where.
    pub fn at(&self, address: SocketAddr) -> Option<(Peer, IpAddr)> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner).get(&address).cloned()
    }

    pub fn is_admin(&self, peer: &Peer) -> bool {
        self.members.is_admin(peer)
    }

    pub fn role(&self, peer: &Peer, namespace: &Namespace) -> Option<Role> {
        self.members.role(peer, namespace)
    }

    fn enter(&self, address: SocketAddr, peer: Peer, from: IpAddr) -> Guest {
        self.at.lock().unwrap_or_else(PoisonError::into_inner).insert(address, (peer, from));
        Guest { guests: self.clone(), address }
    }
}

/// One of them, as long as its connection lasts.
struct Guest {
    guests: Guests,
    address: SocketAddr,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.guests.at.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.address);
    }
}

pub struct Front {
    pub listener: TcpListener,
    pub tls: Tls,
    /// Where the broker listens.
    pub broker: SocketAddr,
    pub guests: Guests,
    pub refusals: Arc<Refusals>,
    /// Connections at once.
    pub places: Arc<Semaphore>,
}

impl Front {
    /// Serves until dropped.
    pub async fn run(self) {
        let front = Arc::new(self);
        let mut handshakes: VecDeque<AbortHandle> = VecDeque::new();
        loop {
            match front.listener.accept().await {
                Ok((stream, from)) => {
                    handshakes.push_back(tokio::spawn(front.clone().admit(stream, from)).abort_handle());
                    while handshakes.front().is_some_and(AbortHandle::is_finished) {
                        handshakes.pop_front();
                    }
                    if handshakes.len() > HANDSHAKES_MAX
                        && let Some(oldest) = handshakes.pop_front()
                    {
                        oldest.abort();
                    }
                }
                Err(error) => {
                    // Out of file descriptors, as a rule: wait for some to come back.
                    tracing::warn!(%error, "cannot accept an MQTT connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Lets a member through to the broker, in a task of its own.
    async fn admit(self: Arc<Self>, stream: TcpStream, from: SocketAddr) {
        let _ = stream.set_nodelay(true);
        let accepted = TlsAcceptor::from(self.tls.config.clone()).accept(stream);
        let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, accepted).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                self.refusals.refuse("tls", format_args!("the TLS handshake of {}: {error}", from.ip()));
                return;
            }
            Err(_) => return,
        };
        let Some(peer) = peer(&stream).filter(|peer| self.tls.members.knows(peer)) else {
            let who = peer(&stream).map_or_else(|| "nobody".to_owned(), |peer| peer.party.to_string());
            self.refusals.refuse(
                "stranger",
                format_args!(
                    "{} from {}: its certificate is the cluster's, and it does not belong to it any more",
                    who,
                    from.ip()
                ),
            );
            return;
        };
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            self.refusals.refuse("connections", format_args!("{}: too many are connected", peer.party));
            return;
        };
        tokio::spawn(async move {
            // One that breaks off is no news: the broker says what it was told.
            let _ = self.relay(stream, &peer, from.ip()).await;
            drop(place);
        });
    }

    async fn relay(&self, mut stream: TlsStream<TcpStream>, peer: &Peer, from: IpAddr) -> io::Result<()> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let _guest = self.guests.enter(socket.local_addr()?, peer.clone(), from);
        let mut broker = socket.connect(self.broker).await?;
        broker.set_nodelay(true)?;
        let copied =
            tokio::io::copy_bidirectional_with_sizes(&mut stream, &mut broker, BUFFER_BYTES, BUFFER_BYTES);
        tokio::select! {
            copied = copied => copied.map(drop),
            () = self.tls.members.until_changed(peer) => Ok(()),
        }
    }
}

/// Who is at the other end of a connection that its certificate was asked for.
pub fn peer(stream: &TlsStream<TcpStream>) -> Option<Peer> {
    Peer::of(stream.get_ref().1.peer_certificates()?.first()?)
}
