//! The client's session with the broker: one MQTT connection, made again where it breaks, and questions over it.
//!
//! Nothing sent is taken for received: whoever asks asks again until there is an answer.

use std::collections::VecDeque;
use std::io::Read as _;
use std::time::Duration;

use anyhow::{Context as _, bail};
use berth_protocol::broker::BrokerUrl;
use berth_protocol::codec;
use berth_protocol::ids::{ClientId, ClusterName, RequestId};
use berth_protocol::limits::PACKET_BYTES_MAX;
use berth_protocol::message::query::{Page, Query, QueryReply, QueryRequest};
use berth_protocol::request;
use berth_protocol::topic::{Topic, filter};
use berth_protocol::units::Millis;
use rumqttc::{
    AsyncClient, ConnectReturnCode, ConnectionError, Event, EventLoop, MqttOptions, NetworkOptions, Outgoing,
    Packet, QoS, SubscribeFilter, SubscribeReasonCode, TlsConfiguration, Transport,
};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::config::Settings;
use crate::io::bus::SUBSCRIBED;

/// Requests on their way to the socket; more than any verb has under way.
const REQUESTS_MAX: usize = 64;
/// Messages that a verb has not looked at yet; beyond, the broker has to wait.
const UNREAD_MAX: usize = 4096;
const KEEP_ALIVE: Duration = Duration::from_secs(60);
const RECONNECT_MIN: Duration = Duration::from_millis(100);
const RECONNECT_MAX: Duration = Duration::from_secs(2);
/// A submit or a command is sent again after the first, doubling to the last; a question, which changes nothing,
/// after the second already.
pub const RESEND_MIN: Duration = Duration::from_secs(2);
pub const ASK_AGAIN_MIN: Duration = Duration::from_millis(500);
const RESEND_MAX: Duration = Duration::from_secs(30);

/// Something that came on one of our topics.
#[derive(Debug)]
pub struct Message {
    pub topic: Topic,
    pub payload: Vec<u8>,
    /// From the broker's memory, so possibly old.
    pub retained: bool,
}

/// What a session tells its verb.
#[derive(Debug)]
pub enum News {
    Message(Message),
    Reply(QueryReply),
    /// The connection broke and is back: whatever was published in between is missed.
    Reconnected,
}

/// What the polling task tells the session.
enum Wire {
    Up,
    Subscribed { refused: bool },
    Down(ConnectionError),
    Publish { topic: String, payload: Vec<u8>, retained: bool },
}

pub struct Session {
    client: AsyncClient,
    wire: mpsc::Receiver<Wire>,
    poller: tokio::task::JoinHandle<()>,
    /// Came while somebody waited for something else.
    deferred: VecDeque<News>,
    filters: Vec<String>,
    pub settings: Settings,
    id: ClientId,
    asked: u64,
    down: bool,
}

/// The controller's `error` in reply to a question.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    pub code: String,
    pub message: String,
}

/// Nobody has answered for as long as the settings say; whoever has the time may ask again.
#[derive(Debug, thiserror::Error)]
#[error(
    "no answer from the controller of cluster `{cluster}` through {broker} for {patience}; is berth-controller running?"
)]
pub struct NoAnswer {
    cluster: ClusterName,
    broker: BrokerUrl,
    patience: Millis,
}

