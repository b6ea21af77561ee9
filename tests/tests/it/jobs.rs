//! Jobs from submit to log and exit code.

use std::process::{Child, Command, Stdio};

use berth_tests::image::busybox_layout;
use serde_json::json;

use crate::cluster::{Cluster, text, until};

/// Publishes as any MQTT client would.
fn mosquitto_pub(cluster: &Cluster, topic: &str, payload: &str) {
    let status = Command::new("mosquitto_pub")
        .args(["-p", &cluster.port.to_string(), "-q", "1", "-t", topic, "-m", payload])
        .status();
    assert!(status.is_ok_and(|status| status.success()), "mosquitto_pub {topic}");
}

fn host(script: &str) -> String {
    format!("image: host\ncommand: [sh, -c, {}]\nresources: {{cpu: 100m, memory: 32Mi}}\n", json!(script))
}

#[test]
fn a_plain_mqtt_client_submits_and_sees_log_and_exit_code() {
    let mut cluster = Cluster::new();
    cluster.agent("a1", &[]);
    let job = json!({
        "image": "host", "command": ["sh", "-c", "echo hello-$((6*7)); echo oops >&2; exit 3"],
        "resources": {"cpu": "0.1", "memory": "32Mi"}
    });
    mosquitto_pub(&cluster, "berth/v1/default/jobs/default/first/submit", &job.to_string());
    let status = cluster.until_phase("first", "Failed", 30);
    assert_eq!(status["pods"][0]["exitCode"], 3, "{status:#}");
    assert_eq!((&status["failures"], &status["evictions"]), (&json!(1), &json!(0)));
    let output = cluster.run(&["logs", "first"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hello-42\n");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "oops\n");
    assert_eq!(cluster.run(&["wait", "first"]).status.code(), Some(3));
    // The status is retained: whoever comes later sees it.
    let watch = Command::new("mosquitto_sub")
        .args([
            "-p",
            &cluster.port.to_string(),
            "-C",
            "1",
            "-W",
            "10",
            "-t",
            "berth/v1/default/jobs/default/first/status",
        ])
        .output()
        .expect("mosquitto_sub starts");
    assert!(text(&watch).contains(r#""phase":"Failed""#), "{}", text(&watch));
}

#[test]
fn run_streams_and_ends_with_the_programs_code() {
    let mut cluster = Cluster::new();
    cluster.agent("a1", &[]);
    for (script, code) in [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("true", 0)] {
        let output = cluster.run(&[
            "run",
            "--cpu",
            "0.1",
            "--memory",
            "32Mi",
            "--",
            "sh",
            "-c",
            &format!("echo out; echo err >&2; {script}"),
        ]);
        assert_eq!(output.status.code(), Some(code), "{script}: {}", text(&output));
        assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n", "{script}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("err\n"), "{script}");
    }
    let output = cluster.run(&["run", "--cpu", "0.1", "--memory", "32Mi", "--", "no-such-program"]);
    assert_eq!(output.status.code(), Some(127), "{}", text(&output));
    assert!(text(&output).contains("no-such-program"), "{}", text(&output));
}

#[test]
fn the_same_file_twice_is_one_job_and_a_changed_one_a_new_generation() {
    let mut cluster = Cluster::new();
    cluster.agent("a1", &[]);
    cluster.submit("twice", &host("echo one"));
    let first = cluster.until_phase("twice", "Succeeded", 30);
    cluster.submit("twice", &host("echo one"));
    let again = cluster.job("twice");
    assert_eq!(
        (&first["uid"], &first["generation"], &first["finishedAt"]),
        (&again["uid"], &again["generation"], &again["finishedAt"])
    );
    cluster.submit("twice", &host("echo two"));
    until("the second generation succeeds", 30, || {
        let job = cluster.job("twice");
        (job["generation"] == 2 && job["phase"] == "Succeeded").then_some(())
    });
    assert!(cluster.logs("twice").ends_with("two\n"), "{}", cluster.logs("twice"));
}

#[test]
fn a_job_that_fits_nowhere_waits_and_says_why() {
    let mut cluster = Cluster::new();
    cluster.agent("a1", &["--capacity", "cpu=1,memory=1Gi"]);
    cluster.submit("huge", "image: host\ncommand: [\"true\"]\nresources: {cpu: \"64\", memory: 32Mi}\n");
    let job = until("a reason", 10, || Some(cluster.job("huge")).filter(|job| job["reason"].is_string()));
    assert_eq!(job["phase"], "Pending");
    let explained = text(&cluster.run(&["explain", "huge"]));
    assert!(explained.contains("a1") && explained.contains("64"), "{explained}");
    // Room comes with a node that has it.
    cluster.submit("fits", &host("echo fits"));
    cluster.until_phase("fits", "Succeeded", 30);
    assert_eq!(cluster.phase("huge"), "Pending");
}

#[test]
fn failures_are_retried_up_to_the_limit() {
    let mut cluster = Cluster::new();
    cluster.agent("a1", &[]);
    let file = format!(
        "{}restartPolicy: OnFailure\nbackoffLimit: 2\nretry: {{min: 1s, max: 1s}}\n",
        host("echo try; exit 9")
    );
    cluster.submit("flaky", &file);
    let job = cluster.until_phase("flaky", "Failed", 60);
    assert_eq!(job["failures"], 3, "{job:#}");
    assert_eq!(cluster.logs("flaky"), "try\ntry\ntry\n");
    assert_eq!(cluster.run(&["wait", "flaky"]).status.code(), Some(9));
}

#[test]
fn cancel_suspend_and_resume() {
    let mut cluster = Cluster::new();
    cluster.agent("a1", &[]);
    let patient = "trap 'echo stopping; exit 0' TERM; echo begun; while :; do sleep 0.1; done";
    cluster.submit("patient", &host(patient));
    until("its first line", 30, || cluster.logs("patient").contains("begun").then_some(()));
    assert!(cluster.run(&["suspend", "patient"]).status.success());
    cluster.until_phase("patient", "Suspended", 30);
    assert!(cluster.run(&["resume", "patient"]).status.success());
    cluster.until_phase("patient", "Running", 30);
    assert!(cluster.run(&["cancel", "patient"]).status.success());
    let job = cluster.until_phase("patient", "Cancelled", 30);
    assert_eq!(job["failures"], 0, "{job:#}");
    assert_eq!(cluster.run(&["wait", "patient"]).status.code(), Some(130));
    assert!(cluster.logs("patient").contains("stopping"));
}

#[test]
fn two_hundred_at_once_and_none_is_lost() {
    let mut cluster = Cluster::new();
    cluster.agent("a1", &["--capacity", "cpu=64,memory=64Gi"]);
    let file = "image: host\ncommand: [sh, -c, \"echo $JOB_COMPLETION_INDEX\"]\nnetwork: none\n\
                resources: {cpu: 10m, memory: 8Mi}\nparallelism: 200\ncompletions: 200\n";
    cluster.submit("crowd", file);
    let job = cluster.until_phase("crowd", "Succeeded", 120);
    assert_eq!(job["podCounts"]["Succeeded"], 200, "{}", job["podCounts"]);
    let output = cluster.run(&["logs", "crowd"]);
    let mut numbers: Vec<u32> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().last()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..200).collect::<Vec<u32>>());
}

#[test]
fn an_image_from_a_layout_runs_as_it_says() {
    let mut cluster = Cluster::new();
    let layout = cluster.dir.path().join("image");
    busybox_layout(&layout);
    cluster.agent("a1", &[]);
    let file = format!("image: oci:{}:latest\nresources: {{cpu: 100m, memory: 32Mi}}\n", layout.display());
    cluster.submit("box", &file);
    cluster.until_phase("box", "Succeeded", 30);
    assert_eq!(cluster.logs("box"), "from the image\n");
    let missing = "image: oci:/nowhere/at/all\nresources: {cpu: 100m, memory: 32Mi}\n";
    cluster.submit("nobox", missing);
    let job = cluster.until_phase("nobox", "Failed", 30);
    let message = job["pods"][0]["message"].as_str().unwrap_or_default();
    assert!(message.contains("/nowhere/at/all"), "{job:#}");
}

#[test]
fn bad_input_is_refused_with_every_error_at_once() {
    let cluster = Cluster::new();
    until("the controller answers", 20, || cluster.json(&["get", "jobs"]));
    let path = cluster.dir.path().join("bad.yaml");
    std::fs::write(&path, "name: Bad\nimage: host\ncommnd: [x]\nresources: {cpu: lots}\n").expect("written");
    let output = cluster.run(&["submit", path.to_str().expect("plain")]);
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output);
    for part in ["bad.yaml:1:", "bad.yaml:3:", "bad.yaml:4:", "command", "lots"] {
        assert!(said.contains(part), "`{part}` in:\n{said}");
    }
    // What goes round the command line meets the same parser, and is counted.
    let topic = "berth/v1/default/jobs/default/bad/submit";
    let mut answer = Command::new("mosquitto_sub")
        .args([
            "-p",
            &cluster.port.to_string(),
            "-C",
            "1",
            "-W",
            "20",
            "-t",
            "berth/v1/default/jobs/default/bad/answer",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .expect("mosquitto_sub starts");
    until("an answer", 20, || {
        mosquitto_pub(&cluster, topic, "{\"image\":");
        answer.try_wait().expect("it can be asked").map(drop)
    });
    let answer = answer.wait_with_output().expect("it ends");
    assert!(text(&answer).contains("\"rejected\""), "{}", text(&answer));
}

#[test]
fn outputs_and_the_working_directory_travel_through_the_depot() {
    let mut cluster = Cluster::new();
    cluster.agent("a1", &[]);
    let here = cluster.dir.path().join("project");
    std::fs::create_dir_all(here.join("data")).expect("a directory");
    std::fs::write(here.join("data/in.txt"), "seed\n").expect("written");
    let mut run = cluster.berth(&[
        "run",
        "--name",
        "travel",
        "--workspace",
        "--output",
        "out",
        "--cpu",
        "0.1",
        "--memory",
        "32Mi",
    ]);
    let script = "cat data/in.txt; mkdir out; echo made > out/file; ln -s /etc/shadow out/link";
    let output = run.args(["--", "sh", "-c", script]).current_dir(&here).output().expect("berth starts");
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "seed\n");
    assert!(!here.join("out").exists(), "the container wrote into its own copy");
    let rows = until("the outputs are in the depot", 30, || {
        cluster.json(&["get", "outputs", "travel"]).filter(|rows| rows[0]["digest"].is_string())
    });
    assert_eq!(rows[0]["pod"], "travel-0", "{rows:#}");
    let to = cluster.dir.path().join("fetched");
    let copied = cluster.run(&["cp", "travel:out", to.to_str().expect("plain")]);
    assert!(copied.status.success(), "{}", text(&copied));
    let made = Command::new("find").arg(&to).args(["-name", "file"]).output().expect("find runs");
    let path = String::from_utf8_lossy(&made.stdout).trim().to_owned();
    assert_eq!(std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("`{path}`: {error}")), "made\n");
}

