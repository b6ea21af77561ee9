//! Machines that an admin lets in by hand, once what both see of their keys was compared.

use std::process::Command;

use crate::cluster::{Cluster, Daemon, program, text, until};

/// `berth-agent join` with the line that an admin was given, as long as it takes.
fn joins(cluster: &Cluster, node: &str, line: &str) -> Daemon {
    let words: Vec<&str> = line.split_whitespace().collect();
    let ["berth-agent", rest @ ..] = &words[..] else { panic!("no line: {line}") };
    let mut command = Command::new(program("berth-agent"));
    command.args(rest).args(["--node", node, "--data-dir"]).arg(cluster.dir.path().join(node));
    Daemon::start(node, &mut command, &cluster.dir.path().join(format!("{node}.log")))
}

fn line(cluster: &Cluster) -> String {
    let made = cluster.run(&["node", "token", "--approve"]);
    assert!(made.status.success(), "{}", text(&made));
    String::from_utf8_lossy(&made.stdout).into_owned()
}

/// What the machine shows of its key.
fn shown(cluster: &Cluster, node: &str) -> String {
    until("it says what it waits for", 30, || {
        let log = cluster.log(node);
        let fingerprint =
            log.split_once("the fingerprint of its key:\n")?.1.lines().next()?.trim().to_owned();
        log.contains(&format!("`berth node approve {node}`")).then_some(fingerprint)
    })
}

fn ends(daemon: &mut Daemon) -> bool {
    until("it ends", 60, || daemon.child.try_wait().ok().flatten()).success()
}

fn tokens(cluster: &Cluster) -> String {
    text(&cluster.run(&["node", "tokens"]))
}

fn joined(cluster: &Cluster, node: &str) -> bool {
    cluster.dir.path().join(node).join("identity/membership.json").exists()
}

#[test]
fn a_machine_waits_until_an_admin_has_compared_its_key() {
    let mut cluster = Cluster::of_members();
    let token = line(&cluster);
    assert!(tokens(&cluster).contains("nobody yet"), "{}", tokens(&cluster));
    let mut joining = joins(&cluster, "a1", &token);
    let fingerprint = shown(&cluster, "a1");
    let listed = tokens(&cluster);
    assert!(listed.lines().any(|row| row.contains("a1") && row.contains(&fingerprint)), "{listed}");
    // Whoever has the token too comes too late with it.
    let mut other = joins(&cluster, "a2", &token);
    assert!(!ends(&mut other), "{}", cluster.log("a2"));
    assert!(cluster.log("a2").contains("another machine has shown this token"), "{}", cluster.log("a2"));

    // Nobody has said anything: not a key that is another's, and not a controller that has begun anew.
    let nobodys = "0000-0000-0000-0000-0000-0000-0000-0000";
    let wrong = cluster.run(&["node", "approve", "a1", "--fingerprint", nobodys]);
    assert!(!wrong.status.success() && text(&wrong).contains(&fingerprint), "{}", text(&wrong));
    cluster.controller.as_mut().expect("it runs").kill();
    cluster.start_controller();
    until("the controller answers", 30, || cluster.json(&["get", "nodes"]));
    assert!(tokens(&cluster).contains(&fingerprint), "{}", tokens(&cluster));
    assert!(joining.child.try_wait().expect("it is a child").is_none() && !joined(&cluster, "a1"));

    let approved = cluster.run(&["node", "approve", "a1", "--fingerprint", &fingerprint]);
    assert!(approved.status.success(), "{}", text(&approved));
    assert!(ends(&mut joining), "{}", cluster.log("a1"));
    cluster.agent("a1", &["--allow-host-image"]);
    let ran = cluster.run(&["run", "--network", "none", "--no-workspace", "--", "echo", "here"]);
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "here\n", "{}", text(&ran));

    // One that is denied hears of it, and has nothing.
    let mut denied = joins(&cluster, "a3", &line(&cluster));
    shown(&cluster, "a3");
    let said = cluster.run(&["node", "deny", "a3"]);
    assert!(said.status.success(), "{}", text(&said));
    assert!(!ends(&mut denied) && !joined(&cluster, "a3"), "{}", cluster.log("a3"));
    assert!(cluster.log("a3").contains("an admin has denied this machine"), "{}", cluster.log("a3"));
    let audit = text(&cluster.run(&["audit"]));
    for entry in ["node a1 by token", "approve", "deny"] {
        assert!(audit.contains(entry), "{entry}: {audit}");
    }
    assert!(audit.contains(&fingerprint), "{audit}");
    // Nobody waits any more.
    let again = cluster.run(&["node", "approve", "a3"]);
    assert!(!again.status.success() && text(&again).contains("node a3 that waits"), "{}", text(&again));
}
