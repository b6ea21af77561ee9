//! A made-up machine: the real agent core on a made-up disk, with shims that do what their leases say.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use berth_agent::core::ledger::{Ledger, PodKey};
use berth_agent::core::{Action, Agent, Event, Identity, NoExit, Now, Prepared, Step, Unready};
use berth_agent::task::{Exit, Lease, Order, Report, Root, Saved};
use berth_protocol::checkpoint::{CheckpointInfo, CheckpointKind, Needs};
use berth_protocol::ids::{BootId, Digest, HardwareId, LedgerId, NodeId, Run, SessionNonce};
use berth_protocol::job::{DisconnectAction, PodTemplate};
use berth_protocol::message::node::HeldPod;
use berth_protocol::pod::{Cause, Outcome, RESTORE_FAILED};
use berth_protocol::resources::{CgroupVersion, Inventory};
use berth_protocol::units::{BootMs, Bytes, MilliCpu, Millis};

/// How a run of a made-up program goes.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    pub work_ms: u64,
    pub exit_code: u8,
}

/// Checkpoints that the depot holds, and the work that is left of each.
pub type Depot = Rc<RefCell<BTreeMap<Digest, Millis>>>;

/// One in so many saves fails, and one in so many starts from a checkpoint, by its name and the node's.
const SAVES_PER_FAILURE: u8 = 8;
const RESTORES_PER_FAILURE: u8 = 12;
/// One in so many stagings never ends, and one fails.
const STAGES_PER_LATE: u8 = 4;
const STAGES_PER_FAILURE: u8 = 5;

/// Drawn from names alone, so that a history repeats itself.
fn fails(what: &str, one_in: u8) -> bool {
    let digest = Digest::of(what.as_bytes()).hex();
    u8::from_str_radix(&digest[..2], 16).is_ok_and(|byte| byte % one_in == 0)
}