/// A registry that ends with its handle.
pub struct Registry(Child);

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A real registry on loopback, and the image that it has.
pub fn registry_with_busybox(cluster: &Cluster) -> (Registry, String) {
    let layout = cluster.dir.path().join("image");
    busybox_layout(&layout);
    let port = crate::cluster::free_port();
    let config = cluster.dir.path().join("registry.yml");
    let store = cluster.dir.path().join("registry");
    let yaml = format!(
        "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n",
        store.display()
    );
    std::fs::write(&config, yaml).expect("written");
    let registry = Command::new("docker-registry")
        .arg("serve")
        .arg(&config)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("docker-registry starts");
    let registry = Registry(registry);
    let image = format!("127.0.0.1:{port}/lab/box:1");
    until("the image is pushed", 20, || {
        let copy = Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--dest-tls-verify=false", "-q"])
            .arg(format!("oci:{}:latest", layout.display()))
            .arg(format!("docker://{image}"))
            .stderr(Stdio::null())
            .status();
        copy.ok().filter(|status| status.success())
    });
    (registry, image)
}

#[test]
fn an_image_comes_from_a_real_registry() {
    let mut cluster = Cluster::new();
    let (registry, image) = registry_with_busybox(&cluster);
    cluster.agent("a1", &[]);
    let output = cluster.run(&[
        "run",
        "--image",
        &image,
        "--cpu",
        "0.1",
        "--memory",
        "32Mi",
        "--",
        "sh",
        "-c",
        "echo pulled",
    ]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "pulled\n", "{}", text(&output));
    drop(registry);
    // What is here needs no registry.
    let output = cluster.run(&[
        "run",
        "--image",
        &image,
        "--cpu",
        "0.1",
        "--memory",
        "32Mi",
        "--",
        "sh",
        "-c",
        "echo kept",
    ]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "kept\n", "{}", text(&output));
}

