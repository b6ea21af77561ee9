//! What the broker brings, read: events for the core, and requests that change nothing.

use berth_protocol::codec::{self, CodecError};
use berth_protocol::message::node::{NodeRequest, Request, SpecMessage};
use berth_protocol::topic::{NodeTopic, Topic};

use super::{Agency, Input};
use crate::core::Event;
use crate::core::ledger::PodKey;
use crate::io::bus::BusEvent;
use crate::io::clock;
use crate::io::identity::Untrusted;
use crate::task::Order;

/// Why a message is not read.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error(transparent)]
    Untrusted(#[from] Untrusted),
    #[error("the message is a request to another session of this node, said again")]
    OtherSession,
}

impl Refused {
    /// A word for counters.
    fn kind(&self) -> &'static str {
        match self {
            Self::Codec(error) => error.kind(),
            Self::Untrusted(error) => error.kind(),
            Self::OtherSession => "other-session",
        }
    }
}

impl Agency {
    /// A message of the broker's as an event, where it is one.
    pub(super) fn read(&mut self, event: BusEvent) -> Option<Input> {
        let (topic, payload) = match event {
            BusEvent::Up => return Some(Input::Event(Event::BusUp)),
            BusEvent::Down => return Some(Input::Event(Event::BusDown)),
            BusEvent::Message { topic, payload } => (topic, payload),
        };
        let Topic::Node { kind, .. } = &topic else { return None };
        let refused = match self.read_order(&topic, *kind, &payload) {
            Ok(input) => return input,
            Err(refused) => refused,
        };
        let count = self.refused.entry(refused.kind()).or_default();
        *count += 1;
        if *count == 1 {
            tracing::warn!("refused message on {topic}: {refused} (further ones are only counted)");
        }
        None
    }

    /// What the controller says, and nobody else.
    fn read_order(
        &mut self,
        topic: &Topic,
        kind: NodeTopic,
        payload: &[u8],
    ) -> Result<Option<Input>, Refused> {
        self.authority.check(codec::verify(&self.config.cluster, topic, payload)?)?;
        if kind != NodeTopic::Lease {
            self.authority.may_order(clock::now().wall)?;
        }
        Ok(Some(match kind {
            NodeTopic::Desired => Input::Event(Event::Desired(codec::decode(topic, payload)?)),
            NodeTopic::Lease => Input::Event(Event::Lease(codec::decode(topic, payload)?)),
            NodeTopic::Spec => Input::Event(read_spec(topic, payload)?),
            NodeTopic::Request => {
                let request: NodeRequest = codec::decode(topic, payload)?;
                if request.nonce.as_ref() != Some(self.core.nonce()) {
                    return Err(Refused::OtherSession);
                }
                Input::Logs(request)
            }
            _ => return Ok(None),
        }))
    }

    /// Follows a pod's log. What cannot be followed yet is asked for again by whoever wants it.
    pub(super) fn follow(&mut self, request: NodeRequest) {
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
    if !message.is_whole() {
        return Err(malformed("the spec is not what its digest says"));
    }
    let template = serde_json::from_str(message.spec.get()).map_err(CodecError::Malformed)?;
    Ok(Event::Spec { digest: message.digest, template: Box::new(template) })
}
