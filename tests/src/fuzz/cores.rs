//! Whoever speaks to a core: each line of the input is a message or a happening, by its first letter.

use std::collections::BTreeMap;

use berth_agent::core::ledger::{Ledger, PodKey};
use berth_agent::core::{
    Action, Agent, Event as AgentEvent, Identity, NoExit, Now as AgentNow, Prepared, Step,
};
use berth_agent::policy::Granted;
use berth_agent::task::{Report, Root};
use berth_controller::core::{Config, Controller, Event, Now};
use berth_protocol::codec;
use berth_protocol::ids::{
    BootId, ClientId, ClusterName, Digest, HardwareId, JobName, LedgerId, Namespace, NodeId, SessionNonce,
    StoreId, Term,
};
use berth_protocol::job::Network;
use berth_protocol::message::node::{Desired, Lease};
use berth_protocol::policy::{Policy, Wants};
use berth_protocol::resources::Inventory;
use berth_protocol::topic::{JobTopic, NodeTopic, Topic};
use berth_protocol::units::{BootMs, Bytes, MilliCpu, Timestamp};
use serde_json::value::RawValue;

/// 2026-01-01
const EPOCH_MS: u64 = 1_767_225_600_000;
/// Longer inputs show nothing new.
const LINES_MAX: usize = 128;

pub fn now(ms: u64) -> AgentNow {
    AgentNow { wall: Timestamp(EPOCH_MS.saturating_add(ms)), boot: BootMs(1_000_000_u64.saturating_add(ms)) }
}

pub fn identity(damaged: bool) -> Identity {
    Identity {
        found: Vec::new(),
        hardware: HardwareId::parse("hw").expect("a token"),
        boot: BootId::parse("b").expect("a token"),
        nonce: SessionNonce::parse("n").expect("a token"),
        ledger: LedgerId::parse("l").expect("a token"),
        damaged,
        chunks: None,
        granted: granted(),
    }
}

/// What the node grants: little, so that orders ask for more.
fn granted() -> Granted {
    let rules =
        Policy { host_image: true, networks: [Network::Bridge, Network::None].into(), ..Policy::default() };
    Granted { rules, ..Granted::default() }
}

pub fn inventory() -> Inventory {
    Inventory {
        hostname: "n1".into(),
        arch: "x86_64".into(),
        kernel: "6.1".into(),
        os: "Debian".into(),
        cpu: MilliCpu(4000),
        memory: Bytes(8 << 30),
        disk: Bytes(1 << 40),
        criu: Some("4.1".into()),
        host_image: true,
        bridge: true,
        agent_version: "0".into(),
        ..Inventory::unknown()
    }
}

fn lines(bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    bytes.split(|byte| *byte == b'\n').take(LINES_MAX).filter_map(|line| {
        let (kind, rest) = line.split_first()?;
        Some((*kind, rest))
    })
}

/// Seconds, as a line says them.
fn span(text: &[u8]) -> u64 {
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.trim().parse::<u32>().ok())
        .map_or(1_000, |s| u64::from(s) * 1000)
}

/// In the envelope of messages between controller and agents, where it is JSON.
fn enveloped(body: &[u8]) -> Vec<u8> {
    match serde_json::from_slice::<&RawValue>(body) {
        Ok(body) => format!("{{\"v\":1,\"body\":{body}}}").into_bytes(),
        Err(_) => body.to_vec(),
    }
}

/// Whatever a broker and shims tell an agent: it stands, and its disk holds what it knows.
pub fn agent(bytes: &[u8]) {
    let node = NodeId::parse("n1").expect("a name");
    let (mut agent, step) = Agent::start(Ledger::default(), identity(false), inventory(), now(0));
    let mut disk = Ledger::default();
    let mut take = |step: Step| {
        step.records.iter().for_each(|record| disk.apply(record));
        for action in &step.actions {
            let (template, gpus) = match action {
                Action::Prepare { template, .. } | Action::Stage { template, .. } => (&**template, &[][..]),
                Action::Launch(launch) => (&launch.template, &launch.gpus[..]),
                _ => continue,
            };
            assert_eq!(granted().refuses(&Wants::of(template).with(gpus)), None, "the policy forbids it");
        }
    };
    take(step);
    let mut ms = 0;
    for (kind, rest) in lines(bytes) {
        let decoded = enveloped(rest);
        let topic = |kind| Topic::node(&node, kind);
        let mut pods = agent.ledger().pods.iter();
        let first: Option<(PodKey, _)> = match kind {
            b'R' | b'P' | b'G' => pods.next_back(),
            _ => pods.next(),
        }
        .map(|(key, entry)| (key.clone(), entry.run));
        let event = match (kind, first) {
            (b'd', _) => {
                codec::decode::<Desired>(&topic(NodeTopic::Desired), &decoded).ok().map(AgentEvent::Desired)
            }
            (b'l', _) => {
                codec::decode::<Lease>(&topic(NodeTopic::Lease), &decoded).ok().map(AgentEvent::Lease)
            }
            (b's', _) => serde_json::from_slice(rest)
                .ok()
                .map(|template| AgentEvent::Spec { digest: Digest::of(rest), template: Box::new(template) }),
            (b'r' | b'R', Some((key, _))) => {
                serde_json::from_slice::<Report>(rest).ok().map(|report| AgentEvent::Shim { key, report })
            }
            (b'p' | b'P', Some((key, _))) => {
                let roots = vec![Root::Host];
                let prepared = Prepared { roots, volumes: Vec::new(), workspace: None, restore: false };
                Some(AgentEvent::Prepared { key, result: Ok(prepared) })
            }
            (b'g' | b'G', Some((key, run))) => {
                Some(AgentEvent::Gone { key, run, exit: Err(NoExit::default()) })
            }
            (b'u', _) => Some(AgentEvent::BusUp),
            (b'w', _) => Some(AgentEvent::BusDown),
            (b't', _) => {
                ms += span(rest);
                Some(AgentEvent::Tick)
            }
            _ => None,
        };
        if let Some(event) = event {
            take(agent.step(now(ms), event));
        }
    }
    take(agent.step(now(ms + 3_600_000), AgentEvent::Tick));
    assert!(disk == *agent.ledger(), "the disk holds what the agent knows");
}