#[test]
fn of_equal_nodes_the_one_that_has_the_image_is_taken() {
    let mut cluster = Cluster::new();
    let (_registry, image) = registry_with_busybox(&cluster);
    for node in ["a1", "a2"] {
        cluster.agent(node, &["--capacity", "cpu=1,memory=256Mi"]);
    }
    let job = |more: &str| format!("image: {image}\nresources: {{cpu: 100m, memory: 32Mi}}\n{more}");
    let node = |name: &str| cluster.until_phase(name, "Succeeded", 60)["pods"][0]["node"].clone();
    cluster.submit("first", &job("affinity: node.name == \"a2\"\n"));
    assert_eq!(node("first"), "a2");
    until("the controller knows what a2 holds", 20, || {
        let images = cluster.json(&["describe", "node", "a2"])?["images"].take();
        images.as_array()?.contains(&json!(image)).then_some(())
    });
    // Of nodes that are equal otherwise the one that came first is taken.
    cluster.submit("plain", &host("true"));
    cluster.submit("second", &job(""));
    assert_eq!((node("plain"), node("second")), (json!("a1"), json!("a2")), "{}", cluster.logs_of_all());
    let explained = cluster.json(&["explain", "second"]).unwrap_or_default();
    let has = |i: usize| (explained["nodes"][i]["node"].clone(), explained["nodes"][i]["hasImage"].clone());
    assert_eq!([has(0), has(1)], [(json!("a1"), json!(false)), (json!("a2"), json!(true))], "{explained:#}");
    let said = text(&cluster.run(&["explain", "second"]));
    assert!(said.contains("has the image") && said.contains("would pull the image"), "{said}");
}

