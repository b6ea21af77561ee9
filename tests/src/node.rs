//! A made-up machine: the real agent core on a made-up disk, with shims that do what their leases say.

mod perform;
mod shim;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use berth_agent::core::ledger::{Ledger, PodKey, Record};
use berth_agent::core::{Action, Agent, Event, Identity, NoExit, Now};
use berth_agent::io::journal;
use berth_agent::task::{Exit, Report};
use berth_protocol::ids::{
    BootId, Digest, Generation, HardwareId, JobUid, LedgerId, NodeId, Run, SessionNonce, Term,
};
use berth_protocol::message::node::HeldPod;
use berth_protocol::pod::{Cause, Outcome};
use berth_protocol::resources::Inventory;
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::{BootMs, Bytes, MilliCpu, Millis, Timestamp};

use self::shim::{Change, Shim, ShimState};

/// Checkpoints that the depot holds, and the work that is left of each.
pub type Depot = Rc<RefCell<BTreeMap<Digest, Millis>>>;

/// CLOCK_BOOTTIME, and civil time, at the beginning of every history.
pub(crate) const BOOT_MS: u64 = 1_000_000;
const WALL_MS: i64 = 1_700_000_000_000;

/// Drawn from names alone, so that a history repeats itself.
fn odds(what: &str) -> u8 {
    u8::from_str_radix(&Digest::of(what.as_bytes()).hex()[..2], 16).unwrap_or(1)
}

fn fails(what: &str, one_in: u8) -> bool {
    odds(what).is_multiple_of(one_in)
}

/// Of some number in the text another.
pub(crate) fn change_digit(text: &mut [u8], seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    // Not of the sum in front.
    let digits: Vec<usize> = (9..text.len()).filter(|at| text[*at].is_ascii_digit()).collect();
    if let Some(at) = rng.choice(digits) {
        text[at] = b'0' + (text[at] - b'0' + rng.u8(1..10)) % 10;
    }
}

/// A machine's clocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clocks {
    /// How long CLOCK_BOOTTIME stood still.
    pub lag: u64,
    /// How far civil time is from what it was set to first.
    pub ahead: i64,
}

impl Clocks {
    pub fn boot(self, now_ms: u64) -> BootMs {
        BootMs((BOOT_MS + now_ms).saturating_sub(self.lag))
    }

    pub fn wall(self, now_ms: u64) -> Timestamp {
        Timestamp((WALL_MS + self.ahead).saturating_add_unsigned(now_ms).unsigned_abs())
    }

    /// When a moment of CLOCK_BOOTTIME comes, in the history's time.
    pub fn comes(self, at: BootMs) -> u64 {
        at.since(BootMs(BOOT_MS)).0 + self.lag
    }
}

pub struct Node {
    pub id: NodeId,
    pub agent: Option<Agent>,
    pub clocks: Clocks,
    /// What is on disk: survives the agent and the machine.
    ledger: Ledger,
    /// Written and not yet synced: survives the agent alone.
    unsynced: Vec<Record>,
    /// Processes: survive the agent, not the machine.
    shims: BTreeMap<PodKey, Shim>,
    exits: BTreeMap<(PodKey, Run), Exit>,
    /// Runs that failed here.
    failed: Vec<JobUid>,
    /// Pods whose shim is dead, should they outlive it: they compute, and nobody can fence them.
    orphans: Vec<(PodKey, Shim)>,
    /// A run was begun while another of the same epoch had not ended.
    pub launched_twice: Vec<PodKey>,
    /// Another run was due, and the job forgives no more failures.
    pub forgiven: Vec<PodKey>,
    /// The agent is stopped: what comes waits.
    pub stopped: bool,
    /// The whole machine is: its processes, and its clock.
    paused_at: Option<u64>,
    /// A machine that was paused cannot know it: until then what is fenced by its clock may run on.
    excused: BTreeMap<PodKey, u64>,
    /// When it last went on. What had come for it meanwhile grants time that is over, too.
    resumed_at: Option<u64>,
    /// By its own clock, when time was last granted to it.
    granted_at: Option<BootMs>,
    /// From this heartbeat of that session on its clock is known to have stood still.
    pub(crate) clock_broke: Option<(SessionNonce, u64)>,
    waiting: Vec<Event>,
    /// The agent is killed at the next step that acts, or begins a run, once so much of it is done.
    dies_after: Option<(usize, bool)>,
    /// The agent is killed while it writes what it is about to do: so many records are whole.
    dies_writing: Option<usize>,
    /// The work left in checkpoints on this disk.
    saved: BTreeMap<(PodKey, u64), Millis>,
    /// And in those that a next run is about to begin from.
    resumes: BTreeMap<PodKey, Millis>,
    depot: Depot,
    /// Pods that were to start from a checkpoint which the depot does not hold.
    pub lacking: Vec<(PodKey, Digest)>,
    /// Tells machines of one name apart.
    machine: String,
    boot: u64,
    sessions: u64,
    ledgers: u64,
    cpu: MilliCpu,
}