fn begin(entries: impl IntoIterator<Item = (String, Option<Vec<u8>>)>) -> Option<Controller> {
    let config = Config {
        cluster: ClusterName::parse("lab").expect("a name"),
        store: StoreId::parse("s").expect("a token"),
        term: Term(1),
        depot_url: "http://127.0.0.1:7420".into(),
        namespaces: BTreeMap::new(),
        moves_max: 8,
        secret: [7; 32],
        ca: None,
        seed: 1,
    };
    Controller::load(config, entries, at(0)).ok()
}

fn at(ms: u64) -> Now {
    let AgentNow { wall, boot } = now(ms);
    Now { wall, boot }
}

/// Whatever clients and agents tell a controller: it stands, and what it has written is what it knows.
pub fn controller(bytes: &[u8]) {
    let Some(mut controller) = begin(Vec::new()) else { return };
    let mut store = BTreeMap::new();
    let mut take = |controller: &mut Controller, ms, event| {
        for write in controller.step(at(ms), event).writes {
            match write.value {
                Some(value) => drop(store.insert(write.key, value)),
                None => drop(store.remove(&write.key)),
            }
        }
    };
    take(&mut controller, 0, Event::BusUp);
    let (namespace, job) = (Namespace::default_namespace(), JobName::parse("j").expect("a name"));
    let client = ClientId::parse("c").expect("a name");
    let mut ms = 0;
    for (kind, rest) in lines(bytes) {
        let node = NodeId::parse(if kind.is_ascii_uppercase() { "n2" } else { "n1" }).expect("a name");
        let of_node = |kind| (Topic::node(&node, kind), enveloped(rest));
        let of_job = |kind| (Topic::job(&namespace, &job, kind), rest.to_vec());
        let (topic, payload) = match kind {
            b'h' | b'H' => of_node(NodeTopic::Hello),
            b'b' | b'B' => of_node(NodeTopic::Heartbeat),
            b'e' | b'E' => of_node(NodeTopic::Event),
            b'y' | b'Y' => of_node(NodeTopic::Bye),
            b's' => of_job(JobTopic::Submit),
            b'c' => of_job(JobTopic::Command),
            b'q' => (Topic::QueryRequest { client: client.clone() }, rest.to_vec()),
            b't' => {
                ms += span(rest);
                take(&mut controller, ms, Event::Tick);
                continue;
            }
            _ => continue,
        };
        take(&mut controller, ms, Event::Message { topic, payload, by: None });
    }
    take(&mut controller, ms + 3_600_000, Event::Tick);
    assert!(
        begin(store.into_iter().map(|(key, value)| (key, Some(value)))).is_some(),
        "its successor reads what it has written"
    );
}

/// Entries of a store, a line each, the key before the first `=`, damaged where nothing comes behind it: one that is not
/// as it should be is refused.
pub fn store(bytes: &[u8]) {
    let entry = |line: &[u8]| {
        let at = line.iter().position(|byte| *byte == b'=')?;
        let value = Some(line[at + 1..].to_vec()).filter(|value| !value.is_empty());
        Some((String::from_utf8(line[..at].to_vec()).ok()?, value))
    };
    let entries = bytes.split(|byte| *byte == b'\n').take(LINES_MAX).filter_map(entry);
    let Some(mut controller) = begin(entries) else { return };
    for (ms, event) in [(1, Event::BusUp), (70_000, Event::Tick), (3_600_000, Event::Tick)] {
        controller.step(at(ms), event);
    }
}
