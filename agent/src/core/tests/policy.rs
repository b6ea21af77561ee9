//! What the node's own policy does not allow, however it is asked for: nothing of it is begun.

use berth_protocol::job::{Network, PodTemplate, RestartPolicy};
use berth_protocol::message::node::{StageState, Staged};
use berth_protocol::pod::{Cause, Goal};
use berth_protocol::policy::{Gpus, Largest, Policy};
use berth_protocol::units::{MilliCpu, Timestamp};

use super::super::Run;
use super::{Bench, key, stage, template};
use crate::core::ledger::Ledger;
use crate::task::Report;

fn granting(rules: Policy, disk: Ledger) -> Bench {
    let session = disk.session + 1;
    Bench::granting(rules, disk, session, "hw", Timestamp(1_000_000))
}

fn only_bridges() -> Policy {
    Policy { host_image: true, networks: [Network::Bridge].into(), ..Policy::default() }
}

fn on_host() -> PodTemplate {
    PodTemplate { network: Network::Host, ..template(RestartPolicy::Always) }
}

/// The policy's word on the first pod's end, which is the node's doing.
fn refused(bench: &Bench) -> String {
    let ended = bench.disk.pods[&key(0, 1)].ended.clone().expect("it is over");
    assert_eq!((ended.outcome.cause, ended.outcome.reason.as_deref()), (Cause::Fault, Some("PolicyRefused")));
    ended.outcome.message.expect("it says why")
}

#[test]
fn an_order_is_refused_before_anything_is_brought_here() {
    let mut bench = granting(only_bridges(), Ledger::default());
    let lines = bench.desired(&[(key(0, 1), Goal::Run, &on_host())]);
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].starts_with(
        "warn pod u-0.1 is refused: this node's policy allows no `network: host`: its agent would with --allow-host-network"
    ));
    assert_eq!(lines[1], "tell u-0.1 ended Fault");
    assert!(refused(&bench).contains("--allow-host-network"));
    // And it stays so, however often it is asked for.
    bench.wait(600_000);
    bench.grant();
    assert_eq!(bench.desired(&[(key(0, 1), Goal::Run, &on_host())]), [] as [&str; 0]);
}

#[test]
fn each_kind_of_order_is_held_against_it() {
    let plain = || PodTemplate { network: Network::Bridge, ..template(RestartPolicy::Never) };
    let mut bench = granting(only_bridges(), Ledger::default());
    assert_eq!(bench.desired(&[(key(0, 1), Goal::Run, &plain())]), ["prepare u-0.1"]);
    let largest = Largest { cpu: Some(MilliCpu(50)), ..Largest::default() };
    for (rules, says) in [
        (Policy::default(), "--allow-host-image"),
        (Policy { largest, ..only_bridges() }, "more cores than 50m"),
        (Policy { networks: [Network::None].into(), ..only_bridges() }, "`network: bridge`"),
    ] {
        let mut bench = granting(rules, Ledger::default());
        bench.desired(&[(key(0, 1), Goal::Run, &plain())]);
        assert!(refused(&bench).contains(says), "{}", refused(&bench));
    }
    // Devices that the order hands out, though nobody asked for any.
    let mut bench = granting(Policy { gpus: Gpus::None, ..only_bridges() }, Ledger::default());
    bench.gpus = vec!["GPU-1"];
    bench.desired(&[(key(0, 1), Goal::Run, &plain())]);
    assert!(refused(&bench).contains("no GPUs"));
}

#[test]
fn a_pod_that_was_allowed_runs_on_and_is_not_begun_again() {
    let bench = Bench::running(&on_host());
    let running = |disk: Ledger| {
        let mut bench = granting(only_bridges(), disk);
        bench.report(&key(0, 1), Report::Running { run: Run(1), started_at: Timestamp(0) });
        bench.grant();
        assert!(bench.disk.pods[&key(0, 1)].ended.is_none());
        bench
    };
    // Its own restart in place.
    let mut bench = running(bench.disk);
    bench.exited(&key(0, 1), 1, Cause::Success, 0);
    let lines = bench.wait(60_000);
    assert!(!lines.iter().any(|line| line.starts_with("prepare")), "{lines:?}");
    assert!(refused(&bench).contains("--allow-host-network"));
    // And one that was due when the agent came back.
    let mut before = Bench::running(&on_host());
    before.exited(&key(0, 1), 1, Cause::Success, 0);
    let mut bench = granting(only_bridges(), before.disk);
    bench.wait(60_000);
    assert!(refused(&bench).contains("--allow-host-network"));
}

#[test]
fn nothing_is_brought_ahead_of_a_pod_that_may_not_come() {
    let mut bench = granting(only_bridges(), Ledger::default());
    let (plain, host) = (PodTemplate { network: Network::Bridge, ..on_host() }, on_host());
    bench.desired(&[(key(0, 1), Goal::Run, &plain)]);
    bench.desired(&[(key(0, 1), Goal::Run, &plain), (key(9, 1), Goal::Stop, &host)]);
    bench.stage = vec![stage(1, &host, Some(b"checkpoint")), stage(2, &plain, None)];
    let lines = bench.desired(&[(key(0, 1), Goal::Run, &plain), (key(9, 1), Goal::Stop, &host)]);
    assert_eq!(lines, ["stage u-2.3"]);
    let told = bench.heartbeat.clone().expect("it answers").staged;
    let Staged { state: StageState::Failed { why }, .. } = &told[0] else { panic!("{told:?}") };
    assert!(why.contains("--allow-host-network"), "{why}");
}
