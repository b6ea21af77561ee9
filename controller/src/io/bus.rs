//! The one MQTT connection of a program: rumqttc behind a queue of events and a publish that never wedges. It knows
//! topics, bounds and signatures; what messages mean is the core's.
//!
//! Nothing that must be right may depend on it: sessions are clean, what is published while the broker is away is
//! dropped, and what arrives faster than it is taken is dropped and counted. `Up` says when to say things again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use berth_protocol::broker::BrokerUrl;
use berth_protocol::codec::{self, CodecError};
use berth_protocol::ids::ClusterName;
use berth_protocol::limits::PACKET_BYTES_MAX;
use berth_protocol::request::{self, Signed};
use berth_protocol::topic::Topic;
use rumqttc::{
    AsyncClient, ConnectionError, EventLoop, Incoming, MqttOptions, NetworkOptions, Outgoing, Publish, QoS,
    Request, StateError, Subscribe, SubscribeFilter, SubscribeReasonCode, TlsConfiguration, Transport,
};
use rustls::ClientConfig;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::metrics::Refusals;
use super::vouch::Voucher;
use crate::core::{Author, Signing};

/// Messages that may wait for the program, by number and by bytes.
const INCOMING_MESSAGES_MAX: usize = 64 * 1024;
const INCOMING_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Places kept for `Up` and `Down`: to wait for one here, while the program waits to publish, would wedge both.
const INCOMING_RESERVE: usize = 16;
/// Messages that may wait for the broker.
const OUTGOING_MESSAGES_MAX: usize = 1024;
/// A topic, its length and the packet's header.
const PUBLISH_OVERHEAD_BYTES: usize = 2 + 2 + 5;
/// Above it a broker keeps a record of each subscriber, which members of a cluster that have lost one refuse to make anew;
/// what is lost is said again anyway.
pub const SUBSCRIBED: QoS = QoS::AtMostOnce;
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT_SECS: u64 = 5;
const RECONNECT_MIN: Duration = Duration::from_millis(50);
const RECONNECT_MAX: Duration = Duration::from_secs(5);
/// While the broker stays away it is said again this often.
const UNREACHABLE_LOG_PERIOD: Duration = Duration::from_secs(60);
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// What the program hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BusEvent {
    /// Connected, and the broker has answered the subscription.
    Up,
    Down,
    Message {
        topic: Topic,
        payload: Vec<u8>,
        /// As far as it is known.
        by: Option<Author>,
    },
}

/// How to connect.
#[derive(Debug, Clone)]
pub struct BusOptions {
    pub url: BrokerUrl,
    pub cluster: ClusterName,
    pub client_id: String,
    /// Name and password.
    pub credentials: Option<(String, String)>,
    /// Whole topic filters, subscribed to after every connect.
    pub filters: Vec<String>,
    /// Whether retained messages are wanted; otherwise they are dropped.
    pub retained: bool,
    /// What to show where the URL asks for TLS.
    pub tls: Option<Arc<ClientConfig>>,
    /// Who has vouched for requests that come this way, where everyone's way in is known.
    pub voucher: Option<Voucher>,
}

impl BusOptions {
    /// How to connect to whom it is to be after so many attempts.
    fn at(&self, attempt: usize) -> MqttOptions {
        let (host, port) = self.url.host(attempt);
        let mut mqtt = MqttOptions::new(self.url.client_id(&self.client_id, attempt), host, *port);
        mqtt.set_clean_session(true)
            .set_keep_alive(KEEP_ALIVE)
            .set_max_packet_size(PACKET_BYTES_MAX, PACKET_BYTES_MAX);
        if let Some((name, password)) = self.credentials.as_ref().or(self.url.login()) {
            mqtt.set_credentials(name, password);
        }
        if let Some(tls) = self.tls.clone().filter(|_| self.url.is_tls()) {
            mqtt.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(tls)));
        }
        mqtt
    }
}

/// The sending half.
pub struct Bus {
    client: AsyncClient,
    cluster: ClusterName,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    up: AtomicBool,
    queued_bytes: AtomicUsize,
    refusals: Arc<Refusals>,
}

/// The receiving half. The connection ends when it is dropped.
pub struct BusEvents {
    queue: mpsc::Receiver<BusEvent>,
    shared: Arc<Shared>,
}

impl BusEvents {
    /// The next event; `None` once the bus has been closed. Cancel-safe.
    pub async fn next(&mut self) -> Option<BusEvent> {
        let event = self.queue.recv().await;
        self.taken(event)
    }

    /// The next event, if one waits.
    pub fn try_next(&mut self) -> Option<BusEvent> {
        let event = self.queue.try_recv().ok();
        self.taken(event)
    }

