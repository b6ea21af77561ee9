//! A made-up machine: the real agent core on a made-up disk, with shims that do what their leases say.

use std::collections::BTreeMap;

use berth_agent::core::ledger::{Ledger, PodKey};
use berth_agent::core::{Action, Agent, Event, Identity, Now, Prepared, Step};
use berth_agent::task::{Exit, Lease, Order, Report, Root};
use berth_protocol::ids::{BootId, HardwareId, LedgerId, NodeId, Run, SessionNonce};
use berth_protocol::job::{DisconnectAction, PodTemplate};
use berth_protocol::message::node::HeldPod;
use berth_protocol::pod::{Cause, Outcome};
use berth_protocol::resources::{CgroupVersion, Inventory};
use berth_protocol::units::{BootMs, Bytes, MilliCpu, Millis};

/// How a run of a made-up program goes.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    pub work_ms: u64,
    pub exit_code: u8,
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
    pub fn new(id: NodeId, cpu: MilliCpu) -> Self {
        Self {
            id,
            agent: None,
            ledger: Ledger::default(),
            shims: BTreeMap::new(),
            exits: BTreeMap::new(),
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
            criu: None,
            gpus: Vec::new(),
            gpu_driver: None,
            cuda: None,
            labels: Default::default(),
            taints: Default::default(),
            host_image: true,
            bridge: true,
            agent_version: "0".into(),
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
                Action::Prepare { key, template, .. } => {
                    let prepared = Prepared {
                        roots: vec![Root::Host; template.containers.len()],
                        volumes: Vec::new(),
                        workspace: None,
                    };
                    out.push(later(20, Event::Prepared { key, result: Ok(prepared) }));
                }
                Action::Launch(launch) => {
                    let program = program(&launch.template);
                    let shim = Shim {
                        run: launch.run,
                        state: ShimState::Created,
                        template: launch.template,
                        deadline: None,
                        paused: false,
                        left: Millis(program.work_ms),
                        exit_code: program.exit_code,
                        kill_at: None,
                        since: now.boot,
                    };
                    self.shims.insert(launch.key.clone(), shim);
                    let report = Report::Created { run: launch.run };
                    out.push(later(10, Event::Shim { key: launch.key, report }));
                }
                // Its nodes have no CRIU.
                Action::Order { key, order: Order::Save { level, .. } } => {
                    if let Some(run) = self.shims.get(&key).map(|shim| shim.run) {
                        let why = "no CRIU".to_owned();
                        let report = Report::SaveFailed { run, level, why };
                        out.push(later(5, Event::Shim { key, report }));
                    }
                }
                Action::Order { key, order } => {
                    if let Some(shim) = self.shims.get_mut(&key) {
                        shim.order(now.boot, order);
                        out.extend(self.advance(now, &key));
                    }
                }
                Action::Adopt { key, run } | Action::Kill { key, run } if !self.shims.contains_key(&key) => {
                    let exit = self.exits.get(&(key.clone(), run)).cloned();
                    out.push(later(5, Event::Gone { key, exit, why: None }));
                }
                Action::Adopt { key, .. } => {
                    let shim = &self.shims[&key];
                    let report = shim.report();
                    out.push(later(5, Event::Shim { key, report }));
                }
                Action::Kill { key, .. } => {
                    self.shims.remove(&key);
                    out.push(later(5, Event::Gone { key, exit: None, why: None }));
                }
                Action::StoreLog { key } => out.push(later(5, Event::LogStored { key, stored: true })),
                Action::StoreOutputs { key } => {
                    out.push(later(5, Event::OutputsStored { key, result: Ok(None) }));
                }
                Action::CancelPrepare { .. }
                | Action::Drop { .. }
                | Action::Depot(_)
                | Action::StoreCheckpoint { .. }
                | Action::Warn(_) => {}
            }
        }
        out
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
            Order::Follow { .. } | Order::Save { .. } | Order::Release => {}
        }
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
            ShimState::Frozen => Report::Paused { run, fenced: !self.paused },
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
            self.state = if freeze || self.paused { ShimState::Frozen } else { ShimState::Running };
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
