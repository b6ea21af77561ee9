//! When the controller wakes by itself: one moment for each thing that waits.

use std::collections::{BTreeMap, BTreeSet};

use berth_protocol::ids::{JobUid, NodeId};
use berth_protocol::units::BootMs;

/// What wakes the controller.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// Silence, resends, acknowledgements.
    Node(NodeId),
    /// Backoffs, the deadline, the time to live.
    Job(JobUid),
    /// Checkpoints by the job's interval.
    Checkpoints(JobUid),
    /// Pods that are to leave the node and could not be saved.
    Leave(NodeId),
    /// A desired set held back.
    Desired(NodeId),
    /// A status held back.
    Status(JobUid),
    /// The next look at who waits.
    Schedule,
    /// The next look at what pods ask for.
    Prices,
    /// The end of a wait for what is brought ahead of a pod.
    Staging,
    /// Expiry of request ids and of rejected statuses.
    Sweep,
    /// The next batch of statuses for a broker that came back.
    Republish,
}

/// One moment per timer.
#[derive(Default)]
pub(super) struct Timers {
    queue: BTreeSet<(BootMs, Timer)>,
    due: BTreeMap<Timer, BootMs>,
}

impl Timers {
    /// Wakes `timer` at `at`, or earlier where it is so armed already.
    pub fn arm(&mut self, timer: Timer, at: BootMs) {
        if self.due.get(&timer).is_some_and(|due| *due <= at) {
            return;
        }
        if let Some(later) = self.due.insert(timer.clone(), at) {
            self.queue.remove(&(later, timer.clone()));
        }
        self.queue.insert((at, timer));
    }

    pub fn is_armed(&self, timer: &Timer) -> bool {
        self.due.contains_key(timer)
    }

    pub fn next(&self) -> Option<BootMs> {
        self.queue.first().map(|(at, _)| *at)
    }

    pub fn pop(&mut self, now: BootMs) -> Option<Timer> {
        if self.next()? > now {
            return None;
        }
        let (_, timer) = self.queue.pop_first()?;
        self.due.remove(&timer);
        Some(timer)
    }
}
