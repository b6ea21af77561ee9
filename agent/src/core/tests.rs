//! Orders and happenings in, what the agent does about them out.

mod alone;
mod policy;

use berth_protocol::checkpoint::{CheckpointInfo, CheckpointKind};
use berth_protocol::ids::{Epoch, Generation, JobUid, StoreId, Term};
use berth_protocol::image::ImageName;
use berth_protocol::job::{Network, RestartPolicy};
use berth_protocol::message::node::{Covers, Stage, StageState, Staged};
use berth_protocol::pod::{Cause, Goal, Outcome, VACATED};
use berth_protocol::policy::Policy;

use super::checkpoints::NotStored;
use super::*;
use crate::task::{Root, Saved};

/// An agent with the world around it played by hand.
struct Bench {
    /// The checkpoint level of the next orders.
    level: u64,
    agent: Agent,
    disk: Ledger,
    now: Now,
    generation: u64,
    hello: Option<Hello>,
    heartbeat: Option<Heartbeat>,
    /// What the next orders name as to come.
    stage: Vec<Stage>,
    /// And hand out.
    gpus: Vec<&'static str>,
    /// What the agent did at its start.
    began: Vec<String>,
}

fn template(policy: RestartPolicy) -> PodTemplate {
    let name = |text: &str| serde_json::json!(text);
    let mut template: PodTemplate = serde_json::from_value(serde_json::json!({
        "namespace": name("default"), "job": name("j"), "network": "none", "grace": 30_000,
        "containers": [{"name": "main", "image": "host", "resources": {"cpu": 100, "memory": 1 << 20},
                        "limits": {"cpu": 100, "memory": 1 << 20}}],
        "restart": {"policy": "Never", "backoffLimit": 2, "retryMin": 10_000, "retryMax": 300_000},
        "onDisconnect": {"after": 40_000, "do": "pause", "lostAfter": 60_000},
        "checkpoint": {"mode": "auto", "grace": 30_000, "tcp": "close", "keep": 3}
    }))
    .unwrap();
    template.restart.policy = policy;
    assert_eq!(template.network, Network::None);
    template
}

fn inventory() -> Inventory {
    Inventory {
        hostname: "h".into(),
        arch: "x86_64".into(),
        kernel: "6".into(),
        os: "Debian".into(),
        cpu: berth_protocol::units::MilliCpu(1000),
        memory: Bytes(1 << 30),
        disk: Bytes(1 << 30),
        host_image: true,
        bridge: true,
        agent_version: "0".into(),
        ..Inventory::unknown()
    }
}

fn key(index: u32, epoch: u64) -> PodKey {
    PodKey::new(&JobUid::parse("u").unwrap().pod(index), Epoch(epoch))
}

fn outcome(cause: Cause, code: u8) -> Outcome {
    Outcome {
        exit_code: Some(code),
        cause,
        reason: None,
        message: None,
        started_at: None,
        finished_at: Timestamp(0),
        log_records: 1,
    }
}

impl Bench {
    fn new() -> Self {
        Self::on(Ledger::default(), 1)
    }

    fn on(disk: Ledger, session: u64) -> Self {
        Self::at(disk, session, "hw", Timestamp(1_000_000))
    }

    fn at(disk: Ledger, session: u64, hardware: &str, wall: Timestamp) -> Self {
        let rules = Policy { host_image: true, ..Policy::default() };
        Self::granting(rules, disk, session, hardware, wall)
    }

    fn granting(rules: Policy, disk: Ledger, session: u64, hardware: &str, wall: Timestamp) -> Self {
        let identity = Identity {
            hardware: HardwareId::parse(hardware).unwrap(),
            boot: BootId::parse("b").unwrap(),
            nonce: SessionNonce::parse(&format!("n{session}")).unwrap(),
            ledger: LedgerId::parse("l").unwrap(),
            damaged: false,
            chunks: None,
            found: Vec::new(),
            granted: Granted { rules, ..Granted::default() },
        };
        let now = Now { wall, boot: BootMs(1_000_000) };
        let (agent, step) = Agent::start(disk.clone(), identity, inventory(), now);
        let (generation, began, gpus) = (disk.generation.0, Vec::new(), Vec::new());
        let mut bench = Self {
            agent,
            disk,
            now,
            generation,
            level: 0,
            hello: None,
            heartbeat: None,
            stage: Vec::new(),
            gpus,
            began,
        };
        bench.began = bench.take(step);
        bench.event(Event::BusUp);
        bench
    }

