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
    until_running(&cluster, "moved");
    let [first, second] = [2, 7].map(|lines| {
        until_line(&cluster, "moved", lines);
        done(&cluster, &["checkpoint", "moved"]);
        cluster.job("moved")["checkpoint"]["newBytes"].as_f64().expect("it is saved")
    });
    assert!(second < first * 0.22, "five epochs later {second} bytes are sent, of {first} at first");
    for lines in [10, 20, 30] {
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

/// Counts from its file on, and saves itself there when it is asked.
fn saves_itself(answer: &str, checkpoint: &str) -> String {
    format!(
        "image: host\ncommand: [sh, -c, \"i=$(cat /state 2>/dev/null || echo 0); trap 'echo $i > /state; {answer}' USR1; \
         while [ $i -lt {NUMBERS} ]; do echo $i; i=$((i+1)); sleep 0.05; done\"]\n\
         resources: {{cpu: 100m, memory: 64Mi}}\ncheckpoint: {checkpoint}\n"
    )
}

#[test]
fn a_program_that_saves_itself_is_moved_and_goes_on_from_its_file() {
    let mut cluster = Cluster::new();
    for node in ["a1", "a2"] {
        // Nothing but the program's own answer can save it.
        cluster.agent(node, &["--capacity", "cpu=1,memory=1Gi", "--criu", "/nonesuch/criu"]);
    }
    cluster.submit("counter", &saves_itself("exit 85", "{mode: cooperative, signal: SIGUSR1}"));
    for lines in [20, 80] {
        let from = until_running(&cluster, "counter");
        until_line(&cluster, "counter", lines);
        // Here it begins anew, and there again.
        done(&cluster, &["checkpoint", "counter"]);
        let to = if from == "a1" { "a2" } else { "a1" };
        done(&cluster, &["migrate", "counter", "--to", to]);
        until(&format!("it runs on {to}: {:#}", cluster.job("counter")), 60, || {
            (running_at(&cluster.job("counter"))? == to).then_some(())
        });
    }
    let kept = cluster.json(&["get", "checkpoints"]).expect("a list");
    assert!(kept[0]["kind"] == "cooperative", "{kept:#}");
    let job = cluster.until_phase("counter", "Succeeded", 120);
    assert_eq!((&job["migrations"], &job["failures"]), (&2.into(), &0.into()), "{job:#}");
    whole(&cluster.logs("counter"));
}

#[test]
fn a_program_that_never_answers_is_saved_by_criu_or_runs_on_and_why_is_told() {
    let cluster = two_agents();
    cluster.submit("auto", &saves_itself("true", "{signal: SIGUSR1, grace: 1s}"));
    let from = until_running(&cluster, "auto");
    until_line(&cluster, "auto", 20);
    let to = if from == "a1" { "a2" } else { "a1" };
    done(&cluster, &["migrate", "auto", "--to", to]);
    cluster.submit("stubborn", &saves_itself("true", "{mode: cooperative, signal: SIGUSR1, grace: 1s}"));
    until_running(&cluster, "stubborn");
    let output = cluster.run(&["checkpoint", "stubborn"]);
    let why = "has not ended with code 85 within 1s";
    assert!(!output.status.success() && text(&output).contains(why), "{}", text(&output));
    for job in ["auto", "stubborn"] {
        let ended = cluster.until_phase(job, "Succeeded", 120);
        assert_eq!(ended["failures"], 0, "{ended:#}");
        whole(&cluster.logs(job));
    }
    assert_eq!(cluster.job("auto")["migrations"], 1);
}

#[test]
fn a_resume_hook_that_fails_shows_in_the_pods_message_and_the_pod_goes_on() {
    let cluster = two_agents();
    let hooks = "{resume: [sh, -c, \"echo no lock to be had; exit 3\"]}";
    cluster.submit("counter", &counter(&format!("{{mode: criu, hooks: {hooks}}}")));
    let (from, to) = places(&cluster, "counter");
    until_line(&cluster, "counter", 20);
    let why = "the resume hook ended with code 3: no lock to be had";
    let told = |node: &str| {
        until(&format!("it is told\n{}", cluster.logs_of_all()), 60, || {
            let job = cluster.job("counter");
            let pod = &job["pods"][0];
            (running_at(&job)? == node && pod["message"] == why).then_some(())
        });
    };
    done(&cluster, &["checkpoint", "counter"]);
    told(&from);
    let log = text(&cluster.run(&["logs", "counter"]));
    assert!(log.contains(&format!("berth: {why}\n")), "{log}");
    // A checkpoint is none the worse for it, and where it goes on the hook has its turn again.
    done(&cluster, &["migrate", "counter", "--to", to]);
    told(to);
    let job = cluster.until_phase("counter", "Succeeded", 120);
    assert_eq!((&job["migrations"], &job["failures"]), (&1.into(), &0.into()), "{job:#}");
    whole(&cluster.logs("counter"));
}

#[test]
fn each_checkpoint_that_fails_is_said_to_whoever_waits_for_it() {
    let mut cluster = Cluster::new();
    cluster.agent("a1", &["--capacity", "cpu=1,memory=1Gi"]);
    let hooks = "{quiesce: [sh, -c, \"exit 3\"]}";
    cluster.submit("counter", &counter(&format!("{{mode: criu, hooks: {hooks}}}")));
    until_running(&cluster, "counter");
    // The same words each time would have the second one waited for until its timeout.
    for _ in 0..3 {
        let output = cluster.run(&["checkpoint", "counter", "--timeout", "30s"]);
        let why = "the quiesce hook ended with code 3";
        assert!(!output.status.success() && text(&output).contains(why), "{}", text(&output));
    }
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

/// Where a job runs that two agents may run, and where it does not.
fn places(cluster: &Cluster, job: &str) -> (String, &'static str) {
    let from = until_running(cluster, job);
    let to = if from == "a1" { "a2" } else { "a1" };
    (from, to)
}

fn until_state(cluster: &Cluster, node: &str, state: &str) {
    until(&format!("{node} is {state}\n{}", cluster.logs_of_all()), 60, || {
        let nodes = cluster.json(&["get", "nodes"])?;
        nodes.as_array()?.iter().find(|row| row["node"] == node && row["state"] == state).map(drop)
    });
}

#[test]
fn a_node_that_is_given_notice_in_a_file_is_emptied_and_comes_back_with_the_notice_withdrawn() {
    let mut cluster = Cluster::new();
    let file = |cluster: &Cluster, node: &str| cluster.dir.path().join(format!("{node}.notice"));
    for node in ["a1", "a2"] {
        let file = file(&cluster, node).display().to_string();
        cluster.agent(node, &["--capacity", "cpu=1,memory=1Gi", "--notice-file", &file]);
    }
    cluster.submit("counter", &counter("{mode: criu}"));
    let (from, to) = places(&cluster, "counter");
    until_line(&cluster, "counter", 20);
    std::fs::write(file(&cluster, &from), "100s\n").expect("the notice is written");
    until(&format!("it runs on {to}"), 60, || (running_at(&cluster.job("counter"))? == to).then_some(()));
    let node = cluster.json(&["describe", "node", &from]).expect("a node");
    let notice = node["drain"]["notice"].as_str().unwrap_or_default();
    assert!(
        node["state"] == "cordoned" && notice.contains("a1.notice") | notice.contains("a2.notice"),
        "{node:#}"
    );
    std::fs::remove_file(file(&cluster, &from)).expect("the notice is withdrawn");
    until_state(&cluster, &from, "online");
    let job = cluster.until_phase("counter", "Succeeded", 120);
    assert_eq!((&job["evictions"], &job["failures"]), (&1.into(), &0.into()), "{job:#}");
    whole(&cluster.logs("counter"));
}

/// Answers every request with what it is told to, until the test ends.
struct Metadata {
    port: u16,
    answer: std::sync::Arc<std::sync::Mutex<String>>,
}

impl Metadata {
    fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has ports");
        let port = listener.local_addr().expect("it is bound").port();
        let none = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_owned();
        let answer = std::sync::Arc::new(std::sync::Mutex::new(none));
        let given = answer.clone();
        std::thread::spawn(move || {
            use std::io::{Read, Write};
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let mut request = [0; 4096];
                let _ = stream.read(&mut request);
                let answer = given.lock().expect("nobody panics with it").clone();
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        Self { port, answer }
    }

    fn say(&self, text: &str) {
        let length = text.len();
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{text}");
        *self.answer.lock().expect("nobody panics with it") = answer;
    }
}

#[test]
fn a_node_that_is_given_notice_at_an_address_is_emptied() {
    let mut cluster = Cluster::new();
    let clouds = ["a1", "a2"].map(|_| Metadata::start());
    for (node, cloud) in ["a1", "a2"].iter().zip(&clouds) {
        let url = format!("http://127.0.0.1:{}/latest/meta-data/spot/instance-action", cloud.port);
        cluster.agent(node, &["--capacity", "cpu=1,memory=1Gi", "--notice-url", &url]);
    }
    cluster.submit("counter", &counter("{mode: criu}"));
    let (from, to) = places(&cluster, "counter");
    until_line(&cluster, "counter", 20);
    // Its own word, and no notice.
    clouds[usize::from(from == "a2")].say("FALSE");
    until_line(&cluster, "counter", 40);
    assert_eq!(running_at(&cluster.job("counter")), Some(from.clone()));
    clouds[usize::from(from == "a2")].say(r#"{"action": "terminate", "time": "2099-01-01T00:00:00Z"}"#);
    until(&format!("it runs on {to}"), 60, || (running_at(&cluster.job("counter"))? == to).then_some(()));
    let job = cluster.until_phase("counter", "Succeeded", 120);
    assert_eq!((&job["evictions"], &job["failures"]), (&1.into(), &0.into()), "{job:#}");
    whole(&cluster.logs("counter"));
}

#[test]
fn an_agent_ends_alone_and_before_a_shutdown_of_the_machine_its_pods_leave() {
    let mut cluster = Cluster::new();
    // What systemd's own says, as these machines are going down and then not.
    let bin = cluster.dir.path().join("bin");
    std::fs::create_dir(&bin).expect("a directory");
    let word = cluster.dir.path().join("word");
    std::fs::write(&word, "running\n").expect("the word is written");
    let script = format!("#!/bin/sh\n[ \"$1\" = is-system-running ] && cat {}\n", word.display());
    std::fs::write(bin.join("systemctl"), script).expect("the script is written");
    std::fs::set_permissions(bin.join("systemctl"), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .expect("it becomes a program");
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
    for node in ["a1", "a2"] {
        cluster.agent_with(node, &["--capacity", "cpu=1,memory=1Gi"], &[("PATH", &path)]);
    }
    cluster.submit("counter", &counter("{mode: criu}"));
    let (from, to) = places(&cluster, "counter");
    until_line(&cluster, "counter", 20);
    let ended = |cluster: &mut Cluster| {
        let at = cluster.agents.iter().rposition(|agent| agent.name == from).expect("its agent");
        let pid = cluster.agents[at].child.id().to_string();
        let sent = std::process::Command::new("kill").args(["-TERM", &pid]).status();
        assert!(sent.is_ok_and(|status| status.success()));
        until("the agent ends", 60, || cluster.agents[at].child.try_wait().expect("it is a child").map(drop));
    };
    ended(&mut cluster);
    assert_eq!(cluster.job("counter")["evictions"], 0);
    cluster.agent_with(&from, &["--capacity", "cpu=1,memory=1Gi"], &[("PATH", &path)]);
    until_line(&cluster, "counter", 60);
    assert_eq!(running_at(&cluster.job("counter")), Some(from.clone()));
    std::fs::write(&word, "stopping\n").expect("the word is written");
    ended(&mut cluster);
    until(&format!("it runs on {to}"), 60, || (running_at(&cluster.job("counter"))? == to).then_some(()));
    let job = cluster.until_phase("counter", "Succeeded", 120);
    assert_eq!((&job["evictions"], &job["failures"]), (&1.into(), &0.into()), "{job:#}");
    whole(&cluster.logs("counter"));
}

/// What another program sees in the archive: its names, and the two descriptions that it goes by.
fn seen_by_python(archive: &std::path::Path) -> Value {
    let script = "import json, sys, tarfile\n\
                  tar = tarfile.open(sys.argv[1])\n\
                  read = lambda name: json.load(tar.extractfile(name))\n\
                  diff = tarfile.open(fileobj=tar.extractfile('rootfs-diff.tar'))\n\
                  print(json.dumps({'names': tar.getnames(), 'config': read('config.dump'), 'spec': read('spec.dump'),\n\
                  'deleted': read('deleted.files'), 'diff': diff.getnames()}))";
    let output =
        std::process::Command::new("python3").args(["-c", script]).arg(archive).output().expect("python");
    assert!(output.status.success(), "{}", text(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn an_exported_checkpoint_goes_on_in_another_cluster() {
    let mut here = Cluster::new();
    here.agent("a1", &["--capacity", "cpu=1,memory=1Gi"]);
    let job = counter("{mode: criu}").replace("\"i=0;", "\"rm /etc/motd; touch /written; i=0;");
    here.submit("counter", &job);
    until_running(&here, "counter");
    until_line(&here, "counter", 60);
    let id = done(&here, &["checkpoint", "counter", "-o", "name"]).trim().to_owned();
    let archive = here.dir.path().join("counter.tar");
    let file = archive.display().to_string();
    done(&here, &["checkpoint", "export", &id, &file]);
    let seen = seen_by_python(&archive);
    let names: Vec<&str> =
        seen["names"].as_array().expect("names").iter().filter_map(Value::as_str).collect();
    for name in ["config.dump", "spec.dump", "rootfs-diff.tar", "deleted.files", "checkpoint/inventory.img"] {
        assert!(names.contains(&name), "{name}: {names:?}");
    }
    assert!(names.iter().any(|name| name.starts_with("checkpoint/core-")), "{names:?}");
    assert_eq!(seen["config"]["name"], "counter-0");
    assert_eq!(seen["spec"]["annotations"]["io.container.manager"], "libpod");
    assert_eq!(seen["spec"]["process"]["args"][0], "sh");
    assert_eq!(seen["deleted"], serde_json::json!(["/etc/motd"]));
    let diff = seen["diff"].as_array().expect("names");
    assert!(diff.contains(&"./written".into()), "{diff:?}");

    let mut there = Cluster::new();
    there.agent("b1", &["--capacity", "cpu=1,memory=1Gi"]);
    // What was altered or cut off on its way is refused, and leaves nothing that could be started.
    let whole = std::fs::read(&archive).expect("the archive is read");
    let hurt = here.dir.path().join("hurt.tar");
    let mut altered = whole.clone();
    let at = altered.windows(8).rposition(|window| window != [0; 8]).expect("something is in it");
    altered[at] ^= 1;
    for (bytes, why) in [(&altered[..], "altered"), (&whole[..whole.len() / 2], "")] {
        std::fs::write(&hurt, bytes).expect("the archive is written");
        let output = there.run(&["checkpoint", "import", &hurt.display().to_string()]);
        assert!(!output.status.success() && text(&output).contains(why), "{}", text(&output));
    }
    let none = there.json(&["get", "checkpoints"]).expect("a list");
    assert_eq!(none, serde_json::json!([]));
    for _ in 0..2 {
        assert_eq!(done(&there, &["checkpoint", "import", &file, "-o", "name"]).trim(), id);
    }
    // A controller that starts anew still has it.
    there.controller.take().expect("it runs").kill();
    there.start_controller();
    until("the checkpoint is there", 60, || {
        let kept = there.json(&["get", "checkpoints"])?;
        (kept[0]["kept"] == "imported").then_some(())
    });
    done(&there, &["restore", &id, "--name", "second"]);
    there.until_phase("second", "Succeeded", 120);
    let log = there.logs("second");
    let first: usize = log.lines().next().and_then(|line| line.parse().ok()).expect("a number");
    let got: Vec<usize> = log.lines().filter_map(|line| line.parse().ok()).collect();
    assert!(first >= 60, "it began anew: {first}");
    assert_eq!(got, (first..NUMBERS).collect::<Vec<_>>());
}
