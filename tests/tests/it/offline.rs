//! A node whose controller and broker are gone, and which begins anew meanwhile: its pods do what their jobs say, and all
//! of it is told when the controller is back.

use std::fs;
use std::path::PathBuf;

use crate::cluster::{Cluster, until};

const NUMBERS: usize = 1100;

/// A minute and a half of numbers.
fn counter() -> String {
    format!(
        "image: host\ncommand: [sh, -c, \"i=0; while [ $i -lt {NUMBERS} ]; do echo $i; i=$((i+1)); sleep 0.08; done\"]\n\
         resources: {{cpu: 100m, memory: 64Mi}}\ncheckpoint: {{mode: criu, interval: 10s}}\n"
    )
}

const CONTINUE: &str = "onDisconnect: {do: continue}\n";

const FLAKY: &str = "image: host\ncommand: [sh, -c, \"echo begun; sleep 1; exit 3\"]\n\
                     resources: {cpu: 100m, memory: 32Mi}\nrestartPolicy: OnFailure\nbackoffLimit: 1000\n\
                     retry: {min: 1s, max: 2s}\nonDisconnect: {do: continue}\n";

/// The directory of the job's pod on the node.
fn pod_dir(cluster: &Cluster, job: &str) -> PathBuf {
    let uid = cluster.job(job)["uid"].as_str().expect("a uid").to_owned();
    cluster.dir.path().join("a1/pods").join(format!("{uid}-0.1"))
}

/// What the pod has said, as its node has it.
fn said(dir: &std::path::Path) -> String {
    let mut segments: Vec<PathBuf> =
        fs::read_dir(dir.join("log")).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    segments.sort();
    segments.into_iter().map(|path| fs::read_to_string(path).unwrap_or_default()).collect()
}

fn last_number(dir: &std::path::Path) -> Option<usize> {
    said(dir).lines().filter_map(|line| line.parse().ok()).next_back()
}

/// Checkpoints that would serve without the depot, by their levels.
fn sealed(dir: &std::path::Path) -> Vec<u64> {
    let all = fs::read_dir(dir.join("checkpoints")).into_iter().flatten().flatten();
    let sealed = all.filter(|entry| entry.path().join("manifest.json").exists());
    sealed.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[test]
fn pods_go_on_are_retried_saved_and_begin_again_without_a_controller() {
    let mut cluster = Cluster::new();
    let agent = cluster.agent("a1", &[]);
    cluster.submit("counter", &format!("{}{CONTINUE}", counter()));
    cluster.submit("flaky", FLAKY);
    let pauses = "image: host\ncommand: [sleep, \"600\"]\nresources: {cpu: 100m, memory: 32Mi}\n";
    cluster.submit("pausing", pauses);
    for job in ["counter", "flaky", "pausing"] {
        cluster.until_phase(job, "Running", 60);
    }
    let (counter, flaky, pausing) =
        (pod_dir(&cluster, "counter"), pod_dir(&cluster, "flaky"), pod_dir(&cluster, "pausing"));
    until("some numbers", 60, || last_number(&counter).filter(|n| *n > 20));
    cluster.controller.as_mut().expect("a controller").kill();

    let own =
        until("a checkpoint of its own", 120, || sealed(&counter).into_iter().find(|level| *level > 1 << 32));
    let begun = said(&flaky).matches("begun").count();
    let next = until("the next takes its place", 60, || {
        sealed(&counter).into_iter().find(|level| *level > own).filter(|_| sealed(&counter).len() == 1)
    });
    assert_eq!(next, own + 1);
    assert!(said(&flaky).matches("begun").count() > begun + 1, "it was not begun again");

    // The machine ends, with all that is not on its disk, and begins anew.
    cluster.agents[agent].kill();
    cluster.kill_shims("a1");
    let before = last_number(&counter).expect("numbers");
    let begun = said(&flaky).matches("begun").count();
    cluster.agent_alone("a1", &[], &[]);
    until("the counter is beyond where it was", 60, || last_number(&counter).filter(|n| *n > before));
    until("and the other begins again", 60, || {
        (said(&flaky).matches("begun").count() > begun + 1).then_some(())
    });
    assert!(!pausing.join("shim.sock").exists(), "it may not begin");
    // The other has none: where its run was on its way, it says so.
    let (told, key) = (cluster.log("a1"), counter.file_name().expect("a pod's name").to_string_lossy());
    let anew = format!("pod {key} goes on without a checkpoint");
    assert!(!told.contains(&anew), "{told}");

    cluster.start_controller();
    let job = cluster.until_phase("counter", "Succeeded", 180);
    assert_eq!((&job["evictions"], &job["failures"]), (&1.into(), &0.into()), "{job:#}");
    assert_eq!(job["pods"][0]["epoch"], 1, "{job:#}");
    let numbers: Vec<usize> = cluster.logs("counter").lines().filter_map(|line| line.parse().ok()).collect();
    assert_eq!(numbers, (0..NUMBERS).collect::<Vec<_>>());
    let flaky = cluster.job("flaky");
    let failures = flaky["failures"].as_u64().unwrap_or_default();
    assert!(failures > begun as u64, "{flaky:#}");
    assert_eq!(flaky["pods"][0]["epoch"], 1, "{flaky:#}");
    let job = cluster.job("pausing");
    assert_eq!((&job["evictions"], &job["pods"][0]["epoch"]), (&1.into(), &2.into()), "{job:#}");
}
