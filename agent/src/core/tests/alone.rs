//! Pods whose controller is not heard, and after the machine began anew: what they do by themselves.

use berth_protocol::job::{DisconnectAction, PodTemplate, RestartPolicy};
use berth_protocol::pod::{Cause, Goal, RESTORE_FAILED};
use berth_protocol::units::{Millis, Timestamp};

use super::super::checkpoints::NotStored;
use super::super::departure::Leaves;
use super::super::{Event, Run};
use super::{Bench, key, outcome, saved, stored, template};
use crate::task::{Exit, Report, Saved};

fn continuing(interval: Option<u64>) -> PodTemplate {
    let mut template = template(RestartPolicy::Never);
    template.on_disconnect.action = DisconnectAction::Continue;
    template.checkpoint.interval = interval.map(Millis::from_secs);
    template
}

fn of_level(level: u64) -> Saved {
    match saved(level) {
        Report::Saved { saved, .. } => saved,
        other => panic!("{other:?}"),
    }
}

/// The first level of the agent's own.
const OWN: u64 = (1 << 32) + 1;

#[test]
fn a_pod_that_continues_begins_again_by_itself_after_the_machine_did() {
    let mut bench = Bench::running(&continuing(None)).alone("hw");
    assert_eq!(bench.began, ["adopt u-0.1"]);
    // No broker, and no grant since the machine began anew.
    assert_eq!(bench.gone(&key(0, 1), 1), [] as [&str; 0]);
    assert_eq!(bench.wait(1), ["prepare u-0.1 from what is kept"]);
    assert_eq!(bench.prepared(&key(0, 1)), ["launch u-0.1 run 2"]);
    assert_eq!(bench.report(&key(0, 1), Report::Created { run: Run(2) }), ["start u-0.1"]);
    bench.report(&key(0, 1), Report::Running { run: Run(2), started_at: Timestamp(0) });
    bench.wait(3_600_000);
    let told = bench.event(Event::BusUp);
    let changes = ["retrying Eviction", "starting", "running"];
    let told: Vec<&str> = told.iter().filter_map(|line| line.strip_prefix("tell u-0.1 ")).collect();
    assert_eq!(told, changes);
    // While the controller is heard it decides.
    assert_eq!(bench.grant(), ["renew u-0.1"]);
    assert_eq!(bench.gone(&key(0, 1), 2), ["tell u-0.1 ended Eviction"]);
}

/// Each thing that forbids a start without the controller does so by itself.
#[test]
fn nothing_else_begins_by_itself() {
    let ended = |mut bench: Bench| {
        let lines = bench.gone(&key(0, 1), 1);
        bench.wait(1);
        assert!(bench.disk.pods[&key(0, 1)].ended.is_some(), "{lines:?}");
        bench
    };
    // It pauses.
    ended(Bench::running(&template(RestartPolicy::Always)).alone("hw"));
    // No grant ever let it begin.
    let mut fresh = Bench::new();
    fresh.desired(&[(key(0, 1), Goal::Run, &continuing(None))]);
    fresh.prepared(&key(0, 1));
    ended(fresh.alone("hw"));
    // The controller wants it to end.
    let mut stopping = Bench::running(&continuing(None));
    stopping.desired(&[(key(0, 1), Goal::Stop, &continuing(None))]);
    ended(stopping.alone("hw"));
    // It was heard a moment ago.
    ended(Bench::running(&continuing(None)));
    // The disk is a copy, and still one when its agent is started once more.
    let clone = ended(Bench::running(&continuing(None)).alone("copy"));
    assert_eq!(
        clone.began[0],
        "warn the data directory comes from another machine: none of its pods starts here without the controller"
    );
    assert!(!clone.alone("copy").agent.is_at_home());
}

#[test]
fn a_copy_of_the_disk_starts_no_retry_either() {
    let mut template = continuing(None);
    template.restart.policy = RestartPolicy::Always;
    for (hardware, starts) in [("hw", true), ("copy", false)] {
        let mut bench = Bench::running(&template);
        bench.exited(&key(0, 1), 1, Cause::Failure, 1);
        let mut bench = bench.alone(hardware);
        bench.wait(600_000);
        bench.prepared(&key(0, 1));
        let lines = bench.report(&key(0, 1), Report::Created { run: Run(2) });
        assert_eq!(lines == ["start u-0.1"], starts, "{hardware}: {lines:?}");
        if !starts {
            // Taken for the node by its controller, it is one.
            bench.event(Event::BusUp);
            assert_eq!(bench.grant(), ["start u-0.1"]);
            assert!(bench.agent.is_at_home());
        }
    }
}

#[test]
fn failures_are_retried_without_a_controller_as_with_one() {
    let mut template = continuing(None);
    template.restart.policy = RestartPolicy::OnFailure;
    let mut bench = Bench::running(&template);
    bench.event(Event::BusDown);
    bench.wait(3_600_000);
    for run in 1..=2 {
        bench.exited(&key(0, 1), run, Cause::Failure, 1);
        bench.wait(60_000);
        assert_eq!(bench.report(&key(0, 1), Report::Created { run: Run(run + 1) }), ["start u-0.1"]);
    }
    bench.exited(&key(0, 1), 3, Cause::Failure, 1);
    assert!(bench.disk.pods[&key(0, 1)].ended.is_some(), "the limit holds");
}

