//! A made-up machine: the real agent core on a made-up disk, with shims that do what their leases say.

mod shim;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use berth_agent::core::ledger::{Ledger, PodKey};
use berth_agent::core::{Action, Agent, Event, Identity, NoExit, Now, Prepared, Step, Unready};
use berth_agent::task::{Exit, Order, Report, Root, Saved};
use berth_protocol::checkpoint::{CheckpointInfo, Needs};
use berth_protocol::ids::{
    BootId, Digest, Generation, HardwareId, JobUid, LedgerId, NodeId, Run, SessionNonce, Term,
};
use berth_protocol::job::PodTemplate;
use berth_protocol::message::node::HeldPod;
use berth_protocol::pod::{Cause, Outcome, RESTORE_FAILED};
use berth_protocol::resources::{CgroupVersion, Inventory};
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::{BootMs, Bytes, MilliCpu, Millis};

use self::shim::{Change, Shim, ShimState};

/// Checkpoints that the depot holds, and the work that is left of each.
pub type Depot = Rc<RefCell<BTreeMap<Digest, Millis>>>;

/// One in so many starts from a checkpoint fails, by its name and the node's.
const RESTORES_PER_FAILURE: u8 = 12;
/// One in so many stagings never ends, and one fails.
const STAGES_PER_LATE: u8 = 4;
const STAGES_PER_FAILURE: u8 = 5;

/// Drawn from names alone, so that a history repeats itself.
fn fails(what: &str, one_in: u8) -> bool {
    let digest = Digest::of(what.as_bytes()).hex();
    u8::from_str_radix(&digest[..2], 16).is_ok_and(|byte| byte % one_in == 0)
}