/// What an agent asks of the world beyond its own machine.
#[derive(Debug)]
pub enum Out {
    Send(Action),
    /// Comes back to this agent after a while.
    Later {
        ms: u64,
        event: Event,
    },
}

impl Node {
    pub fn new(id: NodeId, cpu: MilliCpu, depot: Depot) -> Self {
        Self {
            machine: id.to_string(),
            id,
            agent: None,
            clocks: Clocks::default(),
            ledger: Ledger::default(),
            unsynced: Vec::new(),
            shims: BTreeMap::new(),
            exits: BTreeMap::new(),
            failed: Vec::new(),
            orphans: Vec::new(),
            launched_twice: Vec::new(),
            forgiven: Vec::new(),
            stopped: false,
            paused_at: None,
            excused: BTreeMap::new(),
            resumed_at: None,
            granted_at: None,
            clock_broke: None,
            waiting: Vec::new(),
            dies_after: None,
            dies_writing: None,
            saved: BTreeMap::new(),
            resumes: BTreeMap::new(),
            depot,
            lacking: Vec::new(),
            boot: 1,
            sessions: 0,
            ledgers: 0,
            cpu,
        }
    }

    fn inventory(&self) -> Inventory {
        Inventory {
            hostname: self.id.to_string(),
            arch: "x86_64".into(),
            kernel: "6.1".into(),
            os: "Debian".into(),
            cpu: self.cpu,
            memory: Bytes(64 << 30),
            disk: Bytes(1 << 40),
            criu: Some("4.1".into()),
            host_image: true,
            bridge: true,
            agent_version: "0".into(),
            ..Inventory::unknown()
        }
    }

    pub fn now(&self, now_ms: u64) -> Now {
        Now { wall: self.clocks.wall(now_ms), boot: self.clocks.boot(now_ms) }
    }

    /// The agent starts, on the ledger that the disk has.
    pub fn start(&mut self, now: Now) -> Vec<Out> {
        self.sessions += 1;
        let name = |kind: &str, n: u64| format!("{kind}-{}-{n}", self.machine);
        let identity = Identity {
            hardware: HardwareId::parse(&format!("hw-{}", self.id)).expect("a token"),
            boot: BootId::parse(&name("boot", self.boot)).expect("a token"),
            nonce: SessionNonce::parse(&name("s", self.sessions)).expect("a token"),
            ledger: LedgerId::parse(&name("l", self.ledgers)).expect("a token"),
            damaged: false,
            chunks: None,
            found: self.scan(),
            granted: crate::plan::granted(),
        };
        self.sync();
        let (agent, step) = Agent::start(self.ledger.clone(), identity, self.inventory(), now);
        self.agent = Some(agent);
        let mut out = self.perform(now, step);
        out.extend(self.step(now, Event::BusUp));
        out
    }

    /// Its ledger is lost, and with it all that it knew; its pods are still there.
    pub fn lose_ledger(&mut self) {
        self.crash();
        self.unsynced.clear();
        self.ledger = Ledger::default();
        self.ledgers += 1;
    }

    /// A machine that was made from a copy of this one's disk.
    pub fn copy(&self, name: &str) -> Self {
        let mut copy = Self::new(self.id.clone(), self.cpu, self.depot.clone());
        copy.machine = format!("{}-{name}", self.id);
        (copy.ledger, copy.saved, copy.exits) = (self.ledger.clone(), self.saved.clone(), self.exits.clone());
        (copy.sessions, copy.ledgers) = (self.sessions, self.ledgers);
        copy
    }

    /// `kill -9` of the agent.
    pub fn crash(&mut self) {
        self.agent = None;
        (self.stopped, self.dies_after, self.dies_writing) = (false, None, None);
        self.waiting.clear();
        // One failure at a time: of shim and agent one can fence.
        for shim in self.shims.values_mut() {
            shim.granted = false;
            shim.go_on();
        }
    }

    /// `kill -9` of the agent in the middle of the next step that acts, or that begins a run.
    pub fn crash_after(&mut self, actions: usize, launching: bool) {
        self.dies_after = Some((actions, launching));
    }

    /// `kill -9` of the agent in the middle of its next write.
    pub fn crash_writing(&mut self, records: usize) {
        self.dies_writing = Some(records);
    }

    /// The faults are over.
    pub fn live_on(&mut self) {
        (self.dies_after, self.dies_writing) = (None, None);
    }

    /// SIGSTOP.
    pub fn stop(&mut self) {
        self.stopped = self.agent.is_some();
        self.shims.values_mut().for_each(Shim::go_on);
    }

