//! What a pod's processes should be doing: run, stand still, end. Pure: time comes in as an argument, the loop acts.
//!
//! A pod runs when no reason to freeze it is left. An end, once begun, is never taken back.

use berth_protocol::job::{DisconnectAction, OnDisconnect};
use berth_protocol::limits::FREEZE_CONFIRM_MS;
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::{BootMs, Millis};

use crate::task::Lease;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// Not begun: no start was ordered.
    Wait,
    Run,
    /// Frozen, confirmed by the kernel until `confirm_by` where one is given, else killed.
    Freeze {
        confirm_by: Option<BootMs>,
        fenced: bool,
    },
    /// The stop signal was due; SIGKILL at `kill_at`.
    Stop {
        kill_at: BootMs,
    },
    /// SIGKILL now.
    Kill,
}

/// Whose word began the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndedBy {
    Order,
    /// No grant came in time, and the job says `stop`, or the freeze was not confirmed.
    Lease,
    /// A container of the pod has failed; the others follow.
    Container,
}

#[derive(Debug, Clone)]
pub struct Policy {
    action: DisconnectAction,
    grace: Millis,
    lease: Option<Lease>,
    paused: bool,
    /// Saved, and to stand still until the checkpoint is safe.
    held: bool,
    end: Option<(EndedBy, BootMs)>,
    killed: bool,
}

impl Policy {
    pub fn new(on_disconnect: &OnDisconnect, grace: Millis) -> Self {
        Self {
            action: on_disconnect.action,
            grace,
            lease: None,
            paused: false,
            held: false,
            end: None,
            killed: false,
        }
    }

    /// A start or a renewal; the first one starts.
    pub fn grant(&mut self, lease: Lease) {
        self.lease = Some(lease);
    }

    pub fn pause(&mut self, paused: bool) {
        self.paused = paused;
        if !paused && !kept(Rule::FreezeReasonsAreASet) {
            self.lease = self.lease.map(|_| Lease { deadline: None });
        }
    }

    pub fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// Ends the pod; a later call may only shorten the grace.
    pub fn stop(&mut self, by: EndedBy, grace: Millis, now: BootMs) {
        let kill_at = now.plus(grace);
        self.end = Some(match self.end {
            Some((first, before)) => (first, before.min(kill_at)),
            None => (by, kill_at),
        });
    }

    /// The kernel has not confirmed the freeze in time.
    pub fn freeze_failed(&mut self, now: BootMs) {
        self.stop(EndedBy::Lease, Millis::ZERO, now);
        self.killed = true;
    }

    pub fn ended_by(&self) -> Option<EndedBy> {
        self.end.map(|(by, _)| by)
    }

    /// What is to be done at `now`.
    pub fn goal(&mut self, now: BootMs) -> Goal {
        let Some(lease) = self.lease else {
            return if self.end.is_some() { Goal::Kill } else { Goal::Wait };
        };
        let expired = lease.deadline.filter(|deadline| *deadline <= now);
        if let (Some(deadline), DisconnectAction::Stop) = (expired, self.action) {
            self.stop(EndedBy::Lease, self.grace, deadline);
        }
        let fenced = expired.filter(|_| self.action == DisconnectAction::Pause);
        match self.end {
            // Signals would not reach a frozen pod, and past its deadline it may not run for its grace.
            Some(_) if self.killed || fenced.is_some() || self.held => Goal::Kill,
            Some((_, kill_at)) if kill_at <= now => Goal::Kill,
            Some((_, kill_at)) => Goal::Stop { kill_at },
            None => match fenced {
                Some(deadline) => {
                    let confirm_by = Some(deadline.plus(Millis(FREEZE_CONFIRM_MS)));
                    Goal::Freeze { confirm_by, fenced: true }
                }
                None if self.paused || self.held => Goal::Freeze { confirm_by: None, fenced: false },
                None => Goal::Run,
            },
        }
    }

