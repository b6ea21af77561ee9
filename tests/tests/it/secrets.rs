//! Secrets reach the pods that name them, and nothing else.

use std::io::Write as _;
use std::path::Path;
use std::process::{Output, Stdio};

use crate::cluster::{Cluster, text, until};

const VALUE: &str = "hunter2-5ec4e7-correct-horse";

fn set(cluster: &Cluster, name: &str, value: &str, flags: &[&str]) -> Output {
    let mut command = cluster.berth(&[&["secret", "set", name], flags].concat());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("berth starts");
    child.stdin.take().expect("a pipe").write_all(value.as_bytes()).expect("it reads");
    child.wait_with_output().expect("it ends")
}

fn file(script: &str, name: &str) -> String {
    format!(
        "image: host\nnetwork: none\ncommand: [sh, -c, '{script}']\nresources: {{cpu: 100m, memory: 64Mi}}\n\
         secrets: [{{name: {name}, mount: /run/secrets/token}}]\n"
    )
}

/// Files below `dir` that hold the value.
fn holding(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().expect("a kind"));
        if kind.is_dir() {
            found.extend(holding(&path));
        } else if kind.is_file() {
            let bytes = std::fs::read(&path).unwrap_or_default();
            if bytes.windows(VALUE.len()).any(|window| window == VALUE.as_bytes()) {
                found.push(path.display().to_string());
            }
        }
    }
    found
}

#[test]
fn a_secret_is_for_the_pods_that_name_it() {
    let mut cluster = Cluster::of_members();
    cluster.agent("a1", &["--allow-host-image"]);
    // A job waits for what is not there yet, and says so.
    let waits = |cluster: &Cluster, job: &str, space: &str, why: &str| {
        until(&format!("{job} waits for its secret"), 60, || {
            let job = cluster.json(&["describe", "job", job, "-n", space])?;
            (job["reason"] == "SecretMissing" && job["message"].as_str()?.contains(why)).then_some(())
        });
    };
    let script = "test $(stat -c %a /run/secrets/token) = 444 && ! touch /run/secrets/token && sha256sum </run/secrets/token \
                  && ! grep -rqs hunter2 /proc/self/environ /etc/hostname && sleep 1000";
    cluster.submit("first", &file(script, "token"));
    waits(&cluster, "first", "default", "there is no secret token in namespace default");
    let kept = set(&cluster, "token", VALUE, &[]);
    assert!(kept.status.success(), "{}", text(&kept));
    let told = until("it has it", 90, || Some(cluster.logs("first")).filter(|log| !log.is_empty()));
    let sum = std::process::Command::new("sh")
        .args(["-c", &format!("printf %s {VALUE} | sha256sum")])
        .output()
        .expect("sh starts");
    assert_eq!(told, String::from_utf8_lossy(&sum.stdout), "{}", cluster.logs_of_all());
    let listed = text(&cluster.run(&["secret", "list"]));
    assert!(listed.contains("token") && listed.contains("admin") && !listed.contains(VALUE), "{listed}");

    // While the pod runs the value is on no disk: not the node's, the controller's, nor in what either tells.
    assert_eq!(holding(cluster.dir.path()), Vec::<String>::new());
    let described = text(&cluster.run(&["describe", "job", "first", "-o", "json"]));
    assert!(described.contains("/run/secrets/token") && !described.contains(VALUE), "{described}");

    // Another namespace's job does not get it.
    let other = file("true", "token").replace("image:", "namespace: other\nimage:");
    let path = cluster.dir.path().join("other.yaml");
    std::fs::write(&path, other).expect("written");
    let submitted = cluster.run(&["submit", path.to_str().expect("a plain path")]);
    assert!(submitted.status.success(), "{}", text(&submitted));
    waits(&cluster, "other", "other", "there is no secret token in namespace other");

    // What is set anew is what comes next; what is removed is gone.
    assert!(set(&cluster, "token", "second", &[]).status.success());
    cluster.submit("second", &file("cat /run/secrets/token", "token"));
    cluster.until_phase("second", "Succeeded", 60);
    assert_eq!(cluster.logs("second"), "second");
    assert!(cluster.run(&["secret", "remove", "token"]).status.success());
    assert!(text(&cluster.run(&["secret", "remove", "token"])).contains("there is no secret token"));
    let audit = text(&cluster.run(&["audit"]));
    assert!(audit.contains("secret default/token") && !audit.contains(VALUE), "{audit}");
}

#[test]
fn a_moved_pod_has_its_secret_where_it_goes() {
    let mut cluster = Cluster::new();
    for node in ["a1", "a2"] {
        cluster.agent(node, &["--capacity", "cpu=1,memory=1Gi"]);
    }
    let kept = set(&cluster, "token", VALUE, &[]);
    assert!(kept.status.success(), "{}", text(&kept));
    cluster.submit("moved", &file("while true; do cat /run/secrets/token; echo; sleep 0.1; done", "token"));
    let node = |cluster: &Cluster| {
        let pod = &cluster.job("moved")["pods"][0];
        (pod["phase"] == "Running").then(|| pod["node"].as_str().unwrap_or_default().to_owned())
    };
    let from = until("it runs", 60, || node(&cluster));
    until("it has its secret", 60, || cluster.logs("moved").contains(VALUE).then_some(()));
    // Of this version, or of none: what it began with is what it goes on with.
    let to = if from == "a1" { "a2" } else { "a1" };
    let moved = cluster.run(&["migrate", "moved", "--to", to]);
    assert!(moved.status.success(), "{}", text(&moved));
    until(&format!("it runs on {to}: {:#}", cluster.job("moved")), 90, || {
        (node(&cluster)? == to).then_some(())
    });
    let lines = cluster.logs("moved").lines().count();
    let log =
        until("it goes on", 60, || Some(cluster.logs("moved")).filter(|log| log.lines().count() > lines + 5));
    assert!(log.lines().all(|line| line == VALUE), "{log}");
    assert_eq!(cluster.job("moved")["migrations"], 1);
}
