//! The machines that a controller leads from or stands by on, and the store that they share: which of them leads, and
//! what a leader does that does not know yet that it is one no more.

use std::collections::VecDeque;

use berth_controller::core::lead::{LEASE, PATIENCE, RENEW, Tenure};
use berth_controller::core::{Config, Controller, Event, Now, Step, Write};
use berth_protocol::ids::{StoreId, Term};
use berth_protocol::rule::{Rule, kept};
use berth_protocol::topic::Topic;

use super::{Due, Fault, World};
use crate::node::Clocks;

/// When a leader is stopped in the middle of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Within {
    Unwritten,
    Written,
}

/// The other machine has run for so much less, and its civil clock is behind.
const YOUNGER_MS: u64 = 400_000;
const BEHIND_MS: i64 = 700;
/// How soon a leader finds that another leads, and how soon a standby that the lead is free.
const FINDS_MS: u64 = 1_200;
const LOOKS_MS: u64 = 500;
/// Until a program that has ended is started again.
const RESTARTS_MS: u64 = 1_000;

/// A controller's program on its machine.
#[derive(Default)]
pub(super) struct Seat {
    pub clocks: Clocks,
    /// It leads, for all that it knows.
    controller: Option<Controller>,
    term: u64,
    /// A renewal was answered then, and one each `RENEW` since, until the store heard no more of it.
    renewed: u64,
    unheard: Option<u64>,
    /// Does not reach the store.
    cut: bool,
    stopped: bool,
    stops: Option<Within>,
    /// What it is to write and to say, and since when that waits.
    held: Option<(Step, u64)>,
    waiting: VecDeque<Event>,
}

impl Seat {
    pub(super) fn both() -> [Self; 2] {
        let younger = Clocks { lag: YOUNGER_MS, ahead: -BEHIND_MS };
        [Self::default(), Self { clocks: younger, ..Self::default() }]
    }

    /// In the history's time.
    pub(super) fn next_wake(&self) -> Option<u64> {
        let awake = self.controller.as_ref().filter(|_| !self.is_busy());
        awake.and_then(Controller::next_wake).map(|at| self.clocks.comes(at))
    }

    pub(super) fn now(&self, now_ms: u64) -> Now {
        Now { wall: self.clocks.wall(now_ms), boot: self.clocks.boot(now_ms) }
    }

    fn is_busy(&self) -> bool {
        self.stopped || self.held.is_some()
    }

    fn last_renewal(&self, now_ms: u64) -> u64 {
        let until = self.unheard.unwrap_or(now_ms);
        until - (until - self.renewed) % RENEW.0
    }

    fn tenure(&self, now_ms: u64) -> Tenure {
        Tenure::renewed(self.clocks.boot(self.last_renewal(now_ms)))
    }

    fn end(&mut self) {
        *self = Self { clocks: self.clocks, cut: self.cut, ..Self::default() };
    }
}

/// Draws how a leader loses the store, or its time, and what goes on beside it.
pub(crate) fn deposition(rng: &mut fastrand::Rng, nodes: usize, span: u64) -> Vec<(u64, Fault)> {
    let at = rng.u64(1_000..span);
    let short = at + rng.u64(500..16_000);
    let long = at + rng.u64(16_000..150_000);
    let within = if rng.bool() { Within::Written } else { Within::Unwritten };
    let (lost, found, back) = match rng.u8(0..6) {
        0..3 => (Fault::LeaderCut, Fault::LeaderReaches, long),
        3 => (Fault::LeaderCut, Fault::LeaderReaches, short),
        4 => (Fault::LeaderStop(None), Fault::LeaderGoOn, long),
        _ => (Fault::LeaderStop(Some(within)), Fault::LeaderGoOn, if rng.bool() { short } else { long }),
    };
    let mut faults = vec![(at, lost), (back, found), (at + rng.u64(2_000..6_000), Fault::StandBy)];
    if rng.u8(0..4) > 0 {
        // A broker of two halves: the leader keeps one, its successor gets the other.
        let with = rng.u8(2..6);
        for node in 0..nodes {
            faults.push((at, Fault::Apart { node, next: rng.u8(0..with) > 0 }));
            faults.push((back + rng.u64(0..60_000), Fault::Together(node)));
        }
    }
    if rng.bool() {
        // What is in the store then counts.
        let crash = back + rng.u64(0..10_000);
        faults.push((crash, Fault::ControllerCrash));
        faults.push((crash + rng.u64(10..20_000), Fault::ControllerStart));
    }
    faults.retain(|(at, _)| *at < span);
    faults.sort_by_key(|(at, _)| *at);
    faults
}