#[test]
fn what_the_node_does_not_grant_is_refused_with_the_way_out() {
    let mut cluster = Cluster::new();
    let shared = cluster.dir.path().to_owned();
    std::os::unix::fs::symlink("/etc", shared.join("link")).expect("the link is made");
    let path = shared.to_str().expect("a plain path");
    cluster.agent("a1", &["--allow-host-network=false", "--allow-host-path", path]);
    let file = "image: host\ncommand: [\"true\"]\nresources: {cpu: 100m, memory: 32Mi}\n";
    let volume = |host: &str| format!("volumes: [{{mount: /data, host: {host}}}]\n");
    for (name, more, what, rule) in [
        ("caps", "capabilities: [SYS_ADMIN]\n", "capability SYS_ADMIN", "capabilities"),
        ("net", "network: host\n", "`network: host`", "networks"),
        ("vol", &volume("/etc"), "host path /etc", "host-paths"),
    ] {
        cluster.submit(name, &format!("{file}{more}"));
        until("it waits, and says for what", 30, || {
            let job = cluster.job(name);
            let why = format!("0 of 1 node fits: 1 has a policy that allows no {what}");
            (job["phase"] == "Pending" && job["message"].as_str()?.contains(&why)).then_some(())
        });
        let said = text(&cluster.run(&["explain", name]));
        assert!(said.contains(&format!("see `{rule}` there")), "{said}");
    }
    // What a path leads to is what counts; and nothing allows the agent's own.
    for (name, host, reason, why) in [
        ("link", format!("{path}/link"), "PolicyRefused", "host path /etc, where"),
        ("own", format!("{path}/a1/identity"), "VolumeForbidden", "agent's own data"),
        ("all", path.to_owned(), "VolumeForbidden", "agent's own data"),
    ] {
        cluster.submit(name, &format!("{file}{}", volume(&host)));
        let job = cluster.until_phase(name, "Failed", 30);
        let pod = &job["pods"][0];
        assert_eq!(pod["reason"], reason, "{job:#}");
        assert!(pod["message"].as_str().is_some_and(|message| message.contains(why)), "{job:#}");
    }
}
