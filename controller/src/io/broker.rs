//! The embedded MQTT broker: rmqtt as a library on a thread of its own, and the rules of who may say and hear what.
//! Everything not allowed is denied and counted. Nothing but this module names rmqtt.
//!
//! Who a client is, its certificate says, which the `front` has seen. With `--dev` its MQTT client id tells: a node's
//! (`{node}.{nonce}`), else a user's. The controller's own connection has a password, made at each start.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use berth_protocol::ids::{ClusterName, NodeId};
use berth_protocol::limits::{NAME_BYTES_MAX, PACKET_BYTES_MAX, TOKEN_BYTES_MAX, TOPIC_SLASHES_MAX};
use berth_protocol::tls::Party;
use berth_protocol::topic::{JobTopic, NodeTopic, Topic, filter};
use rmqtt::codec::v5::SubscribeAckReason;
use rmqtt::context::ServerContext;
use rmqtt::fitter::{DefaultFitter, FitterManager};
use rmqtt::hook::{Handler, HookResult, Parameter, ReturnType, Type};
use rmqtt::net::Builder;
use rmqtt::retain::{DefaultRetainStorage, RetainStorage};
use rmqtt::server::MqttServer;
use rmqtt::types::{
    AuthResult, ConnectInfo, FitterType, Id, LastWill, ListenerConfig, PublishAclResult, Reason, Retain,
    SubscribeAclResult, TopicFilter, TopicName,
};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};

use super::front::{Front, Guests, Tls};
use super::metrics::Refusals;
use crate::config::Cidr;

/// The client id of the controller's own connection to its broker.
pub const CONTROLLER_CLIENT_ID: &str = "berth-controller";

const CONNECTIONS_MAX: usize = 20_000;
const HANDSHAKES_MAX: usize = 256;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
const SUBSCRIPTIONS_PER_CLIENT_MAX: usize = 1024;
const INFLIGHT_PER_CLIENT_MAX: u16 = 64;
/// Messages that may wait for a client: enough for the controller to hear every agent at once.
const QUEUE_PER_CLIENT_MAX: usize = 1024;
const QUEUE_OF_CONTROLLER_MAX: usize = 64 * 1024;
/// Statuses of jobs and nodes.
const RETAINED_MESSAGES_MAX: isize = 200_000;
const CLIENT_ID_BYTES_MAX: usize = NAME_BYTES_MAX + 1 + TOKEN_BYTES_MAX;
/// Workers of rmqtt's internal queues: tasks, not threads.
const TASK_WORKERS: usize = 64;
const TASK_QUEUE_MAX: usize = 32 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    #[error(
        "the embedded broker cannot listen on {address} (stop whatever does, choose another --listen-mqtt, \
         or use that broker with --broker mqtt://{address})"
    )]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("the embedded broker cannot start")]
    Thread(#[source] std::io::Error),
}

/// How to start one.
pub struct BrokerOptions {
    /// Port 0: any that is free.
    pub listen: SocketAddr,
    pub cluster: ClusterName,
    /// Whose addresses may connect, loopback apart.
    pub network: Option<Cidr>,
    /// Of the controller's own connection.
    pub password: String,
    /// None: everybody on loopback and in `network` is let in.
    pub tls: Option<Tls>,
}