impl World {
    /// The controllers that a message reaches: users are with who leads, as far as the broker's halves know that.
    pub(super) fn heard_by(&self, topic: &Topic) -> Vec<usize> {
        let side = match topic {
            Topic::Node { node, .. } => {
                let sender = self.nodes.iter().position(|known| known.id == *node);
                sender.and_then(|n| self.links[n].side)
            }
            _ => self.leader.filter(|_| self.links.iter().any(|link| link.side.is_some())),
        };
        (0..self.seats.len()).filter(|seat| side.is_none_or(|side| side == *seat)).collect()
    }

    pub(super) fn ask(&mut self, n: usize, event: Event) -> Result<(), String> {
        let now_ms = self.now_ms;
        let seat = &mut self.seats[n];
        let (busy, now) = (seat.is_busy(), seat.now(now_ms));
        let Some(controller) = &mut seat.controller else { return Ok(()) };
        if busy {
            seat.waiting.push_back(event);
            return Ok(());
        }
        let step = controller.step(now, event);
        self.carry_out(n, step, now_ms)
    }

    /// What a stopped leader, or one that waited for the store, goes on with.
    fn go_on(&mut self, n: usize) -> Result<(), String> {
        if let Some((step, since)) = self.seats[n].held.take() {
            self.carry_out(n, step, since)?;
        }
        while !self.seats[n].is_busy()
            && let Some(event) = self.seats[n].waiting.pop_front()
        {
            self.ask(n, event)?;
        }
        Ok(())
    }

    /// Writes, then says: each as soon as it may.
    fn carry_out(&mut self, n: usize, step: Step, since: u64) -> Result<(), String> {
        let Step { writes, mut effects } = step;
        let acts = !writes.is_empty() && !effects.is_empty();
        let within = if acts { self.seats[n].stops.take() } else { None };
        if within == Some(Within::Unwritten) {
            self.stop(n);
        }
        if self.seats[n].stopped || self.seats[n].cut && !writes.is_empty() {
            self.hold(n, Step { writes, effects }, since);
            return Ok(());
        }
        let dies = self.controller_dies_after.filter(|_| acts);
        if !writes.is_empty() && self.leader != Some(n) && kept(Rule::WritesNameLeader) {
            self.end(n);
            return Ok(());
        }
        if kept(Rule::StoreFirst) || dies.is_none() {
            for Write { key, value } in writes {
                self.check_write(&key)?;
                match value {
                    Some(value) => self.store.insert(key, value),
                    None => self.store.remove(&key),
                };
            }
        }
        if let Some(done) = dies {
            effects.truncate(done);
            self.controller_dies_after = None;
            self.end_all();
        } else if within == Some(Within::Written) {
            self.stop(n);
        }
        let (seat, now_ms) = (&self.seats[n], self.now_ms);
        let waits = seat.stopped || !seat.tenure(now_ms).holds(seat.clocks.boot(now_ms));
        if dies.is_none() && waits && !effects.is_empty() {
            self.hold(n, Step { writes: Vec::new(), effects }, since);
            return Ok(());
        }
        self.release(n, effects)
    }

    fn hold(&mut self, n: usize, step: Step, since: u64) {
        let term = self.seats[n].term;
        self.seats[n].held = Some((step, since));
        if !self.seats[n].stopped {
            self.at(since + PATIENCE.0, Due::GiveUp { seat: n, term });
        }
    }

    pub(super) fn give_up(&mut self, n: usize, term: u64) {
        let seat = &self.seats[n];
        let since = seat.held.as_ref().map(|(_, since)| *since);
        if seat.term == term && !seat.stopped && since.is_some_and(|at| at + PATIENCE.0 <= self.now_ms) {
            self.end(n);
        }
    }

    pub(super) fn deposed(&mut self, n: usize, term: u64) {
        if self.seats[n].term == term && !self.seats[n].stopped && self.leader != Some(n) {
            self.end(n);
        }
    }

    /// The program ends, and is started again to stand by.
    fn end(&mut self, n: usize) {
        self.note(|| format!("the controller on {n} ends"));
        self.seats[n].end();
        self.leader = self.leader.filter(|leader| *leader != n);
        let again = self.now_ms + RESTARTS_MS;
        self.at(again, Due::Fault(Fault::StandBy));
    }

    /// Nobody stands by.
    pub(super) fn end_all(&mut self) {
        self.seats.iter_mut().for_each(Seat::end);
        self.leader = None;
    }

