//! The broker, from an agent's side: a clean session, subscribed anew at every connection. Nothing that must arrive
//! relies on it: what is lost here is said again by those who said it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use berth_protocol::codec::{self, CodecError};
use berth_protocol::ids::{NodeId, SessionNonce};
use berth_protocol::limits::PACKET_BYTES_MAX;
use berth_protocol::message::node::Bye;
use berth_protocol::sign::Signer;
use berth_protocol::topic::{NodeTopic, Topic, filter};
use rumqttc::{
    AsyncClient, ConnectionError, Event as MqttEvent, LastWill, MqttOptions, Packet, QoS, Request, Subscribe,
    SubscribeFilter,
};
use serde::Serialize;
use tokio::sync::mpsc;

/// What the broker tells the loop.
#[derive(Debug)]
pub enum BusEvent {
    Up,
    Down,
    Message { topic: Topic, payload: Vec<u8> },
}

#[derive(Debug, thiserror::Error)]
pub enum BrokerUrlError {
    #[error("`{0}` asks for TLS, which this version does not have yet: write mqtt://HOST:PORT")]
    Tls(String),
    #[error("`{0}` is not a broker's address: write mqtt://HOST:PORT")]
    Malformed(String),
}

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

/// Host and port of `mqtt://HOST:PORT`.
pub fn parse_url(url: &str) -> Result<(String, u16), BrokerUrlError> {
    if url.starts_with("mqtts://") {
        return Err(BrokerUrlError::Tls(url.to_owned()));
    }
    let wrong = || BrokerUrlError::Malformed(url.to_owned());
    let rest = url.strip_prefix("mqtt://").ok_or_else(wrong)?.trim_end_matches('/');
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().map_err(|_| wrong())?),
        None => (rest, 1883),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() { Err(wrong()) } else { Ok((host.to_owned(), port)) }
}

impl Bus {
    /// Connects in the background, again and again, for as long as the receiver lives.
    pub fn connect(
        url: &str,
        node: &NodeId,
        nonce: &SessionNonce,
        signer: Signer,
        events: mpsc::Sender<BusEvent>,
    ) -> Result<Self, BrokerUrlError> {
        let (host, port) = parse_url(url)?;
        let mut options = MqttOptions::new(format!("{node}.{nonce}"), host, port);
        options.set_clean_session(true);
        options.set_keep_alive(KEEP_ALIVE);
        options.set_max_packet_size(PACKET_BYTES_MAX, PACKET_BYTES_MAX);
        let bye = Topic::node(node, NodeTopic::Bye);
        let cluster = signer.cluster();
        if let Ok(payload) = written(&signer, &bye, &Bye { nonce: nonce.clone() }) {
            options.set_last_will(LastWill::new(bye.render(cluster), payload, QoS::AtLeastOnce, false));
        }
        let (client, mut connection) = AsyncClient::new(options, QUEUE);
        let mut network = rumqttc::NetworkOptions::new();
        network.set_tcp_nodelay(true);
        connection.set_network_options(network);
        let filters = filter::agent(cluster, node);
        let up = Arc::new(AtomicBool::new(false));
        let (cluster, url) = (cluster.clone(), url.to_owned());
        let bus = Self { client, signer, up: up.clone() };
        tokio::spawn(async move {
            let (mut pause, mut said) = (RECONNECT_MIN, false);
            loop {
                let event = match connection.poll().await {
                    Ok(MqttEvent::Incoming(Packet::ConnAck(_))) => {
                        if said {
                            tracing::info!("connected to the broker at {url}");
                        }
                        (pause, said) = (RECONNECT_MIN, false);
                        let filters = filters.iter().cloned();
                        let filters = filters.map(|filter| SubscribeFilter::new(filter, QoS::AtLeastOnce));
                        // Ahead of what waits from before: the queue may be full, and must not keep this out.
                        connection.pending.push_front(Request::Subscribe(Subscribe::new_many(filters)));
                        continue;
                    }
                    // Only now do orders reach this agent.
                    Ok(MqttEvent::Incoming(Packet::SubAck(_))) => {
                        up.store(true, Ordering::Release);
                        BusEvent::Up
                    }
                    Ok(MqttEvent::Incoming(Packet::Publish(publish))) if !publish.retain => {
                        match Topic::parse(&cluster, &publish.topic) {
                            Some(topic) => BusEvent::Message { topic, payload: publish.payload.into() },
                            None => continue,
                        }
                    }
                    Ok(_) => continue,
                    Err(error) => {
                        if !said {
                            tracing::warn!(
                                "cannot reach the broker at {url}: {}; trying again, pods go on",
                                chain(&error)
                            );
                            said = true;
                        }
                        if up.swap(false, Ordering::AcqRel) && events.send(BusEvent::Down).await.is_err() {
                            return;
                        }
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
        Ok(bus)
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

fn chain(error: &ConnectionError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        let more = inner.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::parse_url;

    #[test]
    fn urls() {
        assert_eq!(parse_url("mqtt://127.0.0.1:1883").unwrap(), ("127.0.0.1".into(), 1883));
        assert_eq!(parse_url("mqtt://broker").unwrap(), ("broker".into(), 1883));
        assert_eq!(parse_url("mqtt://[::1]:1884/").unwrap(), ("::1".into(), 1884));
        for bad in ["", "broker:1883", "http://x", "mqtt://", "mqtt://h:port"] {
            assert!(parse_url(bad).is_err(), "{bad}");
        }
    }
}
