//! Until when a pod may run, and what lets it run on when no controller is heard.

use berth_protocol::job::{DisconnectAction, PodTemplate};
use berth_protocol::limits::DISCONNECT_AFTER_MS;
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::{BootMs, Millis};

use super::ledger::{PodEntry, PodKey, Record};
use super::pods::Shim;
use super::{Action, Agent, Now};
use crate::task::Lease;

/// Beyond the end of a lease that the shim keeps itself, the agent ends the pod.
const SHIM_SLACK: Millis = Millis::from_secs(1);
/// Whoever comes so much too late to the end of a lease stood still, as in a machine that was paused.
const LATE: Millis = Millis::from_secs(1);
/// For so long it then hears what shims have done meanwhile, before it takes one for dead.
const HEARING: Millis = Millis(500);
/// Without a grant for this long a pod is on its own: longer than a restart of the broker.
const ALONE_AFTER: Millis = Millis(DISCONNECT_AFTER_MS);

impl Agent {
    /// Until when the pod may run on the grants so far; `None`: not granted, or run out.
    pub(super) fn lease_of(
        &self,
        now: Now,
        key: &PodKey,
        entry: &PodEntry,
        template: &PodTemplate,
    ) -> Option<Lease> {
        if self.needs_no_grant(entry, template) {
            return Some(Lease { deadline: None });
        }
        let since = self.grants.since(key)?;
        if template.on_disconnect.action == DisconnectAction::Continue {
            return Some(Lease { deadline: None });
        }
        let deadline = since.plus(template.on_disconnect.after);
        (now.boot < deadline).then_some(Lease { deadline: Some(deadline) })
    }

    /// May the pod run now, on the grants so far?
    pub fn is_granted(&self, now: Now, key: &PodKey) -> bool {
        let entry = self.ledger.pods.get(key);
        let known = entry.and_then(|entry| Some((entry, self.template(entry)?)));
        known.is_some_and(|(entry, template)| self.lease_of(now, key, entry, template).is_some())
    }

    /// When a pod whose shim fails to fence it is ended by the agent.
    pub(super) fn lease_end(&self, key: &PodKey, entry: &PodEntry) -> Option<BootMs> {
        let template = self.template(entry)?;
        let lease = template.on_disconnect.lease(template.grace)?;
        Some(self.grants.since(key)?.plus(lease).plus(SHIM_SLACK))
    }

    /// Ends a pod that runs past its lease or its stop, since its shim does not.
    pub(super) fn check_deadline(&mut self, now: Now, key: &PodKey) {
        let Some(entry) = self.ledger.pods.get(key) else { return };
        let run = entry.run;
        let past = |end: Option<BootMs>| end.is_some_and(|end| end <= now.boot);
        let end = self.lease_end(key, entry).filter(|_| kept(Rule::AgentChecksDeadlines));
        let Some(live) = self.live.get_mut(key) else { return };
        if let Some(end) = end.filter(|end| end.plus(LATE) < now.boot)
            && live.look_at.is_none_or(|at| at <= end)
        {
            live.look_at = Some(now.boot.plus(HEARING));
        }
        let over = past(end) && live.look_at.is_none_or(|at| at <= now.boot);
        let late = match live.shim {
            Shim::Running | Shim::Unknown if over => "ran past its lease",
            Shim::None | Shim::Dying => return,
            _ if past(live.stop_by) => "does not end by order",
            _ => return,
        };
        (live.shim, live.stop_by) = (Shim::Dying, None);
        self.warn(format!("pod {key} {late}, its shim does not answer: killing it"));
        self.act(Action::Kill { key: key.clone(), run });
    }

    /// Told beside an event that is written anyway.
    pub(super) fn note_begun(&mut self, key: &PodKey) {
        let continues = |template: &PodTemplate| template.on_disconnect.action == DisconnectAction::Continue;
        let Some(entry) = self.ledger.pods.get(key).filter(|entry| !entry.begun) else { return };
        if self.template(entry).is_some_and(continues) {
            let entry = PodEntry { begun: true, ..entry.clone() };
            self.record(Record::Pod { key: key.clone(), entry: Box::new(entry) });
        }
    }

    /// The ledger's pods were given to this very machine. A copy of its disk elsewhere starts nothing by itself.
    pub(super) fn is_at_home(&self) -> bool {
        self.ledger.hardware.as_ref() == Some(&self.hardware)
    }

    /// The controller has taken this machine for the node that it was.
    pub(super) fn settle_in(&mut self) {
        if !self.is_at_home() {
            let (number, nonce, hardware) = (self.ledger.session, self.nonce.clone(), self.hardware.clone());
            self.record(Record::Session { number, nonce, hardware: Some(hardware) });
        }
    }

    /// A pod that continues whatever happens to the controller, was let begin by it, and begins again without it.
    pub(super) fn needs_no_grant(&self, entry: &PodEntry, template: &PodTemplate) -> bool {
        template.on_disconnect.action == DisconnectAction::Continue && entry.begun && self.is_at_home()
    }

    /// Whatever ends the pod, nobody takes it elsewhere, and nobody else may run it: it goes on here.
    pub(super) fn is_on_its_own(
        &self,
        now: Now,
        key: &PodKey,
        entry: &PodEntry,
        template: &PodTemplate,
    ) -> bool {
        let heard = self.grants.since(key).is_some_and(|since| now.boot < since.plus(ALONE_AFTER));
        let superseded = self.ledger.pods.keys().any(|other| other.pod == key.pod && other.epoch > key.epoch);
        !heard && !superseded && !entry.unnamed && self.needs_no_grant(entry, template)
    }

    /// From when on a pod that nobody asks for has to be saved all the same.
    pub(super) fn alone_from(&self, key: &PodKey) -> BootMs {
        self.grants.since(key).unwrap_or(BootMs::ZERO).max(self.since).plus(ALONE_AFTER)
    }
}