    /// Keeps the records, as a disk would, and returns the actions as one line each.
    fn take(&mut self, step: Step) -> Vec<String> {
        for record in &step.records {
            self.disk.apply(record);
        }
        assert_eq!(&self.disk, self.agent.ledger(), "the disk holds what the agent knows");
        let mut lines = Vec::new();
        for action in step.actions {
            lines.push(match action {
                Action::Hello(hello) => {
                    self.hello = Some(*hello);
                    "hello".into()
                }
                Action::Heartbeat(heartbeat) => {
                    self.heartbeat = Some(*heartbeat);
                    continue;
                }
                Action::Events(events) => {
                    for event in events.events {
                        if let NodeEvent::Pod(event) = event.event {
                            let what = match event.change {
                                PodChange::Ended { outcome } => format!("ended {:?}", outcome.cause),
                                PodChange::Retrying { outcome, .. } => {
                                    format!("retrying {:?}", outcome.cause)
                                }
                                PodChange::Checkpointed { info } => format!("checkpointed {}", info.level),
                                other => format!("{other:?}").to_lowercase(),
                            };
                            lines.push(format!("tell {}.{} {what}", event.pod, event.epoch));
                        }
                    }
                    continue;
                }
                Action::Prepare { key, kept: true, .. } => format!("prepare {key} from what is kept"),
                Action::Prepare { key, .. } => format!("prepare {key}"),
                Action::CancelPrepare { key } => format!("cancel {key}"),
                Action::Stage { key, .. } => format!("stage {key}"),
                Action::CancelStage { key } => format!("cancel stage {key}"),
                Action::Launch(launch) => format!("launch {} run {}", launch.key, launch.run),
                Action::Order { key, order } => match order {
                    Order::Start { .. } => format!("start {key}"),
                    Order::Renew { .. } => format!("renew {key}"),
                    Order::Pause { pause } => format!("pause {key} {pause}"),
                    Order::Stop { grace } => format!("stop {key} {grace}"),
                    Order::Follow { .. } => format!("follow {key}"),
                    Order::Save { level, hold } => format!("save {key} {level} {hold}"),
                    Order::Release => format!("release {key}"),
                },
                Action::Adopt { key, .. } => format!("adopt {key}"),
                Action::Kill { key, .. } => format!("kill {key}"),
                Action::StoreLog { key } => format!("store log {key}"),
                Action::StoreOutputs { key } => format!("store outputs {key}"),
                Action::StoreCheckpoint { key, saved, .. } => {
                    format!("store checkpoint {key} {}", saved.level)
                }
                Action::KeepCheckpoint { key, level, .. } => format!("keep checkpoint {key} {level}"),
                Action::Drop { key } => format!("drop {key}"),
                Action::Depot(_) => "depot".into(),
                Action::Warn(text) => format!("warn {text}"),
            });
        }
        lines
    }

    fn event(&mut self, event: Event) -> Vec<String> {
        let step = self.agent.step(self.now, event);
        self.take(step)
    }

    fn wait(&mut self, ms: u64) -> Vec<String> {
        self.now.wall.0 += ms;
        self.now.boot.0 += ms;
        self.event(Event::Tick)
    }

    fn desired(&mut self, pods: &[(PodKey, Goal, &PodTemplate)]) -> Vec<String> {
        let mut lines = Vec::new();
        let digest = |template: &PodTemplate| Digest::of(&serde_json::to_vec(template).unwrap());
        for (_, _, template) in pods {
            let spec = Event::Spec { digest: digest(template), template: Box::new((*template).clone()) };
            lines.extend(self.event(spec));
        }
        self.generation += 1;
        let pods = pods.iter().map(|(key, goal, template)| DesiredPod {
            pod: key.pod.clone(),
            epoch: key.epoch,
            spec: digest(template),
            goal: *goal,
            checkpoint: self.level,
            from: None,
            gpus: self.gpus.iter().map(|uuid| GpuShare { uuid: (*uuid).into(), milli: 1000 }).collect(),
            failures: 0,
            restarts: 0,
        });
        let desired = Desired {
            store: StoreId::parse("s").unwrap(),
            term: Term(1),
            generation: Generation(self.generation),
            nonce: None,
            pods: pods.collect(),
            stage: self.stage.clone(),
        };
        lines.extend(self.event(Event::Desired(desired)));
        lines
    }

    /// Grants all that the last heartbeat asked for, and acknowledges all events.
    fn grant(&mut self) -> Vec<String> {
        let lease = self.answer(1);
        self.event(Event::Lease(lease))
    }

    /// What a controller of this term says to the last heartbeat.
    fn answer(&self, term: u64) -> Lease {
        let heartbeat = self.heartbeat.clone().unwrap();
        Lease {
            store: StoreId::parse("s").unwrap(),
            term: Term(term),
            nonce: heartbeat.nonce,
            seq: heartbeat.seq,
            covers: Covers::All(heartbeat.held),
            ledger: LedgerId::parse("l").unwrap(),
            acked: self.disk.last_event,
            depot: None,
            hello: false,
            refused: None,
            session: None,
        }
    }

    fn prepared(&mut self, key: &PodKey) -> Vec<String> {
        let prepared = Prepared { roots: vec![Root::Host], volumes: vec![], workspace: None, restore: false };
        self.event(Event::Prepared { key: key.clone(), result: Ok(prepared) })
    }

    fn gone(&mut self, key: &PodKey, run: u64) -> Vec<String> {
        self.event(Event::Gone { key: key.clone(), run: Run(run), exit: Err(NoExit::default()) })
    }

    /// The agent's next session, on the same disk and with no broker, as its loop runs it.
    fn alone(self, hardware: &str) -> Self {
        let session = self.disk.session + 1;
        let mut bench = Self::at(self.disk, session, hardware, self.now.wall);
        bench.event(Event::BusDown);
        bench
    }

    fn report(&mut self, key: &PodKey, report: Report) -> Vec<String> {
        self.event(Event::Shim { key: key.clone(), report })
    }

    fn exited(&mut self, key: &PodKey, run: u64, cause: Cause, code: u8) -> Vec<String> {
        let exit = Exit { run: Run(run), outcome: outcome(cause, code), containers: vec![] };
        self.report(key, Report::Exited { exit })
    }

    /// From the order to a running pod.
    fn running(template: &PodTemplate) -> Self {
        let mut bench = Self::new();
        bench.desired(&[(key(0, 1), Goal::Run, template)]);
        bench.prepared(&key(0, 1));
        bench.grant();
        bench.report(&key(0, 1), Report::Created { run: Run(1) });
        bench.report(&key(0, 1), Report::Running { run: Run(1), started_at: Timestamp(0) });
        bench.grant();
        bench
    }
}

