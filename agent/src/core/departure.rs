//! A machine that is about to go: the controller is told, and takes the pods off it first.

use berth_protocol::message::node::Departure;
use berth_protocol::units::BootMs;

use super::ledger::PodEntry;
use super::{Agent, Now};

/// The machine is about to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaves {
    /// For people.
    pub why: String,
    pub at: BootMs,
}

impl Agent {
    /// A level: the controller hears it with every heartbeat, the first of them now.
    pub(super) fn leaves(&mut self, now: Now, leaving: Option<Leaves>) {
        let why = |leaves: &Option<Leaves>| leaves.as_ref().map(|leaves| leaves.why.clone());
        match &leaving {
            Some(leaves) if why(&leaving) != why(&self.leaving) => {
                let within = leaves.at.since(now.boot);
                self.warn(format!("this machine goes within {within}: {}; its pods go first", leaves.why));
            }
            None if self.leaving.is_some() => self.warn("this machine stays after all".to_owned()),
            _ => {}
        }
        self.leaving_since = leaving.as_ref().map(|_| self.leaving_since.unwrap_or(now.boot));
        self.leaving = leaving;
        self.heartbeat(now);
    }

    /// Nothing of a pod runs here any more, and the controller has all that is left of it.
    pub fn is_empty(&self) -> bool {
        let settled = |entry: &PodEntry| match &entry.ended {
            Some(ended) => ended.log_stored && ended.outputs_stored,
            None => !entry.may_be_alive(),
        };
        self.ledger.outbox.is_empty() && self.ledger.pods.values().all(settled)
    }

    pub(super) fn departure(&self, now: Now) -> Option<Departure> {
        let leaves = self.leaving.as_ref()?;
        Some(Departure { why: leaves.why.clone(), within: leaves.at.since(now.boot) })
    }
}
