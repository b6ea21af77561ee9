//! Several controllers on one etcd: one leads, and when it dies another goes on.

use std::process::Command;

use berth_tests::etcd::Etcd;

use crate::cluster::{Cluster, Daemon, free_port, text, until};

const LONG: &str = "image: host\ncommand: [sh, -c, \"i=0; while [ $i -lt 400 ]; do echo $i; i=$((i+1)); sleep 0.05; done\"]\n\
                    resources: {cpu: 100m, memory: 32Mi}\n";
const SHORT: &str = "image: host\ncommand: [echo, here]\nresources: {cpu: 100m, memory: 32Mi}\n";

fn on_etcd() -> (Cluster, Etcd) {
    let mut cluster = Cluster::empty();
    let etcd = Etcd::start(3, cluster.dir.path(), None);
    cluster.store = Some(etcd.url());
    cluster.start_mosquitto();
    (cluster, etcd)
}

fn leads(cluster: &Cluster, name: &str) -> Option<()> {
    cluster.log(name).contains("started").then_some(())
}

fn signal(daemon: &mut Daemon, signal: &str) {
    let sent = Command::new("kill").args([signal, &daemon.child.id().to_string()]).status();
    assert!(sent.is_ok_and(|status| status.success()));
}

#[test]
fn a_dead_leader_is_followed_and_no_pod_is_touched() {
    let (mut cluster, mut etcd) = on_etcd();
    let mut first = cluster.another_controller("first", free_port());
    until("the first leads", 30, || leads(&cluster, "first"));
    let mut second = cluster.another_controller("second", free_port());
    until("the second stands by", 30, || cluster.log("second").contains("standing by").then_some(()));
    cluster.agent("a1", &[]);
    cluster.submit("long", LONG);
    cluster.until_phase("long", "Running", 30);

    first.kill();
    until("the second leads", 30, || leads(&cluster, "second"));
    cluster.submit("after", SHORT);
    cluster.until_phase("after", "Succeeded", 60);

    // Back again, it stands by; a leader that is asked to end makes way at once.
    let _first = cluster.another_controller("first-again", free_port());
    until("the first stands by", 30, || cluster.log("first-again").contains("standing by").then_some(()));
    signal(&mut second, "-TERM");
    until("the first leads again", 30, || leads(&cluster, "first-again"));
    assert!(second.child.wait().is_ok_and(|status| status.success()), "{}", cluster.log("second"));

    etcd.kill(0);
    cluster.submit("without-a-member", SHORT);
    cluster.until_phase("without-a-member", "Succeeded", 60);

    let job = cluster.until_phase("long", "Succeeded", 90);
    assert_eq!((&job["evictions"], &job["failures"]), (&0.into(), &0.into()), "{job:#}");
    let log: Vec<u32> = cluster.logs("long").lines().filter_map(|line| line.parse().ok()).collect();
    assert_eq!(log, (0..400).collect::<Vec<u32>>());
}

/// Stopped, it does not know that its lease has run out: awake again it must neither write nor grant.
#[test]
fn a_leader_that_was_frozen_gives_way() {
    let (mut cluster, _etcd) = on_etcd();
    let mut first = cluster.another_controller("first", free_port());
    until("the first leads", 30, || leads(&cluster, "first"));
    let _second = cluster.another_controller("second", free_port());
    cluster.agent("a1", &[]);
    signal(&mut first, "-STOP");
    until("the second leads", 30, || leads(&cluster, "second"));
    cluster.submit("short", SHORT);
    cluster.until_phase("short", "Succeeded", 60);
    signal(&mut first, "-CONT");
    let ended = until("the first ends", 30, || first.child.try_wait().ok().flatten());
    assert!(!ended.success());
    assert!(cluster.log("first").contains("another controller leads"), "{}", cluster.log("first"));
    assert_eq!(cluster.phase("short"), "Succeeded");
}

#[test]
fn an_operator_moves_checks_and_restores_the_records() {
    let (mut cluster, _etcd) = on_etcd();
    let etcd = cluster.store.take().expect("it is there");
    cluster.start_controller();
    cluster.agent("a1", &[]);
    cluster.submit("before", SHORT);
    cluster.until_phase("before", "Succeeded", 60);
    let data = cluster.dir.path().join("controller");
    let admin = |arguments: &[&str]| {
        let mut command = Command::new(crate::cluster::program("berth-controller"));
        command.args(arguments).arg("--data-dir").arg(&data).env_remove("BERTH_STORE");
        command.output().expect("it starts")
    };
    // Beside the controller that uses it.
    let backup = cluster.dir.path().join("backup.sqlite");
    let backup = backup.to_str().expect("a plain path");
    let output = admin(&["backup", backup]);
    assert!(output.status.success(), "{}", text(&output));
    let output = admin(&["fsck"]);
    assert!(output.status.success() && text(&output).contains("all sound"), "{}", text(&output));
    let output = admin(&["backup", backup]);
    assert!(
        output.status.code() == Some(2) && text(&output).contains("is there already"),
        "{}",
        text(&output)
    );
    let output = admin(&["migrate-store", "--to", &etcd]);
    assert!(!output.status.success() && text(&output).contains("in use"), "{}", text(&output));

    cluster.controller = None;
    let output = admin(&["migrate-store", "--to", &etcd]);
    assert!(output.status.success(), "{}", text(&output));
    let output = admin(&["fsck"]);
    assert!(text(&output).contains("moved to etcd://"), "{}", text(&output));
    cluster.store = Some(etcd.clone());
    cluster.start_controller();
    cluster.submit("between", SHORT);
    cluster.until_phase("between", "Succeeded", 60);
    assert_eq!(cluster.phase("before"), "Succeeded");

    cluster.controller = None;
    let output = admin(&["migrate-store", "--store", &etcd, "--to", "embedded"]);
    assert!(output.status.success(), "{}", text(&output));
    cluster.store = None;
    cluster.start_controller();
    until("both are there", 30, || {
        (cluster.phase("before") == "Succeeded" && cluster.phase("between") == "Succeeded").then_some(())
    });

    // Of before the second job; the node was told of terms that the backup does not know.
    cluster.controller = None;
    let output = admin(&["restore", backup]);
    assert!(output.status.success() && text(&output).contains("records restored"), "{}", text(&output));
    cluster.start_controller();
    until("the first is there", 30, || (cluster.phase("before") == "Succeeded").then_some(()));
    assert_eq!(cluster.phase("between"), "");
    cluster.submit("after", SHORT);
    // Behind the first minute of a restored store, in which nothing is placed.
    cluster.until_phase("after", "Succeeded", 150);
}