#[test]
fn a_pod_from_order_to_end() {
    let (mut bench, template) = (Bench::new(), template(RestartPolicy::Never));
    assert_eq!(bench.desired(&[(key(0, 1), Goal::Run, &template)]), ["prepare u-0.1"]);
    assert_eq!(bench.prepared(&key(0, 1)), ["launch u-0.1 run 1", "tell u-0.1 starting"]);
    // Ready, and not granted: the program does not begin.
    assert_eq!(bench.report(&key(0, 1), Report::Created { run: Run(1) }), [] as [&str; 0]);
    assert_eq!(bench.grant(), ["start u-0.1"]);
    let running = Report::Running { run: Run(1), started_at: Timestamp(0) };
    assert_eq!(bench.report(&key(0, 1), running), ["tell u-0.1 running"]);
    bench.wait(10_000);
    assert_eq!(bench.grant(), ["renew u-0.1"]);
    let ended = bench.exited(&key(0, 1), 1, Cause::Success, 0);
    assert_eq!(ended, ["store log u-0.1", "tell u-0.1 ended Success"]);
    // Told and stored, it stays until the controller no longer names it.
    assert_eq!(bench.event(Event::LogStored { key: key(0, 1), stored: true }), ["tell u-0.1 logstored"]);
    assert_eq!(bench.desired(&[]), [] as [&str; 0]);
    assert_eq!(bench.grant(), ["drop u-0.1"]);
    assert!(bench.disk.pods.is_empty());
}

#[test]
fn the_same_orders_again_change_nothing_and_older_ones_are_ignored() {
    let template = template(RestartPolicy::Never);
    let mut bench = Bench::running(&template);
    bench.generation -= 1;
    assert_eq!(bench.desired(&[(key(0, 1), Goal::Run, &template)]), [] as [&str; 0]);
    bench.generation = 0;
    assert_eq!(bench.desired(&[(key(0, 1), Goal::Stop, &template)]), [] as [&str; 0], "the same generation");
}

#[test]
fn a_stop_before_the_start_ends_the_epoch_as_an_eviction() {
    let (mut bench, template) = (Bench::new(), template(RestartPolicy::Never));
    bench.desired(&[(key(0, 1), Goal::Run, &template)]);
    let lines = bench.desired(&[(key(0, 1), Goal::Stop, &template)]);
    assert_eq!(lines, ["cancel u-0.1", "tell u-0.1 ended Eviction"]);
}

/// Seed 80 of the simulator: a node came back with an epoch of before its job was sent again, and could not stop it for
/// want of the new spec.
#[test]
fn an_epoch_keeps_the_spec_that_it_began_with() {
    let began = template(RestartPolicy::Never);
    let mut bench = Bench::running(&began);
    let sent_again = PodTemplate { grace: Millis(7_000), ..began };
    assert_eq!(bench.desired(&[(key(0, 1), Goal::Stop, &sent_again)]), ["stop u-0.1 30s"]);
}

#[test]
fn failures_are_retried_with_growing_pauses_until_the_limit() {
    let template = template(RestartPolicy::OnFailure);
    let mut bench = Bench::running(&template);
    let mut pauses = Vec::new();
    for run in 1..=2 {
        assert_eq!(bench.exited(&key(0, 1), run, Cause::Failure, 1), ["tell u-0.1 retrying Failure"]);
        let begin = bench.now.boot;
        while !bench.wait(250).iter().any(|line| line.starts_with("launch")) {
            assert!(bench.now.boot.since(begin) < Millis(60_000), "never started again");
            bench.grant();
        }
        pauses.push(bench.now.boot.since(begin).0);
        bench.grant();
        assert!(
            bench.report(&key(0, 1), Report::Created { run: Run(run + 1) }).contains(&"start u-0.1".into())
        );
    }
    assert!((9_000..10_500).contains(&pauses[0]) && (18_000..20_500).contains(&pauses[1]), "{pauses:?}");
    let lines = bench.exited(&key(0, 1), 3, Cause::Failure, 1);
    assert_eq!(lines, ["store log u-0.1", "tell u-0.1 ended Failure"]);
}

/// Seed 31 of the simulator: its agent woke up for it over and over, as long as it was not to run.
#[test]
fn a_pod_that_is_not_to_run_when_its_retry_is_due_wakes_nobody() {
    let template = template(RestartPolicy::OnFailure);
    for orders in [vec![], vec![(key(0, 1), Goal::Pause, &template)]] {
        let mut bench = Bench::running(&template);
        bench.exited(&key(0, 1), 1, Cause::Failure, 1);
        bench.desired(&orders);
        bench.wait(60_000);
        assert!(bench.agent.next_wake() > bench.now.boot);
        let lines = bench.desired(&[(key(0, 1), Goal::Run, &template)]);
        assert!(
            lines.contains(&"prepare u-0.1".into()) || lines.contains(&"launch u-0.1 run 2".into()),
            "{lines:?}"
        );
    }
}

#[test]
fn an_eviction_is_never_retried_here() {
    let mut bench = Bench::running(&template(RestartPolicy::Always));
    let lines = bench.exited(&key(0, 1), 1, Cause::Eviction, 143);
    assert_eq!(lines, ["store log u-0.1", "tell u-0.1 ended Eviction"]);
}

