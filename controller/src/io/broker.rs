//! The embedded MQTT broker: rmqtt as a library on a thread of its own, and the rules of who may say and hear what.
//! Everything not allowed is denied and counted. Nothing but this module names rmqtt.
//!
//! Who a client is, its certificate says, which the `front` has seen. With `--dev` its MQTT client id tells: a node's
//! (`{node}.{nonce}`), else a user's. The controller's own connection has a password, made at each start.

mod rules;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use berth_protocol::ids::ClusterName;
use berth_protocol::limits::{NAME_BYTES_MAX, PACKET_BYTES_MAX, TOKEN_BYTES_MAX, TOPIC_SLASHES_MAX};
use berth_protocol::request;
use berth_protocol::topic::{JobTopic, Topic};
use rmqtt::codec::v5::SubscribeAckReason;
use rmqtt::context::ServerContext;
use rmqtt::fitter::{DefaultFitter, FitterManager};
use rmqtt::hook::{Handler, HookResult, Parameter, ReturnType, Type};
use rmqtt::net::Builder;
use rmqtt::retain::{DefaultRetainStorage, RetainStorage};
use rmqtt::server::MqttServer;
use rmqtt::types::{
    AuthResult, ConnectInfo, FitterType, Id, LastWill, ListenerConfig, Publish, PublishAclResult, Reason,
    Retain, SubscribeAclResult, TopicFilter, TopicName,
};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};

use self::rules::{Client, Rules};
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
        let guests = options.tls.as_ref().map(Guests::new);
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
        Type::MessagePublish,
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

    /// A request with word of who makes it, where clients are known.
    fn vouched(&self, from: Option<SocketAddr>, publish: &Publish) -> Option<Publish> {
        Topic::parse(&self.rules.cluster, &publish.topic).filter(request::is_request)?;
        let guests = self.rules.guests.as_ref()?;
        let (peer, from) = guests.at(from?)?;
        let payload = guests.voucher().vouch(&peer.key, from, &publish.payload);
        let mut publish = publish.clone();
        publish.inner.payload = payload.into();
        Some(publish)
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
            Parameter::MessagePublish(Some(session), _, publish) => {
                let Some(publish) = self.vouched(session.id.remote_addr, publish) else {
                    return (true, before);
                };
                HookResult::Publish(publish)
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
            Client::Node(_) | Client::User(_) => config,
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