impl Session {
    /// Connects and subscribes to the replies and to `filters`; tries for the settings' request timeout.
    pub async fn open(settings: &Settings, mut filters: Vec<String>) -> anyhow::Result<Self> {
        let id = ClientId::parse(&format!("cli-{:016x}", random()?))?;
        filters.push(filter::replies(&settings.cluster, &id));
        let (url, name) = (settings.broker.clone(), id.clone());
        let tls = url.is_tls().then(|| settings.tls()).transpose()?;
        let at = move |attempt| {
            let (host, port) = url.host(attempt);
            let mut options = MqttOptions::new(url.client_id(name.as_str(), attempt), host, *port);
            options.set_keep_alive(KEEP_ALIVE).set_max_packet_size(PACKET_BYTES_MAX, PACKET_BYTES_MAX);
            if let Some((user, password)) = url.login() {
                options.set_credentials(user, password);
            }
            if let Some(tls) = tls.clone() {
                options.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(tls)));
            }
            options
        };
        let (client, mut eventloop) = AsyncClient::new(at(0), REQUESTS_MAX);
        let mut network = NetworkOptions::new();
        network.set_tcp_nodelay(true);
        eventloop.set_network_options(network);
        let (tx, wire) = mpsc::channel(UNREAD_MAX);
        let poller = tokio::spawn(poll(eventloop, at, tx));
        let mut session = Self {
            client,
            wire,
            poller,
            deferred: VecDeque::new(),
            filters,
            settings: settings.clone(),
            id,
            asked: 0,
            down: false,
        };
        session.first_connection().await?;
        Ok(session)
    }

    async fn first_connection(&mut self) -> anyhow::Result<()> {
        let patience = self.settings.request_timeout;
        let deadline = Instant::now() + patience;
        let url = self.settings.broker.to_string();
        let alone = self.settings.broker.hosts().len() == 1;
        let mut told = false;
        loop {
            let wire = match timeout_at(deadline, self.wire.recv()).await {
                Ok(Some(wire)) => wire,
                Ok(None) => bail!("the connection to the broker at {url} has ended"),
                Err(_) => bail!("the broker at {url} could not be reached for {}", in_words(patience)),
            };
            match wire {
                Wire::Up => self.subscribe()?,
                Wire::Subscribed { refused: false } => return Ok(()),
                Wire::Subscribed { refused: true } if alone => match &self.settings.identity {
                    Some(_) => bail!(
                        "the broker at {url} does not let you hear of this: have you a role in namespace {}? \
                             `berth user list` says which you have, an admin gives you one",
                        self.settings.namespace
                    ),
                    None => bail!("the broker at {url} does not let this client subscribe to its topics"),
                },
                Wire::Subscribed { refused: true } => {}
                Wire::Down(ConnectionError::ConnectionRefused(
                    code @ (ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized),
                )) => bail!("the broker at {url} does not let this client in: {code:?}"),
                Wire::Down(error) if !told => {
                    told = true;
                    let why = connection_error(&error);
                    eprintln!(
                        "berth: cannot reach the broker at {url}: {why}; is berth-controller running? \
                         retrying for {}",
                        in_words(patience)
                    );
                }
                Wire::Down(_) => {}
                Wire::Publish { topic, payload, retained } => self.defer(&topic, payload, retained),
            }
        }
    }

    fn subscribe(&mut self) -> anyhow::Result<()> {
        let filters = self.filters.iter().map(|filter| SubscribeFilter::new(filter.clone(), SUBSCRIBED));
        self.client.try_subscribe_many(filters.collect::<Vec<_>>()).context("cannot subscribe")
    }

    fn parse(&self, topic: &str, payload: Vec<u8>, retained: bool) -> Option<News> {
        let topic = Topic::parse(&self.settings.cluster, topic)?;
        if let Topic::QueryReply { client } = &topic {
            let reply = codec::decode(&topic, &payload).ok().filter(|_| *client == self.id)?;
            return Some(News::Reply(reply));
        }
        Some(News::Message(Message { topic, payload, retained }))
    }

    fn defer(&mut self, topic: &str, payload: Vec<u8>, retained: bool) {
        let news = self.parse(topic, payload, retained);
        self.deferred.extend(news);
    }

    /// The next thing that happens; may be dropped and called again without a loss.
    pub async fn next(&mut self) -> anyhow::Result<News> {
        match self.deferred.pop_front() {
            Some(news) => Ok(news),
            None => self.next_from_wire().await,
        }
    }

    async fn next_from_wire(&mut self) -> anyhow::Result<News> {
        loop {
            match self.wire.recv().await.context("the connection to the broker has ended")? {
                Wire::Up => self.subscribe()?,
                Wire::Subscribed { refused: false } if self.down => {
                    self.down = false;
                    eprintln!("berth: the broker is back");
                    return Ok(News::Reconnected);
                }
                Wire::Subscribed { .. } => {}
                Wire::Down(error) if !self.down => {
                    self.down = true;
                    let url = &self.settings.broker;
                    eprintln!("berth: lost the broker at {url}: {}; reconnecting", connection_error(&error));
                }
                Wire::Down(_) => {}
                Wire::Publish { topic, payload, retained } => {
                    if let Some(news) = self.parse(&topic, payload, retained) {
                        return Ok(news);
                    }
                }
            }
        }
    }

    /// What came while somebody waited for something else, and was not looked at yet.
    pub fn held(&self) -> impl Iterator<Item = &News> {
        self.deferred.iter()
    }

    /// Waits until `deadline` for news in which `find` finds something; the rest is kept for `next`.
    pub async fn hear_until<T>(
        &mut self,
        deadline: Instant,
        find: impl Fn(&News) -> Option<T>,
    ) -> anyhow::Result<Option<T>> {
        while let Ok(news) = timeout_at(deadline, self.next_from_wire()).await {
            let news = news?;
            if let Some(found) = find(&news) {
                return Ok(Some(found));
            }
            self.deferred.push_back(news);
        }
        Ok(None)
    }

    /// The connection is broken: what is published now would wait in line, and the line is short.
    pub fn is_down(&self) -> bool {
        self.down
    }

    /// Publishes `payload`, signed where there is a key for it, at least once where the connection holds.
    pub fn publish(&self, topic: &Topic, payload: Vec<u8>) -> anyhow::Result<()> {
        let payload = match &self.settings.identity {
            Some(identity) if request::is_request(topic) => {
                identity.sign(topic, crate::io::clock::now().wall, &payload)?
            }
            _ => payload,
        };
        let topic = topic.render(&self.settings.cluster);
        self.client.try_publish(topic, QoS::AtLeastOnce, false, payload).context("cannot publish")
    }

    /// A fresh id for a question or a command.
    pub fn request_id(&mut self) -> anyhow::Result<RequestId> {
        self.asked += 1;
        Ok(RequestId::parse(&format!("{}-{}", self.id, self.asked))?)
    }

    /// Sends a question; its reply comes as `News::Reply`, if it comes.
    pub fn ask(&mut self, query: &Query) -> anyhow::Result<RequestId> {
        let id = self.request_id()?;
        let topic = Topic::QueryRequest { client: self.id.clone() };
        let payload = codec::encode(&topic, &QueryRequest { id: id.clone(), query: query.clone() })?;
        self.publish(&topic, payload)?;
        Ok(id)
    }

    /// Asks until answered, for the settings' request timeout.
    pub async fn query(&mut self, query: Query) -> anyhow::Result<Value> {
        let patience = self.settings.request_timeout;
        let mut again = Resend::new(ASK_AGAIN_MIN, patience);
        let mut ids = Vec::new();
        loop {
            if !self.is_down() {
                ids.push(self.ask(&query)?);
            }
            let heard = self
                .hear_until(again.next(), |news| match news {
                    News::Reply(reply) if ids.contains(&reply.id) => Some(Some(reply.clone())),
                    News::Reconnected => Some(None),
                    _ => None,
                })
                .await?;
            match heard {
                Some(Some(reply)) => return result(reply),
                // Asked anew at once; who listens next has missed something all the same.
                Some(None) => self.deferred.push_back(News::Reconnected),
                None => {}
            }
            if again.is_over() {
                return Err(self.no_answer(patience));
            }
        }
    }

    /// All rows of a paged query, which is made anew for each page.
    pub async fn pages(&mut self, query: impl Fn(Option<String>) -> Query) -> anyhow::Result<Vec<Value>> {
        let mut rows = Vec::new();
        let mut after = None;
        loop {
            let value = self.query(query(after.clone())).await?;
            let page: Page<Value> =
                serde_json::from_value(value).context("the controller's reply is not a page")?;
            rows.extend(page.rows);
            if let Some(notice) = page.notice.filter(|_| after.is_none()) {
                eprintln!("berth: {notice}");
            }
            if page.next.is_none() || page.next == after {
                return Ok(rows);
            }
            after = page.next;
        }
    }

    pub fn no_answer(&self, patience: Duration) -> anyhow::Error {
        let Settings { cluster, broker, .. } = self.settings.clone();
        NoAnswer { cluster, broker, patience: millis(patience) }.into()
    }

    /// Says goodbye, without waiting for anybody.
    pub async fn close(self) {
        if self.client.try_disconnect().is_ok() {
            // The poller ends once the farewell is written; a broker that does not read cannot hold us.
            let _ = tokio::time::timeout(Duration::from_millis(100), self.poller).await;
        }
    }
}

