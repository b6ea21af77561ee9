//! Real pods saved, moved, lost, drained, copied: nothing of their work is lost, and their logs tell it once.

use serde_json::Value;

use crate::cluster::{Cluster, text, until};

const NUMBERS: usize = 400;

/// Prints numbers for some 20 s; its log tells whether anything was lost or begun anew.
fn counter(checkpoint: &str) -> String {
    format!(
        "image: host\ncommand: [sh, -c, \"i=0; while [ $i -lt {NUMBERS} ]; do echo $i; i=$((i+1)); sleep 0.05; done\"]\n\
         resources: {{cpu: 100m, memory: 64Mi}}\ncheckpoint: {checkpoint}\n"
    )
}

fn whole(log: &str) {
    let got: Vec<usize> = log.lines().filter_map(|line| line.parse().ok()).collect();
    assert_eq!(got, (0..NUMBERS).collect::<Vec<_>>());
}

fn two_agents() -> Cluster {
    let mut cluster = Cluster::new();
    for node in ["a1", "a2"] {
        cluster.agent(node, &["--capacity", "cpu=1,memory=1Gi"]);
    }
    cluster
}

fn running_at(job: &Value) -> Option<String> {
    let pod = &job["pods"][0];
    (pod["phase"] == "Running").then(|| pod["node"].as_str().unwrap_or_default().to_owned())
}

fn until_running(cluster: &Cluster, job: &str) -> String {
    cluster.until_phase(job, "Running", 60);
    until(&format!("{job} runs: {:#}", cluster.job(job)), 60, || running_at(&cluster.job(job)))
}

fn until_line(cluster: &Cluster, job: &str, n: usize) {
    until(&format!("{n} lines of {job}"), 60, || (cluster.logs(job).lines().count() > n).then_some(()));
}

