//! The one MQTT connection of a program: rumqttc behind a queue of events and a publish that never wedges. It knows
//! topics, bounds and signatures; what messages mean is the core's.
//!
//! Nothing that must be right may depend on it: sessions are clean, what is published while the broker is away is
//! dropped, and what arrives faster than it is taken is dropped and counted. `Up` says when to say things again.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use berth_protocol::codec::{self, CodecError};
use berth_protocol::ids::ClusterName;
use berth_protocol::limits::PACKET_BYTES_MAX;
use berth_protocol::sign::PublicKey;
use berth_protocol::topic::Topic;
use rumqttc::{
    AsyncClient, ConnectionError, EventLoop, Incoming, MqttOptions, NetworkOptions, Outgoing, Publish, QoS,
    Request, StateError, Subscribe, SubscribeFilter, SubscribeReasonCode,
};
use tokio::sync::mpsc::{self, error::SendError};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::metrics::Refusals;

/// Messages that may wait for the program, by number and by bytes.
const INCOMING_MESSAGES_MAX: usize = 64 * 1024;
const INCOMING_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Places kept for `Up` and `Down`: to wait for one here, while the program waits to publish, would wedge both.
const INCOMING_RESERVE: usize = 16;
/// Messages that may wait for the broker.
const OUTGOING_MESSAGES_MAX: usize = 1024;
/// A topic, its length and the packet's header.
const PUBLISH_OVERHEAD_BYTES: usize = 2 + 2 + 5;
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT_SECS: u64 = 5;
const RECONNECT_MIN: Duration = Duration::from_millis(50);
const RECONNECT_MAX: Duration = Duration::from_secs(5);
/// While the broker stays away it is said again this often.
const UNREACHABLE_LOG_PERIOD: Duration = Duration::from_secs(60);
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Where a broker listens: `mqtt://HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerUrl {
    host: String,
    port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerUrlError {
    #[error("`{0}` is not a broker: write mqtt://HOST:PORT")]
    Malformed(String),
    #[error("`{0}` asks for TLS, which this version does not have yet: write mqtt://HOST:PORT")]
    Tls(String),
}

impl BrokerUrl {
    pub fn new(address: std::net::SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port() }
    }

    /// The port may be left out: 1883. IPv6 addresses stand in brackets.
    pub fn parse(text: &str) -> Result<Self, BrokerUrlError> {
        let bad = || BrokerUrlError::Malformed(text.chars().take(200).collect());
        if text.starts_with("mqtts://") {
            return Err(BrokerUrlError::Tls(text.to_owned()));
        }
        let rest = text.strip_prefix("mqtt://").ok_or_else(bad)?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = match rest.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(bad)?;
                host.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
                (host, if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or_else(bad)?) })
            }
            None => rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port))),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
        if host.is_empty() || !host.chars().all(plain) {
            return Err(bad());
        }
        let port = port.map_or(Ok(1883), str::parse).map_err(|_| bad())?;
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (open, close) = if self.host.contains(':') { ("[", "]") } else { ("", "") };
        write!(f, "mqtt://{open}{}{close}:{}", self.host, self.port)
    }
}

/// What the program hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BusEvent {
    /// Connected, and the broker has answered the subscription.
    Up,
    Down,
    Message {
        topic: Topic,
        payload: Vec<u8>,
        /// Whose signature it bears, where such a message needs one.
        by: Option<PublicKey>,
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
        let mut mqtt = MqttOptions::new(&options.client_id, &options.url.host, options.url.port);
        mqtt.set_clean_session(true)
            .set_keep_alive(KEEP_ALIVE)
            .set_max_packet_size(PACKET_BYTES_MAX, PACKET_BYTES_MAX);
        if let Some((name, password)) = &options.credentials {
            mqtt.set_credentials(name, password);
        }
        let (client, mut connection) = AsyncClient::new(mqtt, OUTGOING_MESSAGES_MAX);
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

/// The task behind a bus.
struct Connection {
    options: BusOptions,
    connection: EventLoop,
    to: mpsc::Sender<BusEvent>,
    shared: Arc<Shared>,
}

impl Connection {
    async fn run(mut self) {
        let mut backoff = RECONNECT_MIN;
        let (mut up_since, mut lost): (Option<Instant>, Option<Instant>) = (None, None);
        loop {
            let polled = tokio::select! {
                polled = self.connection.poll() => polled,
                () = self.to.closed() => return,
            };
            match polled {
                // `Bus::close` said goodbye.
                Ok(rumqttc::Event::Outgoing(Outgoing::Disconnect)) | Err(ConnectionError::RequestsDone) => {
                    return;
                }
                Ok(rumqttc::Event::Incoming(Incoming::ConnAck(_))) if !self.options.filters.is_empty() => {
                    self.subscribe();
                }
                Ok(rumqttc::Event::Incoming(ready @ (Incoming::ConnAck(_) | Incoming::SubAck(_)))) => {
                    (up_since, lost) = (Some(Instant::now()), None);
                    if self.is_ready(&ready).await.is_err() {
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
                    tokio::time::sleep(backoff).await;
                    backoff = (backoff * 2).min(RECONNECT_MAX);
                }
            }
        }
    }

    async fn is_ready(&mut self, answer: &Incoming) -> Result<(), SendError<BusEvent>> {
        let url = &self.options.url;
        if let Incoming::SubAck(ack) = answer
            && ack.return_codes.contains(&SubscribeReasonCode::Failure)
        {
            tracing::error!(broker = %url, "the broker refuses a subscription: its rules must allow berth's topics");
        }
        tracing::info!(broker = %url, "connected to the broker");
        self.shared.up.store(true, Ordering::Relaxed);
        self.to.send(BusEvent::Up).await
    }

    /// Asks for everything anew: the session is a clean one.
    fn subscribe(&mut self) {
        let filters = self.options.filters.iter();
        let filters = filters.map(|path| SubscribeFilter { path: path.clone(), qos: QoS::AtLeastOnce });
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
        let by = match self.author(&topic, &publish.payload) {
            Ok(by) => by,
            Err(error) => {
                self.shared.refusals.refuse(error.kind(), format_args!("a message on `{topic}`: {error}"));
                return;
            }
        };
        let bytes = publish.payload.len();
        let queued = self.shared.queued_bytes.load(Ordering::Relaxed) + bytes;
        if queued > INCOMING_BYTES_MAX || self.to.capacity() <= INCOMING_RESERVE {
            // Whoever sent it sends it again.
            self.shared.refusals.refuse("overload", format_args!("a message: too many wait already"));
            return;
        }
        self.shared.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        let _ = self.to.try_send(BusEvent::Message { topic, payload: publish.payload.into(), by });
    }

    /// Whose message it is. That it is a node's own, only the core can tell.
    fn author(&self, topic: &Topic, payload: &[u8]) -> Result<Option<PublicKey>, CodecError> {
        let Topic::Node { .. } = topic else { return Ok(None) };
        match codec::verify(&self.options.cluster, topic, payload) {
            Ok(author) => Ok(Some(author.key)),
            // Its signature may be of another kind. The core says what becomes of the node.
            Err(CodecError::Version(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn count(&self, error: &ConnectionError) {
        let ConnectionError::MqttState(StateError::Deserialization(error)) = error else { return };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        for (text, printed) in [
            ("mqtt://127.0.0.1:1883", "mqtt://127.0.0.1:1883"),
            ("mqtt://broker", "mqtt://broker:1883"),
            ("mqtt://[::1]:1884/", "mqtt://[::1]:1884"),
            ("mqtt://[::1]", "mqtt://[::1]:1883"),
        ] {
            assert_eq!(BrokerUrl::parse(text).unwrap().to_string(), printed, "{text}");
        }
        for bad in
            ["", "broker", "mqtt://", "mqtt://:1", "mqtt://a:b", "mqtt://a:70000", "http://a", "mqtt://u@a"]
        {
            assert_eq!(BrokerUrl::parse(bad), Err(BrokerUrlError::Malformed(bad.to_owned())));
        }
        assert!(matches!(BrokerUrl::parse("mqtts://a:8883"), Err(BrokerUrlError::Tls(_))));
    }
}