/// What the kernel and the shim together know of one run.
#[derive(Debug, Clone)]
pub struct Shim {
    pub run: Run,
    pub state: ShimState,
    template: PodTemplate,
    deadline: Option<BootMs>,
    /// By order, not by the lease.
    paused: bool,
    /// Saved, and to stand still until it is stopped or released.
    held: bool,
    /// How the last save ended.
    last_save: Option<Report>,
    /// It begins from a checkpoint.
    restore: bool,
    /// Work that is left, as of `since`.
    left: Millis,
    since: BootMs,
    exit_code: u8,
    /// berth ends it then.
    kill_at: Option<BootMs>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShimState {
    Created,
    Running,
    Frozen,
}

pub struct Node {
    pub id: NodeId,
    pub agent: Option<Agent>,
    /// What is on disk: survives the agent and the machine.
    ledger: Ledger,
    /// Processes: survive the agent, not the machine.
    pub shims: BTreeMap<PodKey, Shim>,
    exits: BTreeMap<(PodKey, Run), Exit>,
    /// The work left in checkpoints on this disk.
    saved: BTreeMap<(PodKey, u64), Millis>,
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
            saved: BTreeMap::new(),
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
        };
        let (agent, step) = Agent::start(self.ledger.clone(), identity, self.inventory(), now);
        self.agent = Some(agent);
        let mut out = self.perform(now, step);
        out.extend(self.step(now, Event::BusUp));
        out
    }

    /// `kill -9` of the agent.
    pub fn crash(&mut self) {
        self.agent = None;
    }

    /// The machine loses power: processes end, the disk stays.
    pub fn power_cut(&mut self) {
        self.agent = None;
        self.shims.clear();
        self.boot += 1;
    }

    /// Time passes for the processes.
    pub fn advance_all(&mut self, now: Now) -> Vec<Out> {
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
        let step = agent.step(now, event);
        self.perform(now, step)
    }

    pub fn next_wake(&self) -> Option<BootMs> {
        let agent = self.agent.as_ref().map(Agent::next_wake);
        let shims = self.shims.values().filter_map(Shim::next_change);
        shims.chain(agent).min()
    }

    /// Pods whose program executes right now.
    pub fn executing(&self) -> impl Iterator<Item = &PodKey> {
        self.shims.iter().filter(|(_, shim)| shim.state == ShimState::Running).map(|(key, _)| key)
    }

    pub fn held(&self) -> Vec<HeldPod> {
        let held = |(key, shim): (&PodKey, &Shim)| HeldPod {
            pod: key.pod.clone(),
            epoch: key.epoch,
            run: shim.run,
            alive: true,
        };
        self.shims.iter().map(held).collect()
    }

    fn perform(&mut self, now: Now, step: Step) -> Vec<Out> {
        for record in &step.records {
            self.ledger.apply(record);
        }
        let mut out = Vec::new();
        for action in step.actions {
            let later = |ms, event| Out::Later { ms, event };
            match action {
                Action::Hello(_) | Action::Heartbeat(_) | Action::Events(_) => out.push(Out::Send(action)),
                Action::Prepare { key, template, from } => {
                    let result = self.prepare(&template, from);
                    out.push(later(20, Event::Prepared { key, result }));
                }
                Action::Launch(launch) => {
                    let program = program(&launch.template);
                    let from = self.ledger.pods.get(&launch.key).and_then(|entry| entry.desired.from);
                    let left = from
                        .filter(|_| launch.restore)
                        .and_then(|from| self.depot.borrow().get(&from).copied());
                    let shim = Shim {
                        run: launch.run,
                        state: ShimState::Created,
                        template: launch.template,
                        deadline: None,
                        paused: false,
                        held: false,
                        last_save: None,
                        restore: launch.restore,
                        left: left.unwrap_or(Millis(program.work_ms)),
                        exit_code: program.exit_code,
                        kill_at: None,
                        since: now.boot,
                    };
                    self.shims.insert(launch.key.clone(), shim);
                    let report = Report::Created { run: launch.run };
                    out.push(later(10, Event::Shim { key: launch.key, report }));
                }
                Action::Order { key, order: Order::Save { level, hold } } => {
                    out.extend(self.advance(now, &key));
                    let Some(shim) = self.shims.get_mut(&key) else { continue };
                    let report = shim.save(now, &key, level, hold);
                    if matches!(report, Report::Saved { .. }) {
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
    fn prepare(&mut self, template: &PodTemplate, from: Option<Digest>) -> Result<Prepared, Unready> {
        if let Some(from) = from {
            if !self.depot.borrow().contains_key(&from) {
                self.lacking.push(from);
            }
            if fails(&format!("{from}/{}", self.id), RESTORES_PER_FAILURE) {
                let (reason, message) = (RESTORE_FAILED.to_owned(), "drawn".to_owned());
                return Err(Unready { reason, message, retriable: false, elsewhere: true });
            }
        }
        let roots = vec![Root::Host; template.containers.len()];
        Ok(Prepared { roots, volumes: Vec::new(), workspace: None })
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

enum Change {
    None,
    State,
    Exited(Cause, u8),
}

impl Shim {
    fn order(&mut self, now: BootMs, order: Order) {
        match order {
            Order::Start { lease } if self.state == ShimState::Created => {
                self.grant(lease);
                self.since = now;
                self.state = ShimState::Running;
            }
            Order::Start { lease } | Order::Renew { lease } => self.grant(lease),
            Order::Pause { pause } => self.paused = pause,
            Order::Stop { grace } => {
                // The made-up program ignores the stop signal for half its grace.
                let at = now.plus(Millis(grace.0 / 2));
                self.kill_at = Some(self.kill_at.map_or(at, |kill_at| kill_at.min(at)));
            }
            Order::Release => self.held = false,
            // Seen to by the node.
            Order::Follow { .. } | Order::Save { .. } => {}
        }
    }

    /// Told again what came of it, where it was asked before.
    fn save(&mut self, now: Now, key: &PodKey, level: u64, hold: bool) -> Report {
        let run = self.run;
        let of_it = |report: &Report| match report {
            Report::Saved { saved, .. } => saved.level == level,
            Report::SaveFailed { level: failed, .. } => *failed == level,
            _ => false,
        };
        if let Some(told) = self.last_save.clone().filter(of_it) {
            return told;
        }
        let report = if self.state != ShimState::Running || self.kill_at.is_some() {
            Report::SaveFailed { run, level, why: "it does not run".to_owned() }
        } else if fails(&format!("{key}/{run}/{level}"), SAVES_PER_FAILURE) {
            Report::SaveFailed { run, level, why: "drawn".to_owned() }
        } else {
            self.held = hold;
            let saved = Saved {
                level,
                at: now.wall,
                kind: CheckpointKind::Criu,
                frozen_ms: 30,
                log_records: 1,
                containers: Vec::new(),
                devices: None,
            };
            Report::Saved { run, saved }
        };
        self.last_save = Some(report.clone());
        report
    }

    fn grant(&mut self, lease: Lease) {
        self.deadline = self.deadline.max(lease.deadline);
        if lease.deadline.is_none() {
            self.deadline = None;
        }
    }

    fn fenced(&self, now: BootMs) -> bool {
        self.state != ShimState::Created && self.deadline.is_some_and(|deadline| deadline <= now)
    }

    fn report(&self) -> Report {
        let run = self.run;
        match self.state {
            ShimState::Created => Report::Created { run },
            ShimState::Running => Report::Running { run, started_at: Default::default() },
            ShimState::Frozen => Report::Paused { run, fenced: !self.paused && !self.held },
        }
    }

    fn advance(&mut self, now: BootMs) -> Change {
        let before = self.state;
        if self.state == ShimState::Running {
            self.left = self.left.saturating_sub(now.since(self.since));
        }
        self.since = now;
        if self.kill_at.is_some_and(|at| at <= now) {
            return Change::Exited(Cause::Eviction, 143);
        }
        if self.state == ShimState::Running && self.left == Millis::ZERO {
            let cause = if self.exit_code == 0 { Cause::Success } else { Cause::Failure };
            return Change::Exited(cause, self.exit_code);
        }
        if self.state != ShimState::Created {
            let fenced = self.fenced(now);
            if fenced
                && self.template.on_disconnect.action == DisconnectAction::Stop
                && self.kill_at.is_none()
            {
                self.kill_at = Some(now.plus(Millis(self.template.grace.0 / 2)));
            }
            let freeze = self.template.on_disconnect.action == DisconnectAction::Pause && fenced;
            self.state =
                if freeze || self.paused || self.held { ShimState::Frozen } else { ShimState::Running };
        }
        if self.state == before { Change::None } else { Change::State }
    }

    fn next_change(&self) -> Option<BootMs> {
        let work = (self.state == ShimState::Running).then(|| self.since.plus(self.left));
        let fence = self.deadline.filter(|_| self.state == ShimState::Running);
        [work, fence, self.kill_at].into_iter().flatten().min()
    }
}

/// The program that a template names: `["work", "MS", "CODE"]`.
fn program(template: &PodTemplate) -> Program {
    let number =
        |at: usize| template.containers.first().and_then(|c| c.command.get(at)?.parse().ok()).unwrap_or(0);
    Program { work_ms: number(1), exit_code: u8::try_from(number(2)).unwrap_or(1) }
}