#[test]
fn a_newer_epoch_waits_until_the_older_is_gone() {
    let template = template(RestartPolicy::Never);
    let mut bench = Bench::running(&template);
    let both = [(key(0, 1), Goal::Run, &template), (key(0, 2), Goal::Run, &template)];
    assert_eq!(bench.desired(&both), ["stop u-0.1 0s"]);
    let lines = bench.exited(&key(0, 1), 1, Cause::Eviction, 137);
    assert_eq!(lines, ["store log u-0.1", "prepare u-0.2", "tell u-0.1 ended Eviction"]);
    // Once gone, the older epoch never comes back.
    bench.desired(&[(key(0, 2), Goal::Run, &template)]);
    bench.event(Event::LogStored { key: key(0, 1), stored: true });
    bench.grant();
    assert_eq!(bench.desired(&[(key(0, 1), Goal::Run, &template)]), [] as [&str; 0]);
}

#[test]
fn a_pod_that_orders_no_longer_name_is_frozen_not_killed() {
    let mut bench = Bench::running(&template(RestartPolicy::Never));
    assert_eq!(bench.desired(&[]), ["pause u-0.1 true"]);
}

#[test]
fn a_restarted_agent_asks_before_it_acts() {
    let template = template(RestartPolicy::Never);
    let bench = Bench::running(&template);
    let mut again = Bench::on(bench.disk.clone(), 2);
    again.generation = bench.generation;
    assert_eq!(again.desired(&[(key(0, 1), Goal::Run, &template)]), [] as [&str; 0]);
    again.grant();
    // The shim is found alive: it hears the grant; that it runs may have been missed, and is told again.
    let running = Report::Running { run: Run(1), started_at: Timestamp(0) };
    assert_eq!(again.report(&key(0, 1), running.clone()), ["renew u-0.1", "tell u-0.1 running"]);
    assert_eq!(again.report(&key(0, 1), running), [] as [&str; 0]);
}

/// The pods of the hello with which a session begins.
fn greeted(bench: &mut Bench) -> Vec<(PodKey, bool)> {
    let step = bench.agent.step(bench.now, Event::BusUp);
    let hello = step.actions.iter().find_map(|action| match action {
        Action::Hello(hello) => Some(hello.pods.clone()),
        _ => None,
    });
    hello.unwrap().into_iter().map(|pod| (PodKey::new(&pod.pod, pod.epoch), pod.alive)).collect()
}

#[test]
fn a_pod_is_held_from_its_order_to_its_end_whether_or_not_it_has_a_process() {
    let template = template(RestartPolicy::OnFailure);
    let mut bench = Bench::new();
    bench.desired(&[(key(0, 1), Goal::Run, &template)]);
    assert_eq!(greeted(&mut bench), [(key(0, 1), false)], "it is being prepared");
    let mut bench = Bench::running(&template);
    assert_eq!(
        greeted(&mut bench),
        [(key(0, 1), false)],
        "its shim tells its end, though no scan may find it yet"
    );
    bench.exited(&key(0, 1), 1, Cause::Failure, 1);
    assert_eq!(greeted(&mut bench), [(key(0, 1), false)], "its next run is due later");
    let mut again = Bench::on(bench.disk.clone(), 2);
    assert_eq!(greeted(&mut again), [(key(0, 1), false)], "a restart changes nothing about that");
    let mut bench = Bench::on(Bench::running(&template).disk, 2);
    assert_eq!(greeted(&mut bench), [(key(0, 1), false)], "looked for; its end would be told");
    bench.event(Event::Gone { key: key(0, 1), run: Run(1), exit: Err(NoExit::default()) });
    assert_eq!(greeted(&mut bench), []);
}

#[test]
fn the_late_end_of_an_earlier_runs_supervisor_ends_no_later_run() {
    let mut bench = Bench::running(&template(RestartPolicy::OnFailure));
    bench.exited(&key(0, 1), 1, Cause::Failure, 1);
    while !bench.wait(1_000).iter().any(|line| line.starts_with("launch")) {}
    let late = Event::Gone { key: key(0, 1), run: Run(1), exit: Err(NoExit::default()) };
    assert_eq!(bench.event(late), [] as [&str; 0]);
}

#[test]
fn orders_that_a_lost_connection_may_have_swallowed_are_given_again() {
    let template = template(RestartPolicy::Never);
    let mut bench = Bench::running(&template);
    assert_eq!(bench.desired(&[(key(0, 1), Goal::Stop, &template)]), ["stop u-0.1 30s"]);
    assert_eq!(bench.event(Event::Reconnected { key: key(0, 1) }), [] as [&str; 0]);
    let running = Report::Running { run: Run(1), started_at: Timestamp(0) };
    let lines = bench.report(&key(0, 1), running);
    assert_eq!(lines, ["renew u-0.1", "stop u-0.1 30s", "tell u-0.1 running"]);
}

#[test]
fn events_lost_on_the_disk_do_not_keep_back_the_later_ones() {
    let mut bench = Bench::running(&template(RestartPolicy::Never));
    bench.event(Event::BusDown);
    bench.exited(&key(0, 1), 1, Cause::Success, 0);
    bench.event(Event::LogStored { key: key(0, 1), stored: true });
    let mut disk = bench.disk.clone();
    assert_eq!(disk.outbox.len(), 2);
    disk.outbox.pop_front();
    let (acked, last) = (disk.acked(), disk.last_event);
    let records = disk.mended(LedgerId::parse("l2").unwrap());
    records.iter().for_each(|record| disk.apply(record));
    assert_eq!(disk.id, Some(LedgerId::parse("l2").unwrap()));
    assert_eq!((disk.outbox.len(), disk.acked(), disk.last_event), (1, last, last + 1), "was {acked}");
    let ended = disk.pods[&key(0, 1)].ended.as_ref().unwrap();
    assert_eq!(ended.event, disk.last_event, "the directory stays until that is acknowledged");
}

