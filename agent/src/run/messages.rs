//! What the broker brings, read: events for the core, and requests that change nothing.

use berth_protocol::codec::{self, CodecError};
use berth_protocol::message::node::{NodeRequest, Request, SpecMessage};
use berth_protocol::topic::{NodeTopic, Topic};

use super::{Agency, Input};
use crate::core::Event;
use crate::core::ledger::PodKey;
use crate::io::bus::BusEvent;
use crate::io::clock;
use crate::task::Order;

impl Agency {
    /// A message of the broker's as an event, where it is one.
    pub(super) fn read(&mut self, event: BusEvent) -> Option<Input> {
        let (topic, payload) = match event {
            BusEvent::Up => return Some(Input::Event(Event::BusUp)),
            BusEvent::Down => return Some(Input::Event(Event::BusDown)),
            BusEvent::Message { topic, payload } => (topic, payload),
        };
        let Topic::Node { kind, .. } = &topic else { return None };
        let author = codec::verify(&self.config.cluster, &topic, &payload);
        let author = author.map_err(|error| self.refuse(&topic, error.kind(), &error)).ok()?;
        let trusted = self.authority.check(&author, clock::now().wall);
        trusted.map_err(|error| self.refuse(&topic, error.kind(), &error)).ok()?;
        let read = match kind {
            NodeTopic::Desired => codec::decode(&topic, &payload).map(Event::Desired).map(Input::Event),
            NodeTopic::Lease => codec::decode(&topic, &payload).map(Event::Lease).map(Input::Event),
            NodeTopic::Spec => read_spec(&topic, &payload).map(Input::Event),
            NodeTopic::Request => codec::decode(&topic, &payload).map(Input::Logs),
            _ => return None,
        };
        read.map_err(|error| self.refuse(&topic, error.kind(), &error)).ok()
    }

    fn refuse(&mut self, topic: &Topic, kind: &'static str, error: &dyn std::error::Error) {
        let count = self.refused.entry(kind).or_default();
        *count += 1;
        if *count == 1 {
            tracing::warn!("refused message on {topic}: {error} (further ones are only counted)");
        }
    }

    /// Follows a pod's log. What cannot be followed yet is asked for again by whoever wants it.
    pub(super) fn follow(&mut self, request: NodeRequest) {
        // Asked of another session, and said again by somebody since.
        if request.nonce.as_ref() != Some(self.core.nonce()) {
            return;
        }
        let Request::Logs { pod, epoch, from_seq, follow } = request.request;
        let key = PodKey::new(&pod, epoch);
        let ledger = self.core.ledger();
        let Some(entry) = ledger.pods.get(&key) else { return };
        let Some(template) = ledger.specs.get(&entry.desired.spec) else { return };
        let topic = Topic::Logs { namespace: template.namespace.clone(), pod: template.job.pod(pod.index) };
        let dir = self.shims.pod_dir(&key);
        self.followers.follow(&self.bus, &dir, &key, topic, from_seq, follow);
        if follow {
            self.shims.order(&key, Order::Follow { follow });
        }
    }
}

/// A template whose digest is of the very bytes that came.
fn read_spec(topic: &Topic, payload: &[u8]) -> Result<Event, CodecError> {
    let message: SpecMessage = codec::decode(topic, payload)?;
    let malformed = |text: &str| CodecError::Malformed(serde::de::Error::custom(text));
    if berth_protocol::ids::Digest::of(message.spec.get().as_bytes()) != message.digest {
        return Err(malformed("the spec is not what its digest says"));
    }
    let template = serde_json::from_str(message.spec.get()).map_err(CodecError::Malformed)?;
    Ok(Event::Spec { digest: message.digest, template: Box::new(template) })
}
