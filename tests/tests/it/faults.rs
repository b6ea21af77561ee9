//! Programs killed and brokers restarted under running jobs.

use serde_json::json;

use crate::cluster::{Cluster, free_port, text, until};
use crate::disk::Disk;

/// Prints numbers for a while; its log tells whether anything was lost or begun anew.
const COUNTER: &str = "image: host\ncommand: [sh, -c, \"i=0; while [ $i -lt 150 ]; do echo $i; i=$((i+1)); sleep 0.05; done\"]\n\
                       resources: {cpu: 100m, memory: 32Mi}\n";

const READ_ONLY: &str = "Read-only file system (os error 30)";

fn whole(log: &str) {
    let got: Vec<u32> = log.lines().filter_map(|line| line.parse().ok()).collect();
    assert_eq!(got, (0..150).collect::<Vec<u32>>());
}

#[test]
fn kill_9_of_agent_and_controller_leaves_a_running_job_alone() {
    let mut cluster = Cluster::new();
    let agent = cluster.agent("a1", &[]);
    cluster.submit("counter", COUNTER);
    cluster.until_phase("counter", "Running", 30);
    until("some output", 30, || cluster.logs("counter").lines().nth(10).map(drop));
    cluster.agents[agent].kill();
    cluster.agent("a1", &[]);
    if let Some(controller) = &mut cluster.controller {
        controller.kill();
    }
    cluster.start_controller();
    let job = cluster.until_phase("counter", "Succeeded", 90);
    assert_eq!((&job["evictions"], &job["failures"]), (&0.into(), &0.into()), "{job:#}");
    whole(&cluster.logs("counter"));
}

#[test]
fn a_restarted_mosquitto_costs_nothing() {
    let mut cluster = Cluster::on_mosquitto();
    cluster.agent("a1", &[]);
    cluster.submit("counter", COUNTER);
    cluster.until_phase("counter", "Running", 30);
    if let Some(mosquitto) = &mut cluster.mosquitto {
        mosquitto.kill();
    }
    cluster.start_mosquitto();
    let job = cluster.until_phase("counter", "Succeeded", 90);
    assert_eq!((&job["evictions"], &job["failures"]), (&0.into(), &0.into()), "{job:#}");
    whole(&cluster.logs("counter"));
}

#[test]
fn a_machine_that_has_burnt_is_given_up_with_what_would_go_on_without_a_controller() {
    let mut cluster = Cluster::new();
    let burnt = cluster.agent("a1", &[]);
    cluster.submit("alone", "image: host\ncommand: [sleep, \"600\"]\nresources: {cpu: 100m, memory: 32Mi}\nonDisconnect: {do: continue}\n");
    cluster.until_phase("alone", "Running", 30);
    cluster.agent("a2", &[]);
    let give_up = |cluster: &Cluster, flags: &[&str]| cluster.run(&[&["node", "lost", "a1"], flags].concat());
    let refused = give_up(&cluster, &["--powered-off"]);
    assert!(text(&refused).contains("node a1 is there, heard "), "{}", text(&refused));
    cluster.agents[burnt].kill();
    cluster.kill_shims("a1");
    until("it is silent", 60, || give_up(&cluster, &[]).status.success().then_some(()));
    let at = |cluster: &Cluster| cluster.job("alone")["pods"][0]["node"].clone();
    assert_eq!(at(&cluster), "a1", "for all that is known it goes on there");
    let given_up = give_up(&cluster, &["--powered-off"]);
    assert_eq!(
        text(&given_up),
        "node a1 is lost, and nothing runs there: its pods go elsewhere once their leases are over\n"
    );
    until("it runs elsewhere", 30, || {
        (at(&cluster) == "a2" && cluster.phase("alone") == "Running").then_some(())
    });
    assert_eq!(cluster.job("alone")["pods"][0]["epoch"], 2);
}