#[test]
fn a_shim_that_is_gone_without_a_word_is_an_eviction() {
    let mut bench = Bench::running(&template(RestartPolicy::OnFailure));
    let lines = bench.event(Event::Gone { key: key(0, 1), run: Run(1), exit: Err(NoExit::default()) });
    assert_eq!(lines, ["tell u-0.1 ended Eviction"]);
}

#[test]
fn what_a_pod_has_said_outlives_a_shim_that_dies_and_a_run_that_never_begins() {
    let never = template(RestartPolicy::Never);
    let mut bench = Bench::running(&never);
    let exit = Err(NoExit { why: None, log_records: 23 });
    let lines = bench.event(Event::Gone { key: key(0, 1), run: Run(1), exit });
    assert_eq!(lines, ["store log u-0.1", "tell u-0.1 ended Eviction"]);
    let retried = template(RestartPolicy::OnFailure);
    let mut bench = Bench::running(&retried);
    bench.exited(&key(0, 1), 1, Cause::Failure, 1);
    let lines = bench.desired(&[(key(0, 1), Goal::Stop, &retried)]);
    assert_eq!(lines, ["store log u-0.1", "tell u-0.1 ended Eviction"], "stopped between two runs");
}

#[test]
fn a_pod_whose_shim_does_not_end_it_is_killed() {
    let template = template(RestartPolicy::Never);
    let mut bench = Bench::running(&template);
    assert_eq!(bench.desired(&[(key(0, 1), Goal::Stop, &template)]), ["stop u-0.1 30s"]);
    let mut lines = Vec::new();
    for _ in 0..100 {
        bench.grant();
        lines.extend(bench.wait(1_000));
    }
    assert_eq!(lines.iter().filter(|line| *line == "kill u-0.1").count(), 1, "{lines:?}");
}

#[test]
fn a_pod_past_its_lease_is_killed_where_its_shim_does_not_fence_it() {
    let mut bench = Bench::running(&template(RestartPolicy::Never));
    bench.event(Event::BusDown);
    assert_eq!(bench.wait(49_000), [] as [&str; 0]);
    let lines = bench.wait(3_000);
    assert!(lines.contains(&"kill u-0.1".to_owned()), "{lines:?}");
}

/// What the shims have done while it stood still waits to be read.
#[test]
fn an_agent_that_stood_still_past_a_lease_hears_the_shim_first() {
    let mut bench = Bench::running(&template(RestartPolicy::Never));
    bench.event(Event::BusDown);
    assert_eq!(bench.wait(70_000), [] as [&str; 0]);
    bench.report(&key(0, 1), Report::Paused { run: Run(1), fenced: true });
    assert_eq!(bench.wait(5_000), [] as [&str; 0]);

    let mut bench = Bench::running(&template(RestartPolicy::Never));
    bench.event(Event::BusDown);
    assert_eq!(bench.wait(70_000), [] as [&str; 0]);
    let wake = bench.agent.next_wake();
    assert!(bench.now.boot < wake && wake <= bench.now.boot.plus(Millis::from_secs(1)));
    let lines = bench.wait(600);
    assert!(lines.contains(&"kill u-0.1".to_owned()), "{lines:?}");
}

#[test]
fn another_store_is_not_obeyed() {
    let template = template(RestartPolicy::Never);
    let mut bench = Bench::running(&template);
    let desired = Desired {
        store: StoreId::parse("other").unwrap(),
        term: Term(9),
        generation: Generation(9),
        nonce: None,
        pods: vec![],
        stage: vec![],
    };
    let lines = bench.event(Event::Desired(desired.clone()));
    assert!(lines.len() == 1 && lines[0].starts_with("warn refused orders of store other"), "{lines:?}");

    // Nor what its own store says to another session of the node.
    let nonce = SessionNonce::parse("another").ok();
    let desired = Desired { store: StoreId::parse("s").unwrap(), nonce, ..desired };
    assert_eq!(bench.event(Event::Desired(desired)), [] as [&str; 0]);
    assert_eq!(bench.disk.generation, Generation(bench.generation));
}

#[test]
fn a_ledger_survives_its_snapshot() {
    let bench = Bench::running(&template(RestartPolicy::Never));
    let mut again = Ledger::default();
    bench.disk.snapshot().iter().for_each(|record| again.apply(record));
    assert_eq!(again, bench.disk);
}

fn saved(level: u64) -> Report {
    let saved = Saved {
        level,
        at: Timestamp(0),
        kind: CheckpointKind::Criu,
        frozen_ms: 1,
        log_records: 0,
        containers: vec![],
        devices: None,
    };
    Report::Saved { run: Run(1), saved }
}

fn stored(level: u64) -> Event {
    let info = CheckpointInfo {
        id: Digest::of(b"manifest"),
        level,
        at: Timestamp(0),
        kind: CheckpointKind::Criu,
        bytes: Bytes(1),
        new_bytes: Bytes(1),
        frozen_ms: 1,
        log_records: 0,
        needs: Default::default(),
    };
    Event::CheckpointStored { key: key(0, 1), level, result: Ok(Box::new(info)) }
}