/// The value of a reply, or its error.
pub fn result(reply: QueryReply) -> anyhow::Result<Value> {
    match (reply.result, reply.error) {
        (_, Some(error)) => Err(Refused { code: error.code, message: error.message }.into()),
        (Some(value), None) => Ok(value),
        (None, None) => bail!("the controller's reply holds neither a result nor an error"),
    }
}

/// When to send again, and when to give up.
pub struct Resend {
    pause: Duration,
    deadline: Instant,
}

impl Resend {
    /// Beginning with `pause`, for `patience` in all.
    pub fn new(pause: Duration, patience: Duration) -> Self {
        Self { pause, deadline: Instant::now() + patience }
    }

    /// The moment up to which to wait for an answer.
    pub fn next(&mut self) -> Instant {
        let until = (Instant::now() + self.pause).min(self.deadline);
        self.pause = (self.pause * 2).min(RESEND_MAX);
        until
    }

    pub fn is_over(&self) -> bool {
        Instant::now() >= self.deadline
    }
}

/// `at`: how to connect after so many attempts.
async fn poll(mut eventloop: EventLoop, at: impl Fn(usize) -> MqttOptions, tx: mpsc::Sender<Wire>) {
    let (mut pause, mut attempt) = (RECONNECT_MIN, 0);
    loop {
        let wire = match eventloop.poll().await {
            Ok(Event::Incoming(Packet::ConnAck(_))) => {
                pause = RECONNECT_MIN;
                Wire::Up
            }
            Ok(Event::Incoming(Packet::SubAck(ack))) => {
                let refused = ack.return_codes.contains(&SubscribeReasonCode::Failure);
                if refused {
                    // Another member of its cluster may be up to it.
                    eventloop.clean();
                }
                Wire::Subscribed { refused }
            }
            Ok(Event::Incoming(Packet::Publish(publish))) => Wire::Publish {
                topic: publish.topic,
                payload: publish.payload.to_vec(),
                retained: publish.retain,
            },
            Ok(Event::Outgoing(Outgoing::Disconnect)) => return,
            Ok(_) => continue,
            Err(error) => Wire::Down(error),
        };
        let broken = matches!(wire, Wire::Down(_) | Wire::Subscribed { refused: true });
        if tx.send(wire).await.is_err() {
            return;
        }
        if broken {
            attempt += 1;
            eventloop.mqtt_options = at(attempt);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RECONNECT_MAX);
        }
    }
}

fn connection_error(error: &ConnectionError) -> String {
    match error {
        ConnectionError::Io(error) if error.raw_os_error().is_some() => error.kind().to_string(),
        ConnectionError::Io(error) => error.to_string(),
        ConnectionError::NetworkTimeout => "no answer in 5 s".into(),
        ConnectionError::MqttState(rumqttc::StateError::Io(error)) => error.kind().to_string(),
        other => other.to_string(),
    }
}

pub fn millis(span: Duration) -> Millis {
    Millis(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
}

pub fn in_words(span: Duration) -> String {
    millis(span).to_string()
}

/// Eight bytes of the kernel's: names must differ between clients, nothing more.
pub fn random() -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("no randomness")?;
    Ok(u64::from_ne_bytes(bytes))
}
