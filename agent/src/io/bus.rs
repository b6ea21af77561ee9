//! The broker, from an agent's side: a clean session, subscribed anew at every connection. Nothing that must arrive
//! relies on it: what is lost here is said again by those who said it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use berth_protocol::broker::BrokerUrl;
use berth_protocol::chain::chain;
use berth_protocol::codec::{self, CodecError};
use berth_protocol::ids::{NodeId, SessionNonce};
use berth_protocol::limits::PACKET_BYTES_MAX;
use berth_protocol::message::node::Bye;
use berth_protocol::sign::Signer;
use berth_protocol::topic::{NodeTopic, Topic, filter};
use rumqttc::{
    AsyncClient, Event as MqttEvent, LastWill, MqttOptions, Packet, QoS, Request, SubAck, Subscribe,
    SubscribeFilter, SubscribeReasonCode, TlsConfiguration, Transport,
};
use serde::Serialize;
use tokio::sync::mpsc;

use super::identity::Shown;

/// What the broker tells the loop.
#[derive(Debug)]
pub enum BusEvent {
    Up,
    Down,
    Message { topic: Topic, payload: Vec<u8> },
}

/// Above it a broker keeps a record of this subscriber, which members of a cluster that have lost one refuse to make anew;
/// what is lost is said again anyway.
const SUBSCRIBED: QoS = QoS::AtMostOnce;
/// Messages that may wait for the connection; more are dropped and, where they matter, sent again.
const QUEUE: usize = 512;
const KEEP_ALIVE: Duration = Duration::from_secs(20);
const RECONNECT_MIN: Duration = Duration::from_millis(200);
const RECONNECT_MAX: Duration = Duration::from_secs(10);

pub struct Bus {
    client: AsyncClient,
    signer: Signer,
    /// Connected and subscribed.
    up: Arc<AtomicBool>,
}

impl Bus {
    /// Connects in the background, again and again, for as long as the receiver lives.
    pub fn connect(
        url: &BrokerUrl,
        node: &NodeId,
        nonce: &SessionNonce,
        signer: Signer,
        shown: Option<Arc<Shown>>,
        events: mpsc::Sender<BusEvent>,
    ) -> Self {
        let bye = Topic::node(node, NodeTopic::Bye);
        let cluster = signer.cluster();
        let will = written(&signer, &bye, &Bye { nonce: nonce.clone() }).ok();
        let will = will.map(|payload| LastWill::new(bye.render(cluster), payload, QoS::AtLeastOnce, false));
        let (name, brokers) = (format!("{node}.{nonce}"), url.clone());
        // After so many attempts.
        let at = move |attempt| {
            let (host, port) = brokers.host(attempt);
            let mut options = MqttOptions::new(brokers.client_id(&name, attempt), host, *port);
            options.set_clean_session(true);
            options.set_keep_alive(KEEP_ALIVE);
            options.set_max_packet_size(PACKET_BYTES_MAX, PACKET_BYTES_MAX);
            if let Some((user, password)) = brokers.login() {
                options.set_credentials(user, password);
            }
            if let Some(will) = &will {
                options.set_last_will(will.clone());
            }
            if let Some(shown) = &shown {
                // By now it may be another one.
                let tls = TlsConfiguration::Rustls(shown.client());
                options.set_transport(Transport::tls_with_config(tls));
            }
            options
        };
        let (client, mut connection) = AsyncClient::new(at(0), QUEUE);
        let mut network = rumqttc::NetworkOptions::new();
        network.set_tcp_nodelay(true);
        connection.set_network_options(network);
        let filters = filter::agent(cluster, node);
        let up = Arc::new(AtomicBool::new(false));
        let (cluster, url) = (cluster.clone(), url.clone());
        let bus = Self { client, signer, up: up.clone() };
        tokio::spawn(async move {
            let (mut pause, mut said, mut attempt) = (RECONNECT_MIN, false, 0);
            loop {
                let event = match connection.poll().await {
                    Ok(MqttEvent::Incoming(Packet::ConnAck(_))) => {
                        if said {
                            tracing::info!("connected to the broker at {url}");
                        }
                        (pause, said) = (RECONNECT_MIN, false);
                        let filters = filters.iter().cloned();
                        let filters = filters.map(|filter| SubscribeFilter::new(filter, SUBSCRIBED));
                        // Ahead of what waits from before: the queue may be full, and must not keep this out.
                        connection.pending.push_front(Request::Subscribe(Subscribe::new_many(filters)));
                        continue;
                    }
                    // Only now do orders reach this agent.
                    Ok(MqttEvent::Incoming(Packet::SubAck(ack))) if !is_refused(&ack) => {
                        up.store(true, Ordering::Release);
                        BusEvent::Up
                    }
                    Ok(MqttEvent::Incoming(Packet::Publish(publish))) if !publish.retain => {
                        match Topic::parse(&cluster, &publish.topic) {
                            Some(topic) => BusEvent::Message { topic, payload: publish.payload.into() },
                            None => continue,
                        }
                    }
                    Ok(event) if !matches!(event, MqttEvent::Incoming(Packet::SubAck(_))) => continue,
                    trouble => {
                        // Where it is not the connection, another member of the broker's cluster may do better.
                        connection.clean();
                        if !said {
                            let why = match trouble {
                                Err(error) => format!("cannot reach the broker at {url}: {}", chain(&error)),
                                Ok(_) => format!(
                                    "the broker at {url} refuses this node its topics: its rules must allow them"
                                ),
                            };
                            tracing::warn!("{why}; trying again, pods go on");
                            said = true;
                        }
                        if up.swap(false, Ordering::AcqRel) && events.send(BusEvent::Down).await.is_err() {
                            return;
                        }
                        attempt += 1;
                        connection.mqtt_options = at(attempt);
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(RECONNECT_MAX);
                        continue;
                    }
                };
                if events.send(event).await.is_err() {
                    return;
                }
            }
        });
        bus
    }

    /// Hands a message to the connection; `false` where there is none, or too many wait for it already.
    pub fn publish<T: Serialize>(&self, topic: &Topic, message: &T) -> bool {
        // What is said into an outage is said again when it is over, and would only keep newer things waiting then.
        if !self.is_up() {
            return false;
        }
        let qos = match topic {
            Topic::Node { kind, .. } if kind.is_qos0() => QoS::AtMostOnce,
            _ => QoS::AtLeastOnce,
        };
        match written(&self.signer, topic, message) {
            Ok(payload) => {
                self.client.try_publish(topic.render(self.signer.cluster()), qos, false, payload).is_ok()
            }
            Err(error) => {
                tracing::error!("{topic} not sent: {error}");
                true
            }
        }
    }

    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// Says goodbye in order, so that the will stays unsaid.
    pub fn disconnect(&self) {
        let _ = self.client.try_disconnect();
    }
}

/// A message as it is sent: what the controller is told is signed, what users are told is not.
fn written<T: Serialize>(signer: &Signer, topic: &Topic, message: &T) -> Result<Vec<u8>, CodecError> {
    let payload = codec::encode(topic, message)?;
    match topic {
        Topic::Node { .. } => codec::sign(signer, topic, &payload),
        _ => Ok(payload),
    }
}

fn is_refused(ack: &SubAck) -> bool {
    ack.return_codes.contains(&SubscribeReasonCode::Failure)
}