#[test]
fn a_level_is_taken_once_and_what_failed_is_said() {
    let template = template(RestartPolicy::Never);
    let mut bench = Bench::running(&template);
    bench.level = 1;
    let orders = [(key(0, 1), Goal::Run, &template)];
    let begun = ["save u-0.1 1 false", "tell u-0.1 checkpointing { level: 1 }"];
    assert_eq!(bench.desired(&orders), begun);
    assert_eq!(bench.desired(&orders), [] as [&str; 0], "the same level");
    assert_eq!(bench.report(&key(0, 1), saved(1)), ["store checkpoint u-0.1 1"]);
    let not_yet = Err(NotStored { why: "out of reach".to_owned(), retriable: true });
    bench.event(Event::CheckpointStored { key: key(0, 1), level: 1, result: not_yet });
    assert!(bench.wait(1_000).contains(&"store checkpoint u-0.1 1".to_owned()), "tried again");
    assert_eq!(bench.event(stored(1)), ["keep checkpoint u-0.1 1", "tell u-0.1 checkpointed 1"]);
    bench.level = 2;
    bench.desired(&orders);
    let failed = Report::SaveFailed { run: Run(1), level: 2, why: "no".to_owned() };
    let said = bench.report(&key(0, 1), failed);
    assert!(said.iter().any(|line| line.starts_with("tell u-0.1 checkpointfailed")), "{said:?}");
    assert_eq!(bench.desired(&orders), [] as [&str; 0], "a level that failed is not tried again");
}

/// Whose store is a backup knows less than the one before it acknowledged.
#[test]
fn a_later_controller_hears_of_all_that_an_earlier_one_has_not_acknowledged_in_time() {
    let mut bench = Bench::running(&template(RestartPolicy::Never));
    bench.grant();
    let before = bench.disk.acked();
    bench.event(Event::Inventory(Box::new(Inventory { memory: Bytes(7), ..inventory() })));
    assert_eq!(bench.disk.outbox.len(), 1);
    let late = bench.answer(1);
    // The later one asks who is there, and is told; what the earlier one says then comes too late.
    let asks = Lease { acked: before, hello: true, ..bench.answer(2) };
    assert!(bench.event(Event::Lease(asks)).contains(&"hello".to_owned()));
    bench.event(Event::Lease(late));
    assert_eq!((bench.disk.acked(), bench.disk.outbox.len()), (before, 1));
    // Where it came in time, the next heartbeat tells a later one how far they are.
    let acked = bench.answer(2);
    bench.event(Event::Lease(acked));
    assert_eq!(bench.disk.outbox.len(), 0);
    bench.wait(10_000);
    assert_eq!(bench.heartbeat.as_ref().unwrap().events_acked, before + 1);
}

#[test]
fn a_session_names_those_before_it_that_the_controller_has_answered() {
    let mut disk = Ledger::default();
    let mut last = None;
    for session in 1..=40 {
        let mut bench = Bench::on(disk, session);
        // The third is never answered.
        if session != 3 {
            bench.grant();
        }
        (disk, last) = (bench.disk, bench.hello);
    }
    let hello = last.unwrap();
    assert_eq!(hello.previous.unwrap().as_str(), "n39");
    let earlier: Vec<&str> = hello.earlier.iter().map(|nonce| nonce.as_str()).collect();
    assert_eq!((earlier.len(), earlier[0], earlier[30]), (31, "n8", "n38"), "as many as are kept");
    let disk = disk.snapshot().iter().fold(Ledger::default(), |mut disk, record| {
        disk.apply(record);
        disk
    });
    assert_eq!(disk.known.len(), 32, "a snapshot keeps them");
    let mut second = Bench::on(Ledger::default(), 1);
    second.grant();
    let third = Bench::on(second.disk, 2);
    let fourth = Bench::on(third.disk, 3).hello.unwrap();
    assert_eq!((fourth.previous.unwrap().as_str(), fourth.earlier), ("n1", Vec::new()), "not one unanswered");
}

#[test]
fn where_a_later_session_is_known_this_one_counts_on_from_that() {
    let mut bench = Bench::running(&template(RestartPolicy::Never));
    let refused = |bench: &Bench, session| {
        Event::Lease(Lease { refused: Some("no".to_owned()), session, ..bench.answer(1) })
    };
    let session = bench.disk.session;
    for known in [None, Some(session - 1), Some(u64::MAX)] {
        let said = refused(&bench, known);
        assert!(!bench.event(said).contains(&"hello".to_owned()), "{known:?}");
        assert_eq!(bench.disk.session, session);
    }
    for known in [session, session + 7] {
        let said = refused(&bench, Some(known));
        assert!(bench.event(said).contains(&"hello".to_owned()));
        assert_eq!(bench.disk.session, known + 1);
        assert_eq!(bench.hello.as_ref().unwrap().session, bench.disk.session);
    }
}

#[test]
fn a_resume_hook_that_failed_is_told() {
    let mut bench = Bench::running(&template(RestartPolicy::Never));
    let failed = |run| Report::ResumeFailed { run: Run(run), why: "no".to_owned() };
    let said = bench.report(&key(0, 1), failed(1));
    assert!(said.contains(&"tell u-0.1 resumefailed { why: \"no\" }".to_owned()), "{said:?}");
    assert_eq!(bench.report(&key(0, 1), failed(0)), [] as [&str; 0], "of an earlier run");
}

#[test]
fn a_pod_that_leaves_stands_until_its_checkpoint_is_recorded() {
    let template = template(RestartPolicy::Never);
    let mut bench = Bench::running(&template);
    bench.level = 1;
    let begun = ["save u-0.1 1 true", "tell u-0.1 checkpointing { level: 1 }"];
    assert_eq!(bench.desired(&[(key(0, 1), Goal::Vacate, &template)]), begun);
    bench.report(&key(0, 1), saved(1));
    assert_eq!(bench.report(&key(0, 1), Report::Paused { run: Run(1), fenced: false }), [] as [&str; 0]);
    assert_eq!(
        bench.event(stored(1)),
        ["keep checkpoint u-0.1 1", "tell u-0.1 checkpointed 1"],
        "not yet acknowledged"
    );
    let lines = bench.grant();
    assert!(lines.contains(&"stop u-0.1 0s".to_owned()), "{lines:?}");
    bench.exited(&key(0, 1), 1, Cause::Eviction, 137);
    let reason = bench.disk.pods[&key(0, 1)].ended.as_ref().unwrap().outcome.reason.clone();
    assert_eq!(reason.as_deref(), Some(VACATED));
}