    /// SIGCONT: first, as it may be, its own clock or what waited in its sockets.
    pub fn go_on(&mut self, now: Now, clock_first: bool) -> Vec<Out> {
        if !std::mem::take(&mut self.stopped) {
            return Vec::new();
        }
        let waited = std::mem::take(&mut self.waiting);
        let mut out = if clock_first { self.step(now, Event::Tick) } else { Vec::new() };
        for event in waited {
            out.extend(self.step(now, event));
        }
        out
    }

    /// The shims that this agent has granted time hang, or no longer. One that goes on has heard nothing meanwhile.
    pub fn hang(&mut self, now: Now, hangs: bool) -> Vec<Out> {
        let can = self.agent.is_some() && !self.stopped;
        let mut out = Vec::new();
        for (key, shim) in &mut self.shims {
            if hangs {
                shim.hangs = can && shim.granted;
            } else if std::mem::take(&mut shim.hangs) {
                let report = shim.report();
                out.push(Out::Later { ms: 1, event: Event::Reconnected { key: key.clone() } });
                out.push(Out::Later { ms: 2, event: Event::Shim { key: key.clone(), report } });
            }
        }
        out.extend(self.advance_all(now));
        out
    }

    /// Every shim dies.
    pub fn kill_shims(&mut self) -> Vec<Out> {
        let mut out = Vec::new();
        for (key, shim) in std::mem::take(&mut self.shims) {
            let (run, exit) = (shim.run, Err(NoExit::default()));
            out.push(Out::Later { ms: 5, event: Event::Gone { key: key.clone(), run, exit } });
            if !kept(Rule::DeadShimKills) {
                self.orphans.push((key, shim));
            }
        }
        out
    }

    /// The machine loses power: processes end; of what was not synced so many records are on disk.
    pub fn power_cut(&mut self, synced: usize) {
        self.crash();
        let torn = self.unsynced.drain(synced.min(self.unsynced.len())..).next();
        self.sync();
        self.tear(torn);
        self.shims.clear();
        self.orphans.clear();
        self.excused.clear();
        (self.paused_at, self.resumed_at, self.granted_at, self.clock_broke) = (None, None, None, None);
        self.boot += 1;
    }

    /// The first record of those that are not on disk left a line that is not what was written.
    fn tear(&mut self, torn: Option<Record>) {
        let mut line = Vec::new();
        if torn.is_some_and(|record| journal::line(&record, &mut line).is_ok()) {
            change_digit(&mut line, self.boot);
            if let Some(record) = journal::parse(&line) {
                self.ledger.apply(&record);
            }
        }
    }

    fn sync(&mut self) {
        for record in std::mem::take(&mut self.unsynced) {
            self.ledger.apply(&record);
        }
    }

    /// Its hypervisor stops it, its clock with it.
    pub fn pause(&mut self, now_ms: u64) {
        self.paused_at.get_or_insert(now_ms);
    }

    pub fn is_paused(&self) -> bool {
        self.paused_at.is_some()
    }

    /// And lets it go on. It overlaps with whatever took its place by the leases that remained, and no longer.
    pub fn resume(&mut self, now_ms: u64, answered: Option<&SessionNonce>) {
        let Some(since) = self.paused_at.take() else { return };
        self.clocks.lag += now_ms - since;
        self.resumed_at = Some(now_ms);
        for (key, shim) in &self.shims {
            self.excused.insert(key.clone(), leased(shim).map_or(u64::MAX, |lease| now_ms + lease));
        }
        let nonce = self.agent.as_ref().and_then(|agent| agent.ledger().nonce.clone());
        let known = nonce.filter(|nonce| answered == Some(nonce) && now_ms - since >= CLOCK_STOPS_MS);
        self.clock_broke = known.map(|nonce| (nonce, u64::MAX));
    }

    /// Is all over that was granted so far, by its own clock too?
    pub fn is_fenced(&self, now_ms: u64) -> bool {
        self.granted_at.is_none_or(|at| self.boot_now(now_ms).since(at).0 >= LEASE_MS)
    }

    /// A grant is on its way to it.
    pub fn granted(&mut self, now_ms: u64) {
        self.granted_at = Some(self.boot_now(now_ms));
    }

    /// Its CLOCK_BOOTTIME, which stands still while the machine does.
    fn boot_now(&self, now_ms: u64) -> BootMs {
        self.clocks.boot(self.paused_at.unwrap_or(now_ms))
    }

    /// May it run beside a newer epoch, for its clock stood still?
    pub fn is_excused(&self, key: &PodKey, now_ms: u64) -> bool {
        let begun_since = || Some(self.resumed_at? + leased(self.shims.get(key)?)?);
        self.excused.get(key).copied().or_else(begun_since).is_some_and(|until| now_ms < until)
    }