/// A running broker. It ends when dropped.
pub struct Broker {
    /// Where clients connect, and where the controller's own does.
    address: SocketAddr,
    own: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Broker {
    pub fn start(options: BrokerOptions, refusals: Arc<Refusals>) -> Result<Self, BrokerError> {
        let (stop, stopped) = oneshot::channel();
        let (ready, started) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("broker".to_owned())
            .spawn(move || serve(options, refusals, &ready, stopped))
            .map_err(BrokerError::Thread)?;
        let gone = || Err(BrokerError::Thread(std::io::Error::other("its thread ended")));
        let (address, own) = started.recv().unwrap_or_else(|_| gone())?;
        Ok(Self { address, own, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the controller reaches it, in plain: on loopback where it listens everywhere.
    pub fn own_address(&self) -> SocketAddr {
        let ip = match self.own.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        SocketAddr::new(ip, self.own.port())
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(
    options: BrokerOptions,
    refusals: Arc<Refusals>,
    ready: &mpsc::Sender<Result<(SocketAddr, SocketAddr), BrokerError>>,
    stopped: oneshot::Receiver<()>,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(source) => return drop(ready.send(Err(BrokerError::Thread(source)))),
    };
    runtime.block_on(async {
        let guests = options.tls.is_some().then(Guests::default);
        let (server, own) = match server(&options, guests.clone(), refusals.clone()).await {
            Ok(started) => started,
            Err(error) => return drop(ready.send(Err(error))),
        };
        let front = match options.tls.zip(guests) {
            Some((tls, guests)) => match front(options.listen, tls, own, guests, refusals).await {
                Ok(front) => Some(front),
                Err(error) => return drop(ready.send(Err(error))),
            },
            None => None,
        };
        let address = front.as_ref().map_or(own, |(_, address)| *address);
        let _ = ready.send(Ok((address, own)));
        let served = async {
            match front {
                Some((front, _)) => front.run().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = server.run() => {}
            () = served => {}
            _ = stopped => {}
        }
    });
    runtime.shutdown_background();
}

async fn front(
    address: SocketAddr,
    tls: Tls,
    broker: SocketAddr,
    guests: Guests,
    refusals: Arc<Refusals>,
) -> Result<(Front, SocketAddr), BrokerError> {
    let listen = |source| BrokerError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    Ok((Front { listener, tls, broker, guests, refusals, places }, address))
}

/// The broker itself, behind a front on some port of loopback.
async fn server(
    options: &BrokerOptions,
    guests: Option<Guests>,
    refusals: Arc<Refusals>,
) -> Result<(MqttServer, SocketAddr), BrokerError> {
    let address = if guests.is_some() { SocketAddr::from((Ipv4Addr::LOCALHOST, 0)) } else { options.listen };
    let listen = |error: rmqtt::Error| BrokerError::Listen {
        address,
        source: error.downcast().unwrap_or_else(std::io::Error::other),
    };
    let listener = listener(address).bind().and_then(rmqtt::net::Listener::tcp).map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;

    // A busy machine is no reason to turn agents away, so rmqtt's watch over the load stays off.
    let context = ServerContext::new()
        .busy_check_enable(false)
        .task_exec_workers(TASK_WORKERS)
        .task_exec_queue_max(TASK_QUEUE_MAX)
        .build()
        .await;
    let retained = Retained { inner: DefaultRetainStorage::new(), cluster: options.cluster.clone() };
    *context.extends.retain_mut().await = Box::new(retained);
    *context.extends.fitter_mgr_mut().await = Box::new(Queues);
    let (cluster, password) = (options.cluster.clone(), options.password.clone());
    let rules = Rules { cluster, network: options.network, password, guests };
    let gate = Gate { rules: Arc::new(rules), refusals };
    let register = context.extends.hook_mgr().register();
    for hook in [
        Type::ClientAuthenticate,
        Type::MessagePublishCheckAcl,
        Type::ClientSubscribeCheckAcl,
        Type::ClientDisconnected,
        Type::MessageDropped,
    ] {
        register.add(hook, Box::new(gate.clone())).await;
    }
    register.start().await;
    Ok((MqttServer::new(context).listener_by_id(listener, 1).build(), address))
}

fn listener(address: SocketAddr) -> Builder {
    Builder::new()
        .name("mqtt")
        .laddr(address)
        .reuseaddr(Some(true))
        .nodelay(true)
        .allow_anonymous(false)
        .max_connections(CONNECTIONS_MAX)
        .max_handshaking_limit(HANDSHAKES_MAX)
        .handshake_timeout(HANDSHAKE_TIMEOUT)
        .send_timeout(SEND_TIMEOUT)
        .max_packet_size(u32::try_from(PACKET_BYTES_MAX).unwrap_or(u32::MAX))
        .max_clientid_len(CLIENT_ID_BYTES_MAX)
        .max_topic_levels(TOPIC_SLASHES_MAX + 1)
        .max_subscriptions(SUBSCRIPTIONS_PER_CLIENT_MAX)
        .max_inflight(NonZeroU16::new(INFLIGHT_PER_CLIENT_MAX).unwrap_or(NonZeroU16::MIN))
        .max_mqueue_len(QUEUE_PER_CLIENT_MAX)
        // Nobody here relies on sessions; those that ask for one do not cost memory for long.
        .max_session_expiry_interval(Duration::from_secs(60))
        .session_expiry_interval(Duration::from_secs(60))
}

/// Who is on the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Client {
    Controller,
    Node(NodeId),
    User,
}

impl Client {
    /// As it says itself.
    fn of(client_id: &str) -> Self {
        if client_id == CONTROLLER_CLIENT_ID {
            return Client::Controller;
        }
        let node = client_id.split_once('.').and_then(|(node, _)| NodeId::parse(node).ok());
        node.map_or(Client::User, Client::Node)
    }
}

/// What may be said and heard.
struct Rules {
    cluster: ClusterName,
    network: Option<Cidr>,
    password: String,
    /// None with `--dev`.
    guests: Option<Guests>,
}

impl Rules {
    /// Who it is that has been let in.
    fn client(&self, client_id: &str, from: Option<SocketAddr>) -> Option<Client> {
        let said = Client::of(client_id);
        let Some(guests) = self.guests.as_ref().filter(|_| said != Client::Controller) else {
            return Some(said);
        };
        match guests.at(from?)? {
            Party::Node(node) => Some(Client::Node(node)),
            Party::User(_) => Some(Client::User),
            Party::Controller => None,
        }
    }

    /// Whether a client may connect, and as whom.
    fn admit(&self, client_id: &str, from: Option<SocketAddr>, password: Option<&[u8]>) -> Option<Client> {
        let client = self.client(client_id, from)?;
        if client == Client::Controller {
            return (password == Some(self.password.as_bytes())).then_some(client);
        }
        if self.guests.is_some() {
            // By a node's client id nobody else connects, who would end the node's connection by it.
            let fits = match &client {
                Client::Node(_) => Client::of(client_id) == client,
                _ => true,
            };
            return fits.then_some(client);
        }
        let from = from?.ip();
        let near = from.is_loopback() || self.network.as_ref().is_some_and(|network| network.contains(from));
        near.then_some(client)
    }

    fn may_publish(&self, client: &Client, topic: &str) -> bool {
        let Some(topic) = Topic::parse(&self.cluster, topic) else { return false };
        match (client, topic) {
            (Client::Controller, _) => true,
            (Client::Node(own), Topic::Node { node, kind }) => {
                use NodeTopic::{Bye, Event, Heartbeat, Hello};
                *own == node && matches!(kind, Hello | Heartbeat | Event | Bye)
            }
            (Client::Node(_), Topic::Logs { .. }) => true,
            // With --dev a user's too, for users' clients have dots in their ids as well.
            (Client::Node(_), _) if self.guests.is_some() => false,
            (_, Topic::Job { kind, .. }) => matches!(kind, JobTopic::Submit | JobTopic::Command),
            (_, Topic::QueryRequest { .. }) => true,
            _ => false,
        }
    }

    fn may_subscribe(&self, client: &Client, filter: &str) -> bool {
        let own = match client {
            Client::Controller => return true,
            Client::Node(own) => filter::agent(&self.cluster, own).iter().any(|allowed| allowed == filter),
            Client::User => false,
        };
        if self.guests.is_some() && matches!(client, Client::Node(_)) {
            return own;
        }
        let prefix = format!("berth/v1/{}/", self.cluster);
        let below = |branch| filter.strip_prefix(&prefix).is_some_and(|rest| rest.starts_with(branch));
        // Replies are for those who know the client's name: no wildcards.
        let reply = matches!(Topic::parse(&self.cluster, filter), Some(Topic::QueryReply { .. }));
        own || reply || below("jobs/") || below("logs/") || below("state/")
    }
}

/// The rules as rmqtt's hooks.
#[derive(Clone)]
struct Gate {
    rules: Arc<Rules>,
    refusals: Arc<Refusals>,
}

impl Gate {
    fn admit(&self, connect: &ConnectInfo) -> AuthResult {
        let id: &str = connect.client_id();
        let from = connect.ipaddress();
        let Some(client) = self.rules.admit(id, from, connect.password().map(AsRef::as_ref)) else {
            let from = from.map_or_else(|| "nowhere".to_owned(), |from| from.ip().to_string());
            self.refusals.refuse("connect", format_args!("the client `{id}` from {from}"));
            return AuthResult::NotAuthorized;
        };
        let will = connect.last_will().map(|will| match will {
            LastWill::V3(will) => will.topic.clone(),
            LastWill::V5(will) => will.topic.clone(),
        });
        // rmqtt publishes a last will without asking again.
        if let Some(topic) = will.filter(|topic| !self.rules.may_publish(&client, topic)) {
            self.refusals.refuse("publish", format_args!("the client `{id}` for its last will on `{topic}`"));
            return AuthResult::NotAuthorized;
        }
        AuthResult::Allow(client == Client::Controller, None)
    }

    /// rmqtt ends the connection of whoever sends what it cannot read.
    fn count_end(&self, id: &str, reason: &Reason) {
        let error = match reason {
            Reason::MqttError(error) => error.to_string(),
            Reason::Error(error) | Reason::ProtocolError(error) => error.to_string(),
            Reason::Reasons(reasons) => return reasons.iter().for_each(|reason| self.count_end(id, reason)),
            _ => return,
        };
        // All are texts by the time they get here. A connection that broke brought nothing that could be refused.
        if error.contains("(os error ") {
            return;
        }
        let reason = if error.starts_with("Max size exceeded") { "oversized" } else { "malformed" };
        self.refusals.refuse(reason, format_args!("a packet of the client `{id}`: {error}"));
    }
}

#[async_trait]
impl Handler for Gate {
    async fn hook(&self, parameter: &Parameter, before: Option<HookResult>) -> ReturnType {
        let result = match parameter {
            Parameter::ClientAuthenticate(connect) => HookResult::AuthResult(self.admit(connect)),
            Parameter::MessagePublishCheckAcl(session, publish) => {
                let id: &str = &session.id.client_id;
                let client = self.rules.client(id, session.id.remote_addr);
                let allowed = client.is_some_and(|client| self.rules.may_publish(&client, &publish.topic));
                HookResult::PublishAclResult(if allowed {
                    PublishAclResult::allow()
                } else {
                    let topic = &publish.topic;
                    self.refusals.refuse("publish", format_args!("what the client `{id}` said on `{topic}`"));
                    PublishAclResult::rejected(false, None)
                })
            }
            Parameter::ClientSubscribeCheckAcl(session, subscribe) => {
                let id: &str = &session.id.client_id;
                let filter = &subscribe.topic_filter;
                let client = self.rules.client(id, session.id.remote_addr);
                let allowed = client.is_some_and(|client| self.rules.may_subscribe(&client, filter));
                HookResult::SubscribeAclResult(if allowed {
                    SubscribeAclResult::new_success(subscribe.opts.qos(), None)
                } else {
                    self.refusals
                        .refuse("subscribe", format_args!("to let the client `{id}` hear `{filter}`"));
                    SubscribeAclResult::new_failure(SubscribeAckReason::NotAuthorized)
                })
            }
            Parameter::ClientDisconnected(session, reason) => {
                self.count_end(&session.id.client_id, reason);
                return (true, before);
            }
            Parameter::MessageDropped(Some(to), _, publish, Reason::MessageQueueFull) => {
                let (id, topic) = (&to.client_id, &publish.topic);
                self.refusals.refuse("queue", format_args!("to keep `{topic}` for the slow client `{id}`"));
                return (true, before);
            }
            _ => return (true, before),
        };
        (false, Some(result))
    }
}

/// Gives the controller's own connection a longer queue than everybody else's.
struct Queues;

impl FitterManager for Queues {
    fn create(&self, connect: Arc<ConnectInfo>, id: Id, config: ListenerConfig) -> FitterType {
        let config = match Client::of(connect.client_id()) {
            Client::Controller => Arc::new(Builder::clone(&config).max_mqueue_len(QUEUE_OF_CONTROLLER_MAX)),
            Client::Node(_) | Client::User => config,
        };
        Arc::new(DefaultFitter::new(connect, id, config))
    }
}

/// Retains statuses, for late subscribers, and nothing else.
struct Retained {
    inner: DefaultRetainStorage,
    cluster: ClusterName,
}

#[async_trait]
impl RetainStorage for Retained {
    fn enable(&self) -> bool {
        true
    }

    fn need_sync(&self) -> bool {
        false
    }

    async fn set(&self, topic: &TopicName, retain: Retain, _: Option<Duration>) -> rmqtt::Result<()> {
        let known = matches!(
            Topic::parse(&self.cluster, topic),
            Some(Topic::Job { kind: JobTopic::Status, .. } | Topic::NodeState { .. })
        );
        let clears = retain.publish.payload.is_empty();
        if !known || (!clears && self.inner.count().await >= RETAINED_MESSAGES_MAX) {
            return Ok(());
        }
        self.inner.set_with_timeout(topic, retain, None).await
    }

    async fn get(&self, filter: &TopicFilter) -> rmqtt::Result<Vec<(TopicName, Retain)>> {
        self.inner.get_message(filter).await
    }

    async fn count(&self) -> isize {
        self.inner.count().await
    }

    async fn max(&self) -> isize {
        self.inner.max().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        let cluster = ClusterName::parse("lab").unwrap();
        let network = Some(Cidr::parse("10.1.0.0/16").unwrap());
        Rules { cluster, network, password: "secret".to_owned(), guests: None }
    }

    #[test]
    fn who_may_connect() {
        let rules = rules();
        let admit = |id, from: &str, password: Option<&str>| {
            let from = from.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, 1));
            rules.admit(id, from, password.map(str::as_bytes))
        };
        let node = || Some(Client::Node(NodeId::parse("a1").unwrap()));
        assert_eq!(admit("mosq-xyz", "127.0.0.1", None), Some(Client::User));
        assert_eq!(admit("a1.n0nce", "10.1.2.3", None), node());
        assert_eq!(admit("a1.n0nce", "10.2.0.1", None), None);
        assert_eq!(admit(CONTROLLER_CLIENT_ID, "127.0.0.1", None), None);
        assert_eq!(admit(CONTROLLER_CLIENT_ID, "127.0.0.1", Some("guess")), None);
        assert_eq!(admit(CONTROLLER_CLIENT_ID, "127.0.0.1", Some("secret")), Some(Client::Controller));
    }

    #[test]
    fn who_may_say_and_hear_what() {
        // client, topic below the cluster, may publish, may subscribe
        let table = [
            ("user", "jobs/default/j/submit", true, true),
            ("user", "jobs/default/j/command", true, true),
            ("user", "jobs/default/j/answer", false, true),
            ("user", "jobs/default/j/status", false, true),
            ("user", "jobs/+/+/status", false, true),
            ("user", "query/c1/request", true, false),
            ("user", "query/c1/reply", false, true),
            ("user", "query/+/reply", false, false),
            ("user", "query/#", false, false),
            ("user", "logs/default/j/j-0", false, true),
            ("user", "logs/default/j/+", false, true),
            ("user", "state/nodes/+", false, true),
            ("user", "state/nodes/a1", false, true),
            ("user", "nodes/a1/desired", false, false),
            ("user", "nodes/a1/hello", false, false),
            ("user", "nodes/#", false, false),
            ("user", "#", false, false),
            ("user", "jobs/default/j/nonsense", false, true),
            ("a1.x", "nodes/a1/hello", true, false),
            ("a1.x", "nodes/a1/bye", true, false),
            ("a1.x", "nodes/a1/desired", false, true),
            ("a1.x", "nodes/a1/lease", false, true),
            ("a1.x", "nodes/a2/hello", false, false),
            ("a1.x", "nodes/a2/desired", false, false),
            ("a1.x", "nodes/+/desired", false, false),
            ("a1.x", "logs/default/j/j-0", true, true),
            ("a1.x", "jobs/default/j/submit", true, true),
            ("a1.x", "jobs/default/j/status", false, true),
            (CONTROLLER_CLIENT_ID, "nodes/a1/desired", true, true),
        ];
        let rules = rules();
        for (id, topic, publish, subscribe) in table {
            let (client, topic) = (Client::of(id), format!("berth/v1/lab/{topic}"));
            assert_eq!(rules.may_publish(&client, &topic), publish, "{id} says {topic}");
            assert_eq!(rules.may_subscribe(&client, &topic), subscribe, "{id} hears {topic}");
        }
        assert!(!rules.may_publish(&Client::User, "berth/v1/other/jobs/default/j/submit"));
        assert!(!rules.may_subscribe(&Client::User, "berth/v1/other/jobs/#"));
        assert!(!rules.may_subscribe(&Client::User, "#"));
    }
}