#[test]
fn a_pod_that_stands_behind_its_checkpoint_leaves_whatever_else_is_asked_for() {
    let template = template(RestartPolicy::Never);
    for asked_early in [true, false] {
        let mut bench = Bench::running(&template);
        bench.level = 1;
        bench.desired(&[(key(0, 1), Goal::Vacate, &template)]);
        bench.report(&key(0, 1), saved(1));
        bench.report(&key(0, 1), Report::Paused { run: Run(1), fenced: false });
        let ask = |bench: &mut Bench| {
            bench.level = 2;
            bench.desired(&[(key(0, 1), Goal::Vacate, &template)])
        };
        if asked_early {
            assert_eq!(ask(&mut bench), [] as [&str; 0]);
        }
        bench.event(stored(1));
        let mut lines = bench.grant();
        lines.extend(ask(&mut bench));
        assert!(lines.contains(&"stop u-0.1 0s".to_owned()), "{lines:?}");
        bench.exited(&key(0, 1), 1, Cause::Eviction, 137);
        let reason = bench.disk.pods[&key(0, 1)].ended.as_ref().unwrap().outcome.reason.clone();
        assert_eq!(reason.as_deref(), Some(VACATED));
    }
}

#[test]
fn a_pod_that_stays_after_all_is_let_go() {
    let template = template(RestartPolicy::Never);
    let mut bench = Bench::running(&template);
    bench.level = 1;
    bench.desired(&[(key(0, 1), Goal::Vacate, &template)]);
    bench.report(&key(0, 1), saved(1));
    bench.report(&key(0, 1), Report::Paused { run: Run(1), fenced: false });
    let lines = bench.desired(&[(key(0, 1), Goal::Run, &template)]);
    assert!(lines.contains(&"release u-0.1".to_owned()), "{lines:?}");
    // One that could not be saved runs on where it is.
    let mut bench = Bench::running(&template);
    bench.level = 1;
    bench.desired(&[(key(0, 1), Goal::Vacate, &template)]);
    let failed = Report::SaveFailed { run: Run(1), level: 1, why: "no".to_owned() };
    let lines = bench.report(&key(0, 1), failed);
    assert!(lines.contains(&"release u-0.1".to_owned()), "{lines:?}");
    assert!(!bench.wait(10_000).iter().any(|line| line.starts_with("stop")));
}

#[test]
fn inventories_of_an_outage_are_told_as_one() {
    let mut bench = Bench::running(&template(RestartPolicy::Never));
    bench.event(Event::BusDown);
    for memory in 1..=40 {
        bench.event(Event::Inventory(Box::new(Inventory { memory: Bytes(memory), ..inventory() })));
    }
    let told = |bench: &Bench| -> Vec<u64> {
        let inventory = |event: &NumberedEvent| match &event.event {
            NodeEvent::Inventory(inventory) => Some(inventory.memory.0),
            NodeEvent::Pod(_) | NodeEvent::Unknown => None,
        };
        bench.disk.outbox.iter().filter_map(inventory).collect()
    };
    assert_eq!(told(&bench), [1]);
    bench.event(Event::BusUp);
    bench.grant();
    assert_eq!(told(&bench), [40], "acknowledged, and followed by the last");
    bench.grant();
    assert_eq!(told(&bench), [] as [u64; 0]);
}

#[test]
fn images_are_told_when_they_come_and_go_and_a_probe_leaves_them_alone() {
    let mut bench = Bench::running(&template(RestartPolicy::Never));
    let told = |bench: &Bench| {
        let inventory = |event: &NumberedEvent| match &event.event {
            NodeEvent::Inventory(inventory) => Some((inventory.memory.0, inventory.images.iter().count())),
            NodeEvent::Pod(_) | NodeEvent::Unknown => None,
        };
        bench.disk.outbox.iter().filter_map(inventory).collect::<Vec<_>>()
    };
    bench.grant();
    let image = |name: &str| ImageName::parse(name).unwrap();
    let one = Images::cut([image("python:3.12-slim")]);
    bench.event(Event::Images(one.clone()));
    assert_eq!(told(&bench), [(1 << 30, 1)]);
    bench.grant();
    bench.event(Event::Images(one));
    bench.event(Event::Inventory(Box::new(inventory())));
    assert!(told(&bench).is_empty(), "nothing is new");
    bench.event(Event::Inventory(Box::new(Inventory { memory: Bytes(5), ..inventory() })));
    assert_eq!(told(&bench), [(5, 1)]);
    bench.grant();
    bench.event(Event::Images(Images::default()));
    assert_eq!(told(&bench), [(5, 0)]);
}

#[test]
fn no_message_is_larger_than_one_may_be() {
    let labels = (0..64).map(|i| (format!("label-{i}"), "x".repeat(60))).collect();
    let large = Box::new(Inventory { labels, ..inventory() });
    let event = |n: u64| NumberedEvent { n, at: Timestamp(0), event: NodeEvent::Inventory(large.clone()) };
    let events: Vec<NumberedEvent> = (1..=200).map(event).collect();
    let parts = super::messages(events.clone());
    assert_eq!(parts.concat(), events);
    for part in parts {
        let bytes = serde_json::to_vec(&part).unwrap().len();
        assert!((1..=limits::EVENTS_PER_MESSAGE_MAX).contains(&part.len()));
        assert!(bytes + super::MESSAGE_HEAD_BYTES <= limits::MESSAGE_BYTES_MAX, "{bytes}");
    }
}