    fn unheard(&mut self, n: usize) {
        let now_ms = self.now_ms;
        self.seats[n].unheard.get_or_insert(now_ms);
    }

    fn stop(&mut self, n: usize) {
        self.unheard(n);
        self.seats[n].stopped = true;
    }

    pub(super) fn cut_leader(&mut self) {
        if let Some(n) = self.leader {
            self.unheard(n);
            self.seats[n].cut = true;
        }
    }

    pub(super) fn stop_leader(&mut self, within: Option<Within>) {
        match (self.leader, within) {
            (Some(n), Some(within)) => self.seats[n].stops = Some(within),
            (Some(n), None) => self.stop(n),
            (None, _) => {}
        }
    }

    pub(super) fn leaders_reach(&mut self) -> Result<(), String> {
        for n in 0..self.seats.len() {
            if std::mem::take(&mut self.seats[n].cut) {
                self.heard_again(n)?;
            }
        }
        Ok(())
    }

    pub(super) fn leaders_go_on(&mut self) -> Result<(), String> {
        for n in 0..self.seats.len() {
            self.seats[n].stops = None;
            if std::mem::take(&mut self.seats[n].stopped) {
                self.heard_again(n)?;
                self.go_on(n)?;
            }
        }
        Ok(())
    }

    /// By the store, if nothing else is in the way.
    fn heard_again(&mut self, n: usize) -> Result<(), String> {
        self.expire();
        let now_ms = self.now_ms;
        let leads = self.leader == Some(n);
        let seat = &mut self.seats[n];
        if seat.cut || seat.stopped || seat.controller.is_none() {
            return Ok(());
        }
        if leads {
            (seat.renewed, seat.unheard) = (now_ms, None);
        } else {
            let (term, finds) = (seat.term, now_ms + self.rng.u64(0..FINDS_MS));
            self.at(finds, Due::Deposed { seat: n, term });
        }
        self.go_on(n)
    }

    /// The lease of a leader of which the store has heard nothing is over.
    fn expire(&mut self) {
        let now_ms = self.now_ms;
        self.leader = self.leader.filter(|n| self.seats[*n].last_renewal(now_ms) + LEASE.0 > now_ms);
    }

    /// A controller that does not lead takes the lead as soon as that is free, or will be without more ado.
    pub(super) fn stand_by(&mut self) -> Result<(), String> {
        self.expire();
        if let Some(leader) = self.leader {
            if let Some(unheard) = self.seats[leader].unheard {
                let at = unheard + LEASE.0 + self.rng.u64(0..LOOKS_MS);
                self.at(at, Due::Fault(Fault::StandBy));
            }
            return Ok(());
        }
        // Not where the last one was, if that can be.
        let last = self.seats.len() - 1 - usize::try_from(self.term).unwrap_or(0) % self.seats.len();
        let free = |n: &usize| self.seats[*n].controller.is_none() && !self.seats[*n].cut;
        let Some(n) = [1 - last, last].into_iter().find(free) else { return Ok(()) };
        self.lead(n)
    }

    fn lead(&mut self, n: usize) -> Result<(), String> {
        self.controller_dies_after = None;
        // It has not seen their clocks before.
        self.nodes.iter_mut().for_each(|node| node.clock_broke = None);
        self.links.iter_mut().for_each(|link| link.answered = None);
        self.term += 1;
        let config = Config {
            cluster: self.cluster.clone(),
            store: StoreId::parse("sim-store").expect("a token"),
            term: Term(self.term),
            depot_url: "http://127.0.0.1:1".into(),
            namespaces: std::collections::BTreeMap::new(),
            moves_max: 8,
            secret: [7; 32],
            ca: None,
            seed: self.rng.u64(..),
        };
        let entries = self.entries();
        let (now, now_ms, term) = (self.seats[n].now(self.now_ms), self.now_ms, self.term);
        let controller =
            Controller::load(config, entries, now).map_err(|error| format!("cannot load: {error}"))?;
        self.check_aside(&controller)?;
        let seat = &mut self.seats[n];
        seat.end();
        (seat.controller, seat.term, seat.renewed) = (Some(controller), term, now_ms);
        self.leader = Some(n);
        self.note(|| format!("the controller on {n} leads, term {term}"));
        self.ask(n, Event::BusUp)
    }

    /// The faults are over: whoever leads goes on, and nobody else.
    pub(super) fn one_leads(&mut self) -> Result<(), String> {
        self.leaders_reach()?;
        self.leaders_go_on()?;
        for n in 0..self.seats.len() {
            if self.leader != Some(n) {
                self.seats[n].end();
            }
        }
        self.stand_by()
    }
}