    fn taken(&self, event: Option<BusEvent>) -> Option<BusEvent> {
        if let Some(BusEvent::Message { payload, .. }) = &event {
            self.shared.queued_bytes.fetch_sub(payload.len(), Ordering::Relaxed);
        }
        event
    }
}

impl Bus {
    /// Connects in the background, now and whenever the connection is lost, until `close`. Needs a tokio runtime.
    pub fn connect(options: BusOptions, refusals: Arc<Refusals>) -> (Self, BusEvents) {
        let (client, mut connection) = AsyncClient::new(options.at(0), OUTGOING_MESSAGES_MAX);
        let mut network = NetworkOptions::new();
        network.set_tcp_nodelay(true);
        network.set_connection_timeout(CONNECT_TIMEOUT_SECS);
        connection.set_network_options(network);

        let (to, queue) = mpsc::channel(INCOMING_MESSAGES_MAX);
        let shared =
            Arc::new(Shared { up: AtomicBool::new(false), queued_bytes: AtomicUsize::new(0), refusals });
        let cluster = options.cluster.clone();
        let task = tokio::spawn(Connection { options, connection, to, shared: shared.clone() }.run());
        (Self { client, cluster, shared: shared.clone(), task }, BusEvents { queue, shared })
    }

    pub fn is_up(&self) -> bool {
        self.shared.up.load(Ordering::Relaxed)
    }

    /// Hands a message to the connection; waits only where the broker takes no more. Returns whether it was handed
    /// over: not so while the broker is away. Whether it arrives, nobody says.
    pub async fn publish(&self, topic: &Topic, payload: Vec<u8>, retain: bool) -> bool {
        if !self.is_up() {
            return false;
        }
        let name = topic.render(&self.cluster);
        if name.len() + payload.len() + PUBLISH_OVERHEAD_BYTES > PACKET_BYTES_MAX {
            self.shared.refusals.refuse(
                "oversized",
                format_args!(
                    "to publish {} bytes on {name}: a packet holds {PACKET_BYTES_MAX}",
                    payload.len()
                ),
            );
            return false;
        }
        self.client.publish(name, qos(topic), retain, payload).await.is_ok()
    }

    /// Says goodbye to the broker, behind all that was published, so that it sends no last will.
    pub async fn close(self) {
        let goodbye = async {
            if self.is_up() && self.client.disconnect().await.is_ok() {
                let _ = self.task.await;
            }
        };
        let _ = tokio::time::timeout(DISCONNECT_TIMEOUT, goodbye).await;
    }
}

fn qos(topic: &Topic) -> QoS {
    match topic {
        Topic::Node { kind, .. } if kind.is_qos0() => QoS::AtMostOnce,
        _ => QoS::AtLeastOnce,
    }
}

/// Why there is no connection that is of use.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Connection(ConnectionError),
    #[error("it refuses a subscription: its rules must allow berth's topics")]
    Refused,
}

/// The task behind a bus.
struct Connection {
    options: BusOptions,
    connection: EventLoop,
    to: mpsc::Sender<BusEvent>,
    shared: Arc<Shared>,
}

impl Connection {
    async fn run(mut self) {
        let (mut backoff, mut attempt) = (RECONNECT_MIN, 0);
        let (mut up_since, mut lost): (Option<Instant>, Option<Instant>) = (None, None);
        loop {
            let polled = tokio::select! {
                polled = self.connection.poll() => polled,
                () = self.to.closed() => return,
            };
            let polled = match polled {
                // Its rules, or a member of a cluster that is not up to it yet: another may be.
                Ok(rumqttc::Event::Incoming(Incoming::SubAck(ack)))
                    if ack.return_codes.contains(&SubscribeReasonCode::Failure) =>
                {
                    self.connection.clean();
                    Err(Trouble::Refused)
                }
                polled => polled.map_err(Trouble::Connection),
            };
            match polled {
                // `Bus::close` said goodbye.
                Ok(rumqttc::Event::Outgoing(Outgoing::Disconnect))
                | Err(Trouble::Connection(ConnectionError::RequestsDone)) => return,
                Ok(rumqttc::Event::Incoming(Incoming::ConnAck(_))) if !self.options.filters.is_empty() => {
                    self.subscribe();
                }
                Ok(rumqttc::Event::Incoming(Incoming::ConnAck(_) | Incoming::SubAck(_))) => {
                    (up_since, lost) = (Some(Instant::now()), None);
                    tracing::info!(broker = %self.options.url, "connected to the broker");
                    self.shared.up.store(true, Ordering::Relaxed);
                    if self.to.send(BusEvent::Up).await.is_err() {
                        return;
                    }
                }
                Ok(rumqttc::Event::Incoming(Incoming::Publish(publish))) => self.receive(publish),
                Ok(_) => {}
                Err(error) => {
                    self.count(&error);
                    // A connection that did not last is no reason to be quicker.
                    if up_since.take().is_some_and(|since| since.elapsed() > RECONNECT_MAX) {
                        backoff = RECONNECT_MIN;
                    }
                    let was_up = self.shared.up.swap(false, Ordering::Relaxed);
                    if was_up && self.to.send(BusEvent::Down).await.is_err() {
                        return;
                    }
                    if lost.is_none_or(|since| since.elapsed() >= UNREACHABLE_LOG_PERIOD) {
                        lost = Some(Instant::now());
                        let what = if was_up { "lost the broker" } else { "cannot reach the broker" };
                        tracing::warn!(broker = %self.options.url, %error, "{what}; trying again until it answers");
                    }
                    attempt += 1;
                    self.connection.mqtt_options = self.options.at(attempt);
                    tokio::time::sleep(backoff).await;
                    backoff = (backoff * 2).min(RECONNECT_MAX);
                }
            }
        }
    }

