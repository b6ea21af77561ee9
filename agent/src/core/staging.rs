//! What orders name as to come: images and checkpoints brought here ahead of pods that still run elsewhere. Lost with
//! the agent, and told again by the first orders of its next session.

use std::collections::BTreeMap;

use berth_protocol::ids::Digest;
use berth_protocol::limits::STAGES_PER_NODE_MAX;
use berth_protocol::message::node::{Stage, StageState, Staged};
use berth_protocol::policy::Wants;

use super::ledger::PodKey;
use super::{Action, Agent, Now};

/// At once, so that a worker is left for a pod that is here.
const AT_ONCE_MAX: usize = 2;
/// Of why one came to nothing: heartbeats are small.
const WHY_BYTES_MAX: usize = 200;

/// By the pod, at the epoch that still runs elsewhere.
#[derive(Debug, Default)]
pub(super) struct Staging(BTreeMap<PodKey, Coming>);

#[derive(Debug)]
struct Coming {
    spec: Digest,
    from: Option<Digest>,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// For its spec, or its turn.
    Waits,
    Busy,
    Over(StageState),
}

impl Staging {
    /// Specs that are needed.
    pub(super) fn specs(&self) -> impl Iterator<Item = Digest> {
        self.0.values().map(|coming| coming.spec)
    }

    pub(super) fn is_busy(&self) -> bool {
        self.0.values().any(|coming| !matches!(coming.state, State::Over(_)))
    }

    /// For the heartbeat.
    pub(super) fn told(&self) -> Vec<Staged> {
        let staged = |(key, coming): (&PodKey, &Coming)| Staged {
            pod: key.pod.clone(),
            epoch: key.epoch,
            state: match &coming.state {
                State::Waits | State::Busy => StageState::Busy,
                State::Over(state) => state.clone(),
            },
        };
        self.0.iter().map(staged).collect()
    }
}

fn failed(mut why: String) -> State {
    why.truncate(why.floor_char_boundary(WHY_BYTES_MAX));
    State::Over(StageState::Failed { why })
}

impl Agent {
    /// Takes the orders' list over; returns what lets go of that which it names no more.
    pub(super) fn stage(&mut self, stages: Vec<Stage>) -> Vec<Action> {
        let mut let_go = Vec::new();
        let mut named = BTreeMap::new();
        for Stage { pod, epoch, spec, from } in stages.into_iter().take(STAGES_PER_NODE_MAX) {
            named.insert(PodKey::new(&pod, epoch), (spec, from));
        }
        for (key, coming) in std::mem::take(&mut self.staging.0) {
            if named.get(&key) == Some(&(coming.spec, coming.from)) {
                self.staging.0.insert(key, coming);
            } else if coming.state == State::Busy {
                let_go.push(Action::CancelStage { key });
            }
        }
        for (key, (spec, from)) in named {
            self.staging.0.entry(key).or_insert(Coming { spec, from, state: State::Waits });
        }
        let_go
    }

    /// Begins what may begin now.
    pub(super) fn next_stage(&mut self) {
        let busy = self.staging.0.values().filter(|coming| coming.state == State::Busy).count();
        let specs = &self.ledger.specs;
        let ready = self.staging.0.iter_mut().filter(|(_, coming)| coming.state == State::Waits);
        let ready = ready.filter_map(|(key, coming)| Some((key, specs.get(&coming.spec)?, coming)));
        let mut begun = Vec::new();
        let mut left = AT_ONCE_MAX.saturating_sub(busy);
        for (key, template, coming) in ready {
            if let Some(why) = self.granted.refuses(&Wants::of(template)) {
                coming.state = failed(why);
                continue;
            }
            if left == 0 {
                break;
            }
            left -= 1;
            coming.state = State::Busy;
            let (key, template) = (key.clone(), Box::new(template.clone()));
            begun.push(Action::Stage { key, template, from: coming.from });
        }
        self.out.actions.extend(begun);
    }

    pub(super) fn staged(
        &mut self,
        now: Now,
        key: &PodKey,
        from: Option<Digest>,
        result: Result<(), String>,
    ) {
        let Some(coming) = self.staging.0.get_mut(key) else { return };
        // Of one that was begun anew since.
        if coming.state != State::Busy || coming.from != from {
            return;
        }
        coming.state = match result {
            Ok(()) => State::Over(StageState::Ready),
            Err(why) => failed(why),
        };
        self.next_stage();
        // Whoever waits for it runs until it is told.
        self.heartbeat(now);
    }
}