pub struct Node {
    pub id: NodeId,
    pub agent: Option<Agent>,
    /// What is on disk: survives the agent and the machine.
    ledger: Ledger,
    /// Processes: survive the agent, not the machine.
    shims: BTreeMap<PodKey, Shim>,
    exits: BTreeMap<(PodKey, Run), Exit>,
    /// Pods whose shim is dead, should they outlive it: they compute, and nobody can fence them.
    orphans: Vec<(PodKey, Shim)>,
    /// A run was begun while another of the same epoch had not ended.
    pub launched_twice: Vec<PodKey>,
    /// The agent is stopped: what comes waits.
    pub stopped: bool,
    waiting: Vec<Event>,
    /// The agent is killed at the next step that acts, once so much of it is done.
    dies_after: Option<usize>,
    /// The work left in checkpoints on this disk.
    saved: BTreeMap<(PodKey, u64), Millis>,
    /// And in those that a next run is about to begin from.
    resumes: BTreeMap<PodKey, Millis>,
    depot: Depot,
    /// Orders that named a checkpoint which the depot did not hold.
    pub lacking: Vec<Digest>,
    boot: u64,
    sessions: u64,
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
            id,
            agent: None,
            ledger: Ledger::default(),
            shims: BTreeMap::new(),
            exits: BTreeMap::new(),
            orphans: Vec::new(),
            launched_twice: Vec::new(),
            stopped: false,
            waiting: Vec::new(),
            dies_after: None,
            saved: BTreeMap::new(),
            resumes: BTreeMap::new(),
            depot,
            lacking: Vec::new(),
            boot: 1,
            sessions: 0,
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
            cpu_model: String::new(),
            cpu_features: Default::default(),
            cgroup: CgroupVersion::V2,
            criu: Some("4.1".into()),
            gpus: Vec::new(),
            gpu_driver: None,
            saves_gpus: false,
            cuda: None,
            labels: Default::default(),
            taints: Default::default(),
            host_image: true,
            bridge: true,
            agent_version: "0".into(),
            images: Default::default(),
        }
    }

    /// The agent starts, on the ledger that the disk has.
    pub fn start(&mut self, now: Now) -> Vec<Out> {
        self.sessions += 1;
        let name = |kind: &str, n: u64| format!("{kind}-{}-{n}", self.id);
        let identity = Identity {
            hardware: HardwareId::parse(&name("hw", 0)).expect("a token"),
            boot: BootId::parse(&name("boot", self.boot)).expect("a token"),
            nonce: SessionNonce::parse(&name("s", self.sessions)).expect("a token"),
            ledger: LedgerId::parse(&name("l", 0)).expect("a token"),
            damaged: false,
            chunks: None,
        };
        let (agent, step) = Agent::start(self.ledger.clone(), identity, self.inventory(), now);
        self.agent = Some(agent);
        let mut out = self.perform(now, step);
        self.heard_late();
        out.extend(self.step(now, Event::BusUp));
        out
    }

    /// `kill -9` of the agent.
    pub fn crash(&mut self) {
        self.agent = None;
        (self.stopped, self.dies_after) = (false, None);
        self.waiting.clear();
        // One failure at a time: of shim and agent one can fence.
        for shim in self.shims.values_mut() {
            (shim.hangs, shim.granted) = (false, false);
        }
    }

    /// `kill -9` of the agent in the middle of the next step that acts.
    pub fn crash_after(&mut self, actions: usize) {
        self.dies_after = Some(actions);
    }

    /// The faults are over.
    pub fn live_on(&mut self) {
        self.dies_after = None;
    }

    /// Orders that were long on their way may name a checkpoint let go since; they are replaced before they matter.
    pub fn heard_late(&mut self) {
        self.lacking.clear();
    }

    /// SIGSTOP.
    pub fn stop(&mut self) {
        self.stopped = self.agent.is_some();
        self.shims.values_mut().for_each(|shim| shim.hangs = false);
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
        self.heard_late();
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

    /// The machine loses power: processes end, the disk stays.
    pub fn power_cut(&mut self) {
        self.crash();
        self.shims.clear();
        self.orphans.clear();
        self.boot += 1;
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
                self.exits.insert((key.clone(), shim.run), exit.clone());
                self.shims.remove(key);
                Report::Exited { exit }
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

    pub fn next_wake(&self) -> Option<BootMs> {
        let agent = self.agent.as_ref().filter(|_| !self.stopped).map(Agent::next_wake);
        let shims = self.shims.values().filter_map(Shim::next_change);
        shims.chain(agent).min()
    }

    /// Pods whose program executes right now.
    pub fn executing(&self) -> impl Iterator<Item = &PodKey> {
        self.computing().map(|(key, _)| key)
    }

    fn computing(&self) -> impl Iterator<Item = (&PodKey, &Shim)> {
        let orphans = self.orphans.iter().map(|(key, shim)| (key, shim));
        self.shims.iter().chain(orphans).filter(|(_, shim)| shim.state == ShimState::Running)
    }

    /// Asked for by the pods that execute, beyond what the machine has.
    pub fn overload(&self) -> Option<MilliCpu> {
        let asked = self.computing().map(|(_, shim)| shim.template.resources().cpu.0).sum();
        (asked > self.cpu.0).then_some(MilliCpu(asked))
    }

    /// The orders that this node holds.
    pub fn orders(&self) -> (Term, Generation) {
        (self.ledger.term, self.ledger.generation)
    }

    /// Pods of which anything is alive here, frozen or not.
    pub fn alive(&self) -> impl Iterator<Item = &PodKey> {
        self.shims.keys()
    }

    /// Runs of the job that failed here.
    pub fn failures(&self, uid: &JobUid) -> usize {
        let failed =
            |(key, exit): (&PodKey, &Exit)| key.pod.uid == *uid && exit.outcome.cause == Cause::Failure;
        self.exits.iter().filter(|((key, _), exit)| failed((key, exit))).count()
    }

    /// What a scan of the machine finds.
    fn scan(&self) -> Vec<HeldPod> {
        let held = |(key, shim): (&PodKey, &Shim)| HeldPod {
            pod: key.pod.clone(),
            epoch: key.epoch,
            run: shim.run,
            alive: true,
        };
        self.shims.iter().map(held).collect()
    }

    fn perform(&mut self, now: Now, step: Step) -> Vec<Out> {
        let mut actions = step.actions;
        let dies = self.dies_after.filter(|_| !actions.is_empty() && !step.records.is_empty());
        for record in &step.records {
            self.ledger.apply(record);
        }
        if let Some(done) = dies {
            actions.truncate(done);
            self.crash();
        }
        let mut out = Vec::new();
        for action in actions {
            let later = |ms, event| Out::Later { ms, event };
            match action {
                Action::Hello(mut hello) => {
                    let alive = self.scan();
                    let found =
                        |pod: &HeldPod| alive.iter().any(|a| a.pod == pod.pod && a.epoch == pod.epoch);
                    hello.pods.retain(|pod| !found(pod));
                    hello.pods.extend(alive);
                    out.push(Out::Send(Action::Hello(hello)));
                }
                Action::Heartbeat(_) | Action::Events(_) => out.push(Out::Send(action)),
                Action::Prepare { key, template, from, kept } => {
                    let result = self.prepare(&key, &template, from, kept);
                    out.push(later(20, Event::Prepared { key, result }));
                }
                Action::Launch(launch) => {
                    let from = self.ledger.pods.get(&launch.key).and_then(|entry| entry.desired.from);
                    let own = self.resumes.remove(&launch.key);
                    let left = from
                        .filter(|_| launch.restore)
                        .and_then(|from| self.depot.borrow().get(&from).copied());
                    let left = own.or(left);
                    let mut shim = Shim::new(&launch.key, launch.run, launch.template, now.boot);
                    (shim.restore, shim.left) = (launch.restore, left.unwrap_or(shim.left));
                    if self.shims.contains_key(&launch.key) {
                        self.launched_twice.push(launch.key.clone());
                    }
                    self.shims.insert(launch.key.clone(), shim);
                    let report = Report::Created { run: launch.run };
                    out.push(later(10, Event::Shim { key: launch.key, report }));
                }
                Action::Order { key, order: Order::Save { level, hold } } => {
                    out.extend(self.advance(now, &key));
                    let Some(shim) = self.shims.get_mut(&key).filter(|shim| !shim.hangs) else { continue };
                    let report = shim.save(now, &key, level, hold);
                    if matches!(report, Report::Saved { .. }) {
                        self.saved.retain(|(of, _), _| *of != key);
                        self.saved.insert((key.clone(), level), shim.left);
                    }
                    out.push(later(30, Event::Shim { key: key.clone(), report }));
                    out.extend(self.advance(now, &key));
                }
                Action::StoreCheckpoint { key, run, saved, .. } => {
                    let Some(left) = self.saved.get(&(key.clone(), saved.level)) else { continue };
                    let id = Digest::of(format!("{key}/{run}/{}", saved.level).as_bytes());
                    self.depot.borrow_mut().insert(id, *left);
                    let result = Ok(Box::new(info(id, &saved)));
                    out.push(later(200, Event::CheckpointStored { key, level: saved.level, result }));
                }
                Action::Order { key, order } => {
                    if let Some(shim) = self.shims.get_mut(&key) {
                        let begins = shim.state == ShimState::Created && matches!(order, Order::Start { .. });
                        if begins && shim.restore {
                            let report = Report::Restoring { run: shim.run };
                            out.push(later(1, Event::Shim { key: key.clone(), report }));
                        }
                        if begins {
                            let report = Report::Running { run: shim.run, started_at: now.wall };
                            out.push(later(3, Event::Shim { key: key.clone(), report }));
                        }
                        shim.order(now.boot, order);
                        out.extend(self.advance(now, &key));
                    }
                }
                Action::Adopt { key, run } | Action::Kill { key, run } if !self.shims.contains_key(&key) => {
                    let exit = self.exits.get(&(key.clone(), run)).cloned().ok_or_else(NoExit::default);
                    out.push(later(5, Event::Gone { key, run, exit }));
                }
                Action::Adopt { key, .. } => {
                    let shim = &self.shims[&key];
                    let said = [Some(shim.report()), shim.last_save.clone()].into_iter().flatten();
                    out.extend(said.map(|report| later(5, Event::Shim { key: key.clone(), report })));
                }
                Action::Kill { key, run } => {
                    self.shims.remove(&key);
                    out.push(later(5, Event::Gone { key, run, exit: Err(NoExit::default()) }));
                }
                Action::StoreLog { key } => out.push(later(5, Event::LogStored { key, stored: true })),
                Action::StoreOutputs { key } => {
                    out.push(later(5, Event::OutputsStored { key, result: Ok(None) }));
                }
                Action::Stage { key, from, .. } => {
                    let (drawn, why) = (format!("{key}/{}", self.id), "drawn".to_owned());
                    // Some take longer than anybody waits.
                    if !fails(&drawn, STAGES_PER_LATE) {
                        let result = if fails(&drawn, STAGES_PER_FAILURE) { Err(why) } else { Ok(()) };
                        out.push(later(500, Event::Staged { key, from, result }));
                    }
                }
                Action::KeepCheckpoint { .. }
                | Action::CancelPrepare { .. }
                | Action::CancelStage { .. }
                | Action::Drop { .. }
                | Action::Depot(_)
                | Action::Warn(_) => {}
            }
        }
        out
    }
}

impl Node {
    fn prepare(
        &mut self,
        key: &PodKey,
        template: &PodTemplate,
        from: Option<Digest>,
        kept: bool,
    ) -> Result<Prepared, Unready> {
        let own = self.saved.range((key.clone(), 0)..=(key.clone(), u64::MAX)).next_back();
        let own = own.map(|(_, left)| *left).filter(|_| kept);
        self.resumes.remove(key);
        self.resumes.extend(own.map(|left| (key.clone(), left)));
        if let Some(from) = from.filter(|_| own.is_none()) {
            if !self.depot.borrow().contains_key(&from) {
                self.lacking.push(from);
            }
            if fails(&format!("{from}/{}", self.id), RESTORES_PER_FAILURE) {
                let (reason, message) = (RESTORE_FAILED.to_owned(), "drawn".to_owned());
                return Err(Unready { reason, message, retriable: false, elsewhere: true });
            }
        }
        let roots = vec![Root::Host; template.containers.len()];
        let restore = own.is_some() || from.is_some();
        Ok(Prepared { roots, volumes: Vec::new(), workspace: None, restore })
    }
}

fn info(id: Digest, saved: &Saved) -> CheckpointInfo {
    CheckpointInfo {
        id,
        level: saved.level,
        at: saved.at,
        kind: saved.kind,
        bytes: Bytes(1 << 20),
        new_bytes: Bytes(1 << 20),
        frozen_ms: saved.frozen_ms,
        log_records: saved.log_records,
        needs: Needs::default(),
    }
}