#[test]
fn one_found_standing_still_for_no_reason_is_let_go_on() {
    let template = template(RestartPolicy::Never);
    let mut bench = Bench::running(&template);
    bench.event(Event::Reconnected { key: key(0, 1) });
    let paused = Report::Paused { run: Run(1), fenced: false };
    let lines = bench.report(&key(0, 1), paused);
    assert!(
        lines.contains(&"release u-0.1".into()) && lines.contains(&"pause u-0.1 false".into()),
        "{lines:?}"
    );
    // One that is to stand still does.
    bench.desired(&[]);
    bench.event(Event::Reconnected { key: key(0, 1) });
    let lines = bench.report(&key(0, 1), Report::Paused { run: Run(1), fenced: false });
    assert!(!lines.iter().any(|line| line.starts_with("release") || line.ends_with("false")), "{lines:?}");
}

fn stage(index: u32, template: &PodTemplate, from: Option<&[u8]>) -> Stage {
    let key = key(index, 3);
    let spec = Digest::of(&serde_json::to_vec(template).unwrap());
    Stage { pod: key.pod, epoch: key.epoch, spec, from: from.map(Digest::of) }
}

fn is_here(index: u32, from: Option<&[u8]>, result: Result<(), String>) -> Event {
    Event::Staged { key: key(index, 3), from: from.map(Digest::of), result }
}

#[test]
fn what_is_to_come_is_brought_and_told_and_let_go_when_it_is_no_longer_named() {
    let template = template(RestartPolicy::Never);
    let mut bench = Bench::running(&template);
    let orders = [(key(0, 1), Goal::Run, &template)];
    let told = |bench: &Bench| -> Vec<(u32, StageState)> {
        let staged = bench.heartbeat.clone().unwrap().staged;
        staged.into_iter().map(|Staged { pod, epoch: _, state }| (pod.index, state)).collect()
    };
    bench.stage = [1, 2, 3].map(|index| stage(index, &template, None)).to_vec();
    assert_eq!(bench.desired(&orders), ["stage u-1.3", "stage u-2.3"], "two at once");
    let busy = [1, 2, 3].map(|index| (index, StageState::Busy));
    assert_eq!(told(&bench), busy);
    assert_eq!(bench.desired(&orders), [] as [&str; 0], "the same list");
    // Whoever waits hears of it at once, and otherwise every two seconds.
    let before = bench.heartbeat.clone().unwrap().seq;
    assert_eq!(bench.event(is_here(1, None, Ok(()))), ["stage u-3.3"]);
    assert_eq!(told(&bench)[0], (1, StageState::Ready));
    bench.event(is_here(2, None, Err("no luck".to_owned())));
    assert_eq!(told(&bench)[1], (2, StageState::Failed { why: "no luck".to_owned() }));
    assert_eq!(bench.heartbeat.clone().unwrap().seq, before + 2);
    bench.grant();
    bench.wait(2_000);
    assert_eq!(bench.heartbeat.clone().unwrap().seq, before + 3);
    bench.stage.remove(0);
    bench.stage.pop();
    assert_eq!(bench.desired(&orders), ["cancel stage u-3.3"]);
    assert_eq!(told(&bench).len(), 1);
    assert_eq!(bench.event(is_here(3, None, Ok(()))), [] as [&str; 0], "of one that nobody names");
    // Another checkpoint is another thing to bring, and word of the first one is none of it.
    bench.stage = vec![stage(4, &template, Some(b"first"))];
    bench.desired(&orders);
    bench.stage = vec![stage(4, &template, Some(b"second"))];
    assert_eq!(bench.desired(&orders), ["cancel stage u-4.3", "stage u-4.3"]);
    bench.event(is_here(4, Some(b"first"), Ok(())));
    assert_eq!(told(&bench), [(4, StageState::Busy)]);
    bench.event(is_here(4, Some(b"second"), Ok(())));
    assert_eq!(told(&bench), [(4, StageState::Ready)]);
    // What was brought ahead of a pod that has come is let go behind the begin of what that needs: a pull goes on.
    bench.stage = vec![stage(5, &template, None)];
    bench.desired(&orders);
    bench.stage.clear();
    let come = [orders[0].clone(), (key(5, 4), Goal::Run, &template)];
    assert_eq!(bench.desired(&come), ["prepare u-5.4", "cancel stage u-5.3"]);
}

#[test]
fn what_is_to_come_waits_for_its_spec_and_orders_are_not_applied_without_it() {
    let known = template(RestartPolicy::Never);
    let mut bench = Bench::running(&known);
    let orders = [(key(0, 1), Goal::Run, &known)];
    let other = template(RestartPolicy::OnFailure);
    bench.stage = vec![stage(1, &other, None)];
    assert_eq!(bench.desired(&orders), [] as [&str; 0]);
    assert_eq!(bench.heartbeat.clone().unwrap().generation.0, bench.generation - 1);
    let spec = Event::Spec {
        digest: Digest::of(&serde_json::to_vec(&other).unwrap()),
        template: Box::new(other.clone()),
    };
    assert_eq!(bench.event(spec), ["stage u-1.3"]);
    assert_eq!(bench.heartbeat.clone().unwrap().generation.0, bench.generation);
    // An agent that starts anew knows of nothing to come until it is told again.
    let mut again = Bench::on(bench.disk.clone(), 2);
    assert!(again.heartbeat.clone().unwrap().staged.is_empty());
    again.generation = bench.generation;
    again.stage = bench.stage.clone();
    assert!(again.desired(&orders).contains(&"stage u-1.3".to_owned()));
}
