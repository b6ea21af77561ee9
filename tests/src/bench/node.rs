//! A node as far as a controller can tell: what simulated agents have in common, and how they say it.

use std::time::Instant;

use anyhow::Result;
use berth_protocol::codec;
use berth_protocol::ids::{
    BootId, ClusterName, Epoch, Generation, HardwareId, LedgerId, NodeId, PodId, SessionNonce, StoreId, Term,
};
use berth_protocol::message::node::{Heartbeat, HeldPod, Hello, held_digest};
use berth_protocol::resources::Inventory;
use berth_protocol::sign::{Key, Signer};
use berth_protocol::topic::{NodeTopic, Topic};
use berth_protocol::units::{BootMs, Bytes, MilliCpu};
use rumqttc::QoS;
use serde::Serialize;

/// What it is told in: the topics of its orders.
pub const KINDS: [NodeTopic; 3] = [NodeTopic::Desired, NodeTopic::Lease, NodeTopic::Spec];

pub struct Face {
    pub id: NodeId,
    pub cluster: ClusterName,
    pub nonce: SessionNonce,
    pub ledger: LedgerId,
    hardware: HardwareId,
    boot: BootId,
    begun: Instant,
    /// Of the last heartbeat.
    pub seq: u64,
    pub last_grant: Option<u64>,
    pub order: (Term, Generation),
    signer: Signer,
}

/// What its ledger says of events: acknowledged up to, and the last one.
pub type Events = (u64, u64);

impl Face {
    pub fn new(name: &str) -> Result<Self> {
        let cluster = ClusterName::parse("default")?;
        let signer = Signer::new(cluster.clone(), Key::derived(&[0; 32], name));
        Ok(Self {
            id: NodeId::parse(name)?,
            cluster,
            signer,
            nonce: SessionNonce::parse(&format!("{name}-nonce"))?,
            ledger: LedgerId::parse(&format!("{name}-ledger"))?,
            hardware: HardwareId::parse(&format!("{name}-hw"))?,
            boot: BootId::parse(&format!("{name}-boot"))?,
            begun: Instant::now(),
            seq: 0,
            last_grant: None,
            order: (Term(0), Generation(0)),
        })
    }

    /// Its client's name at the broker.
    pub fn client(&self) -> String {
        format!("{}.{}", self.id, self.nonce)
    }

    pub fn topic(&self, kind: NodeTopic) -> String {
        Topic::node(&self.id, kind).render(&self.cluster)
    }

    /// A message as it is published: where, how, what. None: it is none.
    pub fn message<T: Serialize>(&self, kind: NodeTopic, message: &T) -> Option<(String, QoS, Vec<u8>)> {
        let qos = if kind.is_qos0() { QoS::AtMostOnce } else { QoS::AtLeastOnce };
        let topic = Topic::node(&self.id, kind);
        let payload = codec::sign(&self.signer, &topic, &codec::encode(&topic, message).ok()?).ok()?;
        Some((self.topic(kind), qos, payload))
    }

    pub fn hello<'a>(
        &self,
        store: Option<StoreId>,
        (events_acked, events_last): Events,
        pods: impl Iterator<Item = (&'a PodId, Epoch)>,
    ) -> Hello {
        let held = |(pod, epoch): (&PodId, Epoch)| HeldPod {
            pod: pod.clone(),
            epoch,
            run: berth_protocol::ids::Run(1),
            alive: true,
            granted: false,
        };
        Hello {
            nonce: self.nonce.clone(),
            previous: None,
            earlier: Vec::new(),
            session: 1,
            hardware: self.hardware.clone(),
            boot: self.boot.clone(),
            ledger: self.ledger.clone(),
            store,
            term: self.order.0,
            generation: self.order.1,
            heard: None,
            events_acked,
            events_last,
            pods: pods.map(held).collect(),
            inventory: inventory(self.id.as_str()),
            chunks: None,
        }
    }

    /// The next one.
    pub fn heartbeat<'a>(&mut self, pods: impl Iterator<Item = (&'a PodId, Epoch)>) -> Heartbeat {
        self.seq += 1;
        Heartbeat {
            seq: self.seq,
            last_grant: self.last_grant,
            term: self.order.0,
            generation: self.order.1,
            held: held_digest(pods),
            ..Heartbeat::probe(self.nonce.clone(), BootMs(self.begun.elapsed().as_millis() as u64))
        }
    }
}

/// Of a node without devices.
pub fn inventory(name: &str) -> Inventory {
    Inventory {
        hostname: name.to_owned(),
        arch: "x86_64".to_owned(),
        kernel: "6.1.0".to_owned(),
        os: "Debian GNU/Linux 12".to_owned(),
        cpu: MilliCpu(64_000),
        memory: Bytes(256 * Bytes::GIB),
        disk: Bytes(1 << 40),
        cpu_model: "simulated".to_owned(),
        host_image: true,
        bridge: true,
        agent_version: "0.1.0".to_owned(),
        ..Inventory::unknown()
    }
}