#[test]
fn evictions_without_a_controller_back_off_and_what_is_kept_is_tried_once() {
    let mut bench = Bench::running(&continuing(None)).alone("hw");
    bench.gone(&key(0, 1), 1);
    bench.wait(1);
    bench.prepared(&key(0, 1));
    let mut outcome = outcome(Cause::Eviction, 1);
    outcome.reason = Some(RESTORE_FAILED.to_owned());
    let exit = Exit { run: Run(2), outcome, containers: vec![] };
    bench.report(&key(0, 1), Report::Exited { exit });
    assert_eq!(bench.wait(1), [] as [&str; 0], "it rests first");
    assert_eq!(bench.wait(60_000), ["prepare u-0.1"], "the checkpoint has failed");
    bench.prepared(&key(0, 1));
    bench.gone(&key(0, 1), 3);
    assert_eq!(bench.wait(60_000), ["prepare u-0.1 from what is kept"]);
}

#[test]
fn without_a_controller_the_interval_is_kept() {
    let mut bench = Bench::running(&continuing(Some(60)));
    // As long as grants come, whose turn it is the controller says.
    for _ in 0..30 {
        assert!(!bench.wait(10_000).iter().any(|line| line.starts_with("save")));
        bench.grant();
    }
    bench.event(Event::BusDown);
    let save = |level: u64| format!("save u-0.1 {level} false");
    assert_eq!(bench.agent.next_wake().min(bench.now.boot.plus(Millis(40_000))), bench.agent.next_wake());
    bench.wait(39_999);
    assert_eq!(bench.wait(1), [save(OWN)]);
    assert_eq!(bench.wait(60_000), [] as [&str; 0], "one at a time");
    let stores = |level: u64| format!("store checkpoint u-0.1 {level}");
    assert_eq!(bench.report(&key(0, 1), saved(OWN)), [stores(OWN)]);
    let unreachable = || NotStored { why: "no way".into(), retriable: true };
    let not_stored = |level| Event::CheckpointStored { key: key(0, 1), level, result: Err(unreachable()) };
    bench.event(not_stored(OWN));
    // The next one takes the place of the last, which the depot has not.
    let lines = bench.wait(60_000);
    assert!(lines.contains(&stores(OWN)), "{lines:?}");
    bench.event(not_stored(OWN));
    assert_eq!(bench.wait(0), [save(OWN + 1)]);
    let failed = Report::SaveFailed { run: Run(1), level: OWN + 1, why: "no room".into() };
    bench.report(&key(0, 1), failed);
    assert_eq!(
        bench.disk.pods[&key(0, 1)].checkpoints.saved,
        Some(of_level(OWN)),
        "the last one is still here"
    );
    bench.wait(60_000);
    bench.event(not_stored(OWN));
    assert_eq!(bench.wait(0), [save(OWN + 2)]);
    bench.report(&key(0, 1), saved(OWN + 2));

    // The controller is back, and has wanted one meanwhile: it gets that, once the last one is told.
    bench.event(Event::BusUp);
    bench.level = 1;
    assert_eq!(bench.desired(&[(key(0, 1), Goal::Run, &continuing(Some(60)))]), [] as [&str; 0]);
    let told = bench.event(stored(OWN + 2));
    let expect = [
        &format!("keep checkpoint u-0.1 {}", OWN + 2),
        "save u-0.1 1 false",
        "tell u-0.1 checkpointed 0",
        "tell u-0.1 checkpointing { level: 1 }",
    ];
    assert_eq!(told, expect);
}

/// One of its own is no reason to let a pod go that is to be saved as it leaves.
#[test]
fn a_pod_that_leaves_is_saved_for_it() {
    let mut bench = Bench::running(&continuing(Some(60)));
    bench.event(Event::BusDown);
    bench.wait(60_000);
    bench.report(&key(0, 1), saved(OWN));
    bench.event(stored(OWN));
    bench.event(Event::BusUp);
    bench.level = 1;
    let lines = bench.desired(&[(key(0, 1), Goal::Vacate, &continuing(Some(60)))]);
    assert!(lines.contains(&"save u-0.1 1 true".into()), "{lines:?}");
    bench.grant();
    assert!(!bench.wait(10_000).iter().any(|line| line.starts_with("stop")), "not saved yet");
}

#[test]
fn before_its_machine_goes_an_unheard_pod_is_saved() {
    let mut bench = Bench::running(&continuing(None));
    bench.event(Event::BusDown);
    assert!(!bench.wait(600_000).iter().any(|line| line.starts_with("save")));
    let at = bench.now.boot.plus(Millis::from_secs(60));
    bench.event(Event::Leaving(Some(Leaves { why: "it shuts down".into(), at })));
    assert_eq!(bench.wait(1), [format!("save u-0.1 {OWN} false")]);
    bench.report(&key(0, 1), saved(OWN));
    assert!(!bench.wait(1_000).iter().any(|line| line.starts_with("save")), "once");
    // What the shutdown then ends does not begin again before the machine does.
    bench.exited(&key(0, 1), 1, Cause::Eviction, 143);
    assert!(!bench.wait(1_000).iter().any(|line| line.starts_with("prepare")));
    assert_eq!(bench.alone("hw").began, ["prepare u-0.1 from what is kept"]);
}