    /// When `goal` next changes by itself.
    pub fn next_change(&self, now: BootMs) -> Option<BootMs> {
        let deadline = self
            .lease
            .and_then(|lease| lease.deadline)
            .filter(|deadline| *deadline > now && self.action != DisconnectAction::Continue);
        let kill_at = self.end.map(|(_, at)| at).filter(|at| *at > now);
        deadline.into_iter().chain(kill_at).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(action: DisconnectAction) -> Policy {
        Policy::new(&OnDisconnect { action, ..OnDisconnect::default() }, Millis(300))
    }

    fn until(ms: u64) -> Lease {
        Lease { deadline: Some(BootMs(ms)) }
    }

    const FENCED: Goal = Goal::Freeze { confirm_by: Some(BootMs(100 + FREEZE_CONFIRM_MS)), fenced: true };

    #[test]
    fn pause_freezes_at_the_deadline_and_a_renewal_thaws() {
        let mut p = policy(DisconnectAction::Pause);
        assert_eq!(p.goal(BootMs(0)), Goal::Wait);
        p.grant(until(100));
        assert_eq!((p.goal(BootMs(99)), p.next_change(BootMs(99))), (Goal::Run, Some(BootMs(100))));
        assert_eq!(p.goal(BootMs(100)), FENCED);
        // Woken late, the confirmation is still counted from the deadline.
        assert_eq!(p.goal(BootMs(90_000)), FENCED);
        p.grant(until(100_000));
        assert_eq!(p.goal(BootMs(90_001)), Goal::Run);
    }

    #[test]
    fn a_users_thaw_does_not_lift_a_fence() {
        let mut p = policy(DisconnectAction::Pause);
        p.grant(until(100));
        p.pause(true);
        assert_eq!(p.goal(BootMs(1)), Goal::Freeze { confirm_by: None, fenced: false });
        assert_eq!(p.goal(BootMs(100)), FENCED);
        p.pause(false);
        assert_eq!(p.goal(BootMs(101)), FENCED);
    }

    #[test]
    fn stop_signals_at_the_deadline_and_kills_after_the_grace_whatever_comes() {
        let mut p = policy(DisconnectAction::Stop);
        p.grant(until(100));
        assert_eq!(p.goal(BootMs(150)), Goal::Stop { kill_at: BootMs(400) });
        p.grant(until(10_000));
        assert_eq!(p.next_change(BootMs(150)), Some(BootMs(400)));
        assert_eq!(p.goal(BootMs(400)), Goal::Kill);
        assert_eq!(p.ended_by(), Some(EndedBy::Lease));
    }

    #[test]
    fn continue_goes_on() {
        let mut p = policy(DisconnectAction::Continue);
        p.grant(until(100));
        assert_eq!((p.goal(BootMs(1_000_000)), p.next_change(BootMs(1))), (Goal::Run, None));
    }

    #[test]
    fn no_grace_past_the_fence() {
        let mut p = policy(DisconnectAction::Pause);
        p.grant(until(100));
        p.stop(EndedBy::Order, Millis(1000), BootMs(50));
        assert_eq!(p.goal(BootMs(60)), Goal::Stop { kill_at: BootMs(1050) });
        assert_eq!(p.goal(BootMs(100)), Goal::Kill);
    }

    #[test]
    fn a_second_stop_only_shortens() {
        let mut p = policy(DisconnectAction::Pause);
        p.grant(Lease { deadline: None });
        p.stop(EndedBy::Container, Millis(500), BootMs(0));
        p.stop(EndedBy::Order, Millis(9000), BootMs(10));
        assert_eq!(p.goal(BootMs(20)), Goal::Stop { kill_at: BootMs(500) });
        p.stop(EndedBy::Order, Millis(0), BootMs(20));
        assert_eq!(p.goal(BootMs(20)), Goal::Kill);
        assert_eq!(p.ended_by(), Some(EndedBy::Container));
    }

    #[test]
    fn what_is_held_stands_and_does_not_run_for_its_grace() {
        let mut p = policy(DisconnectAction::Pause);
        p.grant(until(100));
        p.hold(true);
        assert_eq!(p.goal(BootMs(1)), Goal::Freeze { confirm_by: None, fenced: false });
        assert_eq!(p.goal(BootMs(100)), FENCED);
        p.hold(false);
        p.grant(until(1000));
        assert_eq!(p.goal(BootMs(101)), Goal::Run);
        p.hold(true);
        p.stop(EndedBy::Order, Millis(300), BootMs(101));
        assert_eq!(p.goal(BootMs(102)), Goal::Kill);
    }

    #[test]
    fn stopped_before_its_start_it_never_runs() {
        let mut p = policy(DisconnectAction::Pause);
        p.stop(EndedBy::Order, Millis(1000), BootMs(0));
        assert_eq!(p.goal(BootMs(1)), Goal::Kill);
    }
}