/// Nothing depends on what a broker remembers, so the next one need not know anything of the first.
#[test]
fn a_dead_broker_is_left_for_the_next_one_named() {
    let mut cluster = Cluster::empty();
    cluster.start_mosquitto();
    let spare = free_port();
    cluster.brokers.push(spare);
    cluster.start_controller();
    cluster.agent("a1", &[]);
    cluster.submit("counter", COUNTER);
    cluster.until_phase("counter", "Running", 30);
    drop(cluster.mosquitto.take());
    // Not before: these two are no cluster, and who had to wait for the first would be alone at the other.
    let _spare = cluster.mosquitto_at("spare", spare);
    let job = cluster.until_phase("counter", "Succeeded", 90);
    assert_eq!((&job["evictions"], &job["failures"]), (&0.into(), &0.into()), "{job:#}");
    whole(&cluster.logs("counter"));
}

#[test]
fn follow_shows_every_line_once_across_an_agent_restart() {
    let mut cluster = Cluster::new();
    let agent = cluster.agent("a1", &[]);
    cluster.submit("counter", COUNTER);
    let follower = cluster
        .berth(&["logs", "-f", "counter"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("berth starts");
    cluster.until_phase("counter", "Running", 30);
    cluster.agents[agent].kill();
    cluster.agent("a1", &[]);
    let output = follower.wait_with_output().expect("it ends with the job");
    whole(&String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_dead_shim_is_an_eviction_and_the_pod_runs_again() {
    let mut cluster = Cluster::new();
    cluster.agent("a1", &[]);
    cluster.submit("victim", "image: host\ncommand: [sh, -c, \"echo begun; sleep 2; echo done\"]\nresources: {cpu: 100m, memory: 32Mi}\n");
    cluster.until_phase("victim", "Running", 30);
    let dir = cluster.dir.path().to_string_lossy().into_owned();
    let shim = until("its shim", 10, || {
        std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
            let command = std::fs::read(entry.path().join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).into_owned();
            (command.starts_with("berth-agent\0shim\0") && command.contains(&dir))
                .then(|| entry.file_name().to_string_lossy().into_owned())
        })
    });
    let killed = std::process::Command::new("kill").args(["-9", &shim]).status();
    assert!(killed.is_ok_and(|status| status.success()));
    let job = cluster.until_phase("victim", "Succeeded", 60);
    assert_eq!((&job["evictions"], &job["failures"]), (&1.into(), &0.into()), "{job:#}");
    assert_eq!(job["pods"][0]["epoch"], 2);
}

#[test]
fn a_nodes_full_disk_costs_output_alone_and_the_log_says_so() {
    let mut cluster = Cluster::new();
    let disk = Disk::at(&cluster, "a1");
    let marks = cluster.dir.path().join("marks");
    std::fs::create_dir(&marks).expect("a directory");
    let dir = marks.to_str().expect("a plain path").to_owned();
    cluster.agent("a1", &["--allow-host-path", &dir]);
    // Lines so long that the file's last block has no room for some; and it says elsewhere how far it is.
    let job = COUNTER.replace("echo $i;", "printf '%d %01000d\\\\n' $i 0; echo $i > /marks/at;");
    cluster.submit("counter", &format!("{job}volumes: [{{mount: /marks, host: {dir}}}]\n"));
    let beyond = |least: u32| {
        until("it goes on", 30, || {
            let at = std::fs::read_to_string(marks.join("at")).ok()?.trim().parse::<u32>().ok()?;
            (at >= least).then_some(at)
        })
    };
    beyond(10);
    disk.fill();
    let at = beyond(0);
    beyond(at + 10);
    disk.empty();
    let job = cluster.until_phase("counter", "Succeeded", 90);
    assert_eq!((&job["evictions"], &job["failures"]), (&0.into(), &0.into()), "{job:#}");
    let log = cluster.run(&["logs", "counter"]);
    let (out, err) = (String::from_utf8_lossy(&log.stdout), String::from_utf8_lossy(&log.stderr));
    let told = |line: &str| {
        line.starts_with("berth: ") && line.ends_with("missing here: No space left on device (os error 28)")
    };
    assert!(err.lines().any(told), "{err}");
    let numbers: Vec<u32> = out.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).collect();
    assert!(numbers.is_sorted() && numbers.len() < 150, "{numbers:?}");
    assert_eq!((numbers.first(), numbers.last()), (Some(&0), Some(&149)));
    drop(cluster);
}

#[test]
fn a_controllers_full_disk_loses_nothing_that_was_accepted() {
    let mut cluster = Cluster::empty();
    let disk = Disk::at(&cluster, "controller");
    cluster.start_controller();
    cluster.agent("a1", &[]);
    cluster.submit("counter", COUNTER);
    cluster.until_phase("counter", "Running", 30);
    disk.fill();
    // What cannot be made durable is not answered: the controller ends, as its service manager would start it again.
    let late = cluster.submit_in_time("late", "image: host\ncommand: [\"true\"]\n");
    cluster.controller_fails();
    assert!(cluster.log("controller").contains("database or disk is full"), "{}", cluster.log("controller"));
    disk.empty();
    cluster.start_controller();
    let late = late.wait_with_output().expect("it ends");
    assert!(late.status.success(), "sent again until it is answered: {}", crate::cluster::text(&late));
    cluster.until_phase("late", "Succeeded", 60);
    let job = cluster.until_phase("counter", "Succeeded", 90);
    assert_eq!((&job["evictions"], &job["failures"]), (&0.into(), &0.into()), "{job:#}");
    whole(&cluster.logs("counter"));
    drop(cluster);
}

#[test]
fn a_node_whose_disk_has_failed_tells_nothing_more_and_its_pods_go_on() {
    let mut cluster = Cluster::new();
    let disk = Disk::that_can_fail(&cluster, "a1");
    let marks = cluster.dir.path().join("marks");
    std::fs::create_dir(&marks).expect("a directory");
    let dir = marks.to_str().expect("a plain path").to_owned();
    let agent = cluster.agent("a1", &["--allow-host-path", &dir]);
    let job = COUNTER.replace("echo $i;", "echo $i; echo $i > /marks/at;");
    cluster.submit("counter", &format!("{job}volumes: [{{mount: /marks, host: {dir}}}]\n"));
    let at = || std::fs::read_to_string(marks.join("at")).ok()?.trim().parse::<u32>().ok();
    let begun = until("it counts", 30, at);
    disk.fail();
    // What cannot be written down is not begun: the agent ends, as its service manager would start it again.
    cluster.submit("late", "image: host\ncommand: [\"true\"]\nresources: {cpu: 100m, memory: 32Mi}\n");
    let child = &mut cluster.agents[agent].child;
    let ended = until("the agent ends", 30, || child.try_wait().ok().flatten());
    assert!(!ended.success());
    assert!(cluster.log("a1").contains("cannot write the ledger "), "{}", cluster.log("a1"));
    until("its pod goes on, to its end", 30, || at().filter(|at| *at > begun && *at == 149));
    let again = cluster.agent_alone("a1", &["--allow-host-path", &dir], &[]);
    let child = &mut cluster.agents[again].child;
    assert!(!until("nor does it start", 30, || child.try_wait().ok().flatten()).success());
    let log = cluster.log("a1");
    assert!(log.contains("cannot open the ledger ") && log.contains(READ_ONLY), "{log}");
    assert_ne!(cluster.phase("counter"), "Succeeded", "its end is nowhere written down");

    // As the machine's restart does.
    cluster.kill_shims("a1");
    disk.repair();
    cluster.agent("a1", &["--allow-host-path", &dir]);
    let job = cluster.until_phase("counter", "Succeeded", 90);
    assert_eq!((&job["evictions"], &job["failures"]), (&1.into(), &0.into()), "{job:#}");
    let log = cluster.logs("counter");
    let anew = log.rfind("0\n1\n2\n").expect("it began anew");
    whole(&log[anew..]);
    cluster.until_phase("late", "Succeeded", 60);
    drop(cluster);
}

#[test]
fn a_controller_whose_disk_has_failed_answers_nothing_more() {
    let mut cluster = Cluster::empty();
    let disk = Disk::that_can_fail(&cluster, "controller");
    cluster.start_controller();
    cluster.agent("a1", &[]);
    cluster.submit("counter", COUNTER);
    cluster.until_phase("counter", "Running", 30);
    disk.fail();
    let late = cluster.submit_in_time("late", "image: host\ncommand: [\"true\"]\n");
    for once_more in [true, false] {
        cluster.controller_fails();
        if once_more {
            cluster.start_controller();
        }
    }
    let log = cluster.log("controller");
    assert!(log.contains("store.sqlite (its disk has failed: the kernel's log says how)"), "{log}");
    assert!(log.contains("cannot use the data directory") && log.contains(READ_ONLY), "{log}");
    disk.repair();
    cluster.start_controller();
    let late = late.wait_with_output().expect("it ends");
    assert!(late.status.success(), "sent again until it is answered: {}", crate::cluster::text(&late));
    cluster.until_phase("late", "Succeeded", 60);
    let job = cluster.until_phase("counter", "Succeeded", 90);
    assert_eq!((&job["evictions"], &job["failures"]), (&0.into(), &0.into()), "{job:#}");
    whole(&cluster.logs("counter"));
    drop(cluster);
}

/// A pod that a node cannot run goes to one that can; where none can, it is a failure that says why.
#[test]
fn a_nodes_own_fault_is_not_the_jobs() {
    let mut cluster = Cluster::new();
    // What only the node itself can see: the way leads out of what it shares.
    let [shared, other] = ["shared", "other"].map(|name| cluster.dir.path().join(name));
    for dir in [&shared, &other] {
        std::fs::create_dir(dir).expect("a directory");
    }
    std::fs::write(other.join("data"), "here\n").expect("a file");
    std::os::unix::fs::symlink(&other, shared.join("link")).expect("a link");
    let link = shared.join("link").display().to_string();
    let [shared, other] = [shared, other].map(|path| path.display().to_string());
    cluster.agent("a1", &["--allow-host-path", &shared]);
    let job = |volume: &str| {
        format!(
            "image: host\ncommand: [cat, /data/data]\nresources: {{cpu: 100m, memory: 32Mi}}\n\
             volumes: [{{mount: /data, host: {volume}, readOnly: true}}]\n"
        )
    };
    cluster.submit("alone", &job(&link));
    let status = cluster.until_phase("alone", "Failed", 60);
    assert_eq!((&status["reason"], &status["failures"]), (&json!("PolicyRefused"), &json!(1)), "{status:#}");

    cluster.agent("a2", &["--allow-host-path", &shared, "--allow-host-path", &other]);
    cluster.submit(
        "elsewhere",
        &format!("prefer: [{{when: \"node.name == 'a1'\", weight: 100}}]\n{}", job(&link)),
    );
    let status = cluster.until_phase("elsewhere", "Succeeded", 60);
    assert_eq!((&status["failures"], &status["evictions"]), (&json!(0), &json!(1)), "{status:#}");
    assert_eq!(status["pods"][0]["node"], "a2");
    assert_eq!(cluster.logs("elsewhere"), "here\n");
}

#[test]
fn an_agent_that_ends_without_pods_leaves_no_control_group() {
    let mut cluster = Cluster::new();
    // A name of its own: other tests of this machine have agents as well.
    let node = format!("leaves-{}", cluster.port);
    let agent = cluster.agent(&node, &[]);
    let groups = || -> Vec<std::path::PathBuf> {
        let mounts = std::fs::read_dir("/sys/fs/cgroup").expect("control groups are mounted").flatten();
        let parents = mounts.map(|mount| mount.path().join("berth"));
        let parents = parents.chain(["/sys/fs/cgroup/berth".into()]);
        let own = |path: &std::path::PathBuf| path.to_string_lossy().contains(&node);
        parents
            .flat_map(|parent| std::fs::read_dir(parent).into_iter().flatten().flatten())
            .map(|entry| entry.path())
            .filter(own)
            .collect()
    };
    cluster.submit("short", "image: host\ncommand: [\"true\"]\nresources: {cpu: 100m, memory: 32Mi}\n");
    cluster.until_phase("short", "Succeeded", 30);
    assert!(!groups().is_empty(), "its pod was in none");
    // The controller hears of the end before the agent hears that it did.
    until("the pod's directory is gone", 30, || {
        let pods = cluster.dir.path().join(&node).join("pods");
        std::fs::read_dir(pods).ok()?.next().is_none().then_some(())
    });
    let child = &mut cluster.agents[agent].child;
    let ended = std::process::Command::new("kill").arg(child.id().to_string()).status();
    assert!(ended.is_ok_and(|status| status.success()));
    child.wait().expect("it ends");
    assert_eq!(groups(), [] as [std::path::PathBuf; 0]);
}