fn done(cluster: &Cluster, args: &[&str]) -> String {
    let output = cluster.run(args);
    assert!(output.status.success(), "{args:?}: {}\n{}", text(&output), cluster.logs_of_all());
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_counter_is_moved_three_times_and_no_number_is_lost_or_doubled() {
    let cluster = two_agents();
    cluster.submit("counter", &counter("{mode: criu}"));
    for lines in [20, 80, 140] {
        let from = until_running(&cluster, "counter");
        until_line(&cluster, "counter", lines);
        let to = if from == "a1" { "a2" } else { "a1" };
        done(&cluster, &["migrate", "counter", "--to", to]);
        until(&format!("it runs on {to}: {:#}", cluster.job("counter")), 60, || {
            (running_at(&cluster.job("counter"))? == to).then_some(())
        });
    }
    let job = cluster.until_phase("counter", "Succeeded", 120);
    assert_eq!((&job["migrations"], &job["failures"]), (&3.into(), &0.into()), "{job:#}");
    whole(&cluster.logs("counter"));
}

/// A real program with real memory: what it computes is bit for bit what it computes undisturbed.
#[test]
fn a_training_is_moved_three_times_and_learns_the_same() {
    let cluster = two_agents();
    let demo = std::fs::canonicalize(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/demo")).expect("the demo");
    let training = |pause: &str| {
        format!(
            "image: host\ncommand: [python3, {0}/train.py, {0}/digits.csv.gz]\n\
             env: {{EPOCHS: \"60\", PAUSE: \"{pause}\", OMP_NUM_THREADS: \"1\", OPENBLAS_NUM_THREADS: \"1\"}}\n\
             resources: {{cpu: 500m, memory: 256Mi}}\nlimits: {{cpu: 1, memory: 256Mi}}\ncheckpoint: {{mode: criu}}\n",
            demo.display()
        )
    };
    cluster.submit("undisturbed", &training("0"));
    cluster.until_phase("undisturbed", "Succeeded", 120);
    let expected = cluster.logs("undisturbed");
    assert!(expected.lines().count() > 60 && expected.contains("weights "), "{expected}");

    cluster.submit("moved", &training("0.3"));
    for lines in [5, 15, 25] {
        let from = until_running(&cluster, "moved");
        until_line(&cluster, "moved", lines);
        let to = if from == "a1" { "a2" } else { "a1" };
        done(&cluster, &["migrate", "moved", "--to", to]);
        until(&format!("it runs on {to}: {:#}", cluster.job("moved")), 60, || {
            (running_at(&cluster.job("moved"))? == to).then_some(())
        });
    }
    let job = cluster.until_phase("moved", "Succeeded", 120);
    assert_eq!((&job["migrations"], &job["failures"]), (&3.into(), &0.into()), "{job:#}");
    assert_eq!(cluster.logs("moved"), expected);
}

#[test]
fn a_killed_nodes_pod_goes_on_from_its_last_checkpoint() {
    let mut cluster = two_agents();
    cluster.submit("counter", &counter("{mode: criu}"));
    let node = until_running(&cluster, "counter");
    until_line(&cluster, "counter", 60);
    done(&cluster, &["checkpoint", "counter"]);
    let at = cluster.agents.iter().position(|agent| agent.name == node).expect("its agent");
    cluster.agents[at].kill();
    cluster.kill_shims(&node);
    let job = cluster.until_phase("counter", "Succeeded", 180);
    assert_eq!((&job["evictions"], &job["failures"]), (&1.into(), &0.into()), "{job:#}");
    whole(&cluster.logs("counter"));
}

#[test]
fn a_drained_node_is_empty_and_its_pods_go_on_when_there_is_room() {
    let mut cluster = Cluster::new();
    cluster.agent("a1", &["--capacity", "cpu=1,memory=1Gi"]);
    let jobs = ["one", "two"];
    for job in jobs {
        cluster.submit(job, &counter("{mode: criu}"));
    }
    for job in jobs {
        until_running(&cluster, job);
        until_line(&cluster, job, 20);
    }
    let told = done(&cluster, &["drain", "a1"]);
    for job in jobs {
        let status = cluster.job(job);
        assert_eq!(status["pods"][0]["phase"], "Pending", "{told}\n{status:#}\n{}", cluster.logs_of_all());
    }
    cluster.agent("a2", &["--capacity", "cpu=1,memory=1Gi"]);
    for job in jobs {
        let ended = cluster.until_phase(job, "Succeeded", 120);
        assert_eq!((&ended["evictions"], &ended["failures"]), (&1.into(), &0.into()), "{ended:#}");
        whole(&cluster.logs(job));
    }
    done(&cluster, &["uncordon", "a1"]);
}

#[test]
fn suspended_and_forked_jobs_go_on_where_they_were() {
    let cluster = two_agents();
    cluster.submit("counter", &counter("{mode: criu}"));
    until_running(&cluster, "counter");
    until_line(&cluster, "counter", 60);
    done(&cluster, &["fork", "counter", "-n", "2"]);
    done(&cluster, &["suspend", "counter"]);
    until("it is saved", 60, || (cluster.job("counter")["pods"][0]["phase"] == "Pending").then_some(()));
    done(&cluster, &["resume", "counter"]);
    cluster.until_phase("counter", "Succeeded", 120);
    whole(&cluster.logs("counter"));
    for copy in ["counter-fork-1", "counter-fork-2"] {
        cluster.until_phase(copy, "Succeeded", 120);
        let log = cluster.logs(copy);
        let first: usize = log.lines().next().and_then(|line| line.parse().ok()).expect("a number");
        let got: Vec<usize> = log.lines().filter_map(|line| line.parse().ok()).collect();
        assert!(first > 0);
        assert_eq!(got, (first..NUMBERS).collect::<Vec<_>>());
    }
    let kept = cluster.json(&["get", "checkpoints"]).expect("a list");
    assert!(kept.as_array().is_some_and(|rows| rows.len() >= 2), "{kept:#}");
}