    /// Time passes for the processes.
    pub fn advance_all(&mut self, now: Now) -> Vec<Out> {
        self.orphans.retain_mut(|(_, shim)| shim.computes(now.boot));
        let keys: Vec<PodKey> = self.shims.keys().cloned().collect();
        keys.iter().flat_map(|key| self.advance(now, key)).collect()
    }

    /// Lets one shim do what is due, and its reports go out; they are lost while no agent listens.
    fn advance(&mut self, now: Now, key: &PodKey) -> Vec<Out> {
        let Some(shim) = self.shims.get_mut(key) else { return Vec::new() };
        let report = match shim.advance(now.boot) {
            Change::None => return Vec::new(),
            Change::State => shim.report(),
            Change::Exited(cause, code) => {
                let exit = Exit {
                    run: shim.run,
                    outcome: Outcome {
                        exit_code: Some(code),
                        cause,
                        reason: None,
                        message: None,
                        started_at: None,
                        finished_at: now.wall,
                        log_records: 1,
                    },
                    containers: Vec::new(),
                };
                if cause == Cause::Failure {
                    self.failed.push(key.pod.uid.clone());
                }
                self.exits.insert((key.clone(), shim.run), exit.clone());
                self.shims.remove(key);
                // The agent hears of it by the shim's word, and once more when it sees its end.
                let (run, again) = (exit.run, Ok(exit.clone()));
                let late = if fails(&format!("late {key} {run}"), 4) { 3_000 } else { 5 };
                let gone = Event::Gone { key: key.clone(), run, exit: again };
                let told = Event::Shim { key: key.clone(), report: Report::Exited { exit } };
                return vec![Out::Later { ms: 1, event: told }, Out::Later { ms: late, event: gone }];
            }
        };
        vec![Out::Later { ms: 1, event: Event::Shim { key: key.clone(), report } }]
    }

    pub fn step(&mut self, now: Now, event: Event) -> Vec<Out> {
        let Some(agent) = &mut self.agent else { return Vec::new() };
        if self.stopped {
            self.waiting.push(event);
            return Vec::new();
        }
        let step = agent.step(now, event);
        self.perform(now, step)
    }

    /// In the history's time.
    pub fn next_wake(&self) -> Option<u64> {
        if self.paused_at.is_some() {
            return None;
        }
        let agent = self.agent.as_ref().filter(|_| !self.stopped).map(Agent::next_wake);
        let shims = self.shims.values().filter_map(Shim::next_change);
        shims.chain(agent).min().map(|at| self.clocks.comes(at))
    }

    /// Pods whose program executes right now.
    pub fn executing(&self) -> impl Iterator<Item = &PodKey> {
        self.computing().map(|(key, _)| key)
    }

    fn computing(&self) -> impl Iterator<Item = (&PodKey, &Shim)> {
        let orphans = self.orphans.iter().map(|(key, shim)| (key, shim));
        let all = self.shims.iter().chain(orphans).filter(|_| self.paused_at.is_none());
        all.filter(|(_, shim)| shim.state == ShimState::Running)
    }

    /// Asked for by the pods that execute, beyond what the machine has, without those of jobs that nobody knows.
    pub fn overload(&self, unknown: &BTreeSet<JobUid>) -> Option<MilliCpu> {
        let known = self.computing().filter(|(key, _)| !unknown.contains(&key.pod.uid));
        let asked = known.map(|(_, shim)| shim.template.resources().cpu.0).sum();
        (asked > self.cpu.0).then_some(MilliCpu(asked))
    }

    /// The orders that this node holds, and in which ledger.
    pub fn orders(&self) -> (u64, Term, Generation) {
        (self.ledgers, self.ledger.term, self.ledger.generation)
    }

    /// Pods of which anything is alive here, frozen or not.
    pub fn alive(&self) -> impl Iterator<Item = &PodKey> {
        self.shims.keys()
    }

    /// Runs of the job that failed here.
    pub fn failures(&self, uid: &JobUid) -> usize {
        self.failed.iter().filter(|failed| *failed == uid).count()
    }

    /// What a scan of the machine finds.
    fn scan(&self) -> Vec<HeldPod> {
        let held = |(key, shim): (&PodKey, &Shim)| HeldPod {
            pod: key.pod.clone(),
            epoch: key.epoch,
            run: shim.run,
            alive: true,
            granted: false,
        };
        self.shims.iter().map(held).collect()
    }
}

/// Of a pod that asks for nothing else.
const LEASE_MS: u64 = 50_000;

/// How long its pod may run without a grant; none: for ever.
fn leased(shim: &Shim) -> Option<u64> {
    Some(shim.template.on_disconnect.lease(shim.template.grace)?.0 + 2_000)
}

/// A clock that stood still for so long shows, whatever the network does to heartbeats.
const CLOCK_STOPS_MS: u64 = 25_000;