    /// Asks for everything anew: the session is a clean one.
    fn subscribe(&mut self) {
        let filters = self.options.filters.iter();
        let filters = filters.map(|path| SubscribeFilter { path: path.clone(), qos: SUBSCRIBED });
        self.connection.pending.push_back(Request::Subscribe(Subscribe::new_many(filters)));
    }

    fn receive(&self, publish: Publish) {
        if publish.retain && !self.options.retained {
            return;
        }
        let Some(topic) = Topic::parse(&self.options.cluster, &publish.topic) else {
            self.shared.refusals.refuse("topic", format_args!("a message on `{}`", shorten(&publish.topic)));
            return;
        };
        let (by, payload) = match self.author(&topic, &publish.payload) {
            Ok((by, Some(payload))) => (by, payload),
            Ok((by, None)) => (by, publish.payload.into()),
            Err(error) => {
                self.shared.refusals.refuse(error.kind(), format_args!("a message on `{topic}`: {error}"));
                return;
            }
        };
        let bytes = payload.len();
        let queued = self.shared.queued_bytes.load(Ordering::Relaxed) + bytes;
        if queued > INCOMING_BYTES_MAX || self.to.capacity() <= INCOMING_RESERVE {
            // Whoever sent it sends it again.
            self.shared.refusals.refuse("overload", format_args!("a message: too many wait already"));
            return;
        }
        self.shared.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        let _ = self.to.try_send(BusEvent::Message { topic, payload, by });
    }

    /// Whose message it is, and what it says where that is not all of the payload. That it is a node's own, or a user's
    /// of the cluster, only the core can tell.
    fn author(&self, topic: &Topic, payload: &[u8]) -> Result<(Option<Author>, Option<Vec<u8>>), CodecError> {
        if request::is_request(topic) {
            return self.asker(topic, payload);
        }
        let Topic::Node { .. } = topic else { return Ok((None, None)) };
        match codec::verify(&self.options.cluster, topic, payload) {
            Ok(signed) => Ok((Some(signed.by.into()), None)),
            // Its signature may be of another kind. The core says what becomes of the node.
            Err(CodecError::Version(_)) => Ok((None, None)),
            Err(error) => Err(error),
        }
    }

    fn asker(&self, topic: &Topic, payload: &[u8]) -> Result<(Option<Author>, Option<Vec<u8>>), CodecError> {
        let (vouched, plain) = match &self.options.voucher {
            None => (None, payload),
            Some(voucher) => {
                let (key, from, plain) = voucher.read(payload).ok_or(CodecError::Unsigned)?;
                (Some(Author { key, signed: None, from: Some(from) }), plain)
            }
        };
        let from = vouched.as_ref().and_then(|author| author.from);
        match request::open(&self.options.cluster, topic, plain)? {
            Some(Signed { by, at, id, body }) => {
                Ok((Some(Author { key: by, signed: Some(Signing { at, id }), from }), Some(body)))
            }
            None => Ok((vouched, self.options.voucher.is_some().then(|| plain.to_vec()))),
        }
    }

    fn count(&self, error: &Trouble) {
        let Trouble::Connection(ConnectionError::MqttState(StateError::Deserialization(error))) = error
        else {
            return;
        };
        match error {
            rumqttc::Error::PayloadSizeLimitExceeded(bytes) => self.shared.refusals.refuse(
                "oversized",
                format_args!("a packet of {bytes} bytes, at most {PACKET_BYTES_MAX} are allowed: set the broker's own limit to that"),
            ),
            rumqttc::Error::Io(_) => {}
            other => self.shared.refusals.refuse("malformed", format_args!("a packet: {other}")),
        }
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(200).collect()
}
