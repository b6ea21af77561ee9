//! A pod that moves finds at its next node what it needs, brought there while it still ran.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use berth_protocol::units::Timestamp;
use berth_tests::image::busybox_layout;
use serde_json::Value;

use crate::cluster::{Cluster, text, until};

const NUMBERS: usize = 300;

fn entries(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// When the directory got its last entry.
fn made_at(dir: &Path) -> SystemTime {
    std::fs::metadata(dir)
        .and_then(|meta| meta.modified())
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

fn running_at(job: &Value) -> Option<String> {
    let pod = &job["pods"][0];
    (pod["phase"] == "Running").then(|| pod["node"].as_str().unwrap_or_default().to_owned())
}

fn done(cluster: &Cluster, args: &[&str]) {
    let output = cluster.run(args);
    assert!(output.status.success(), "{args:?}: {}\n{}", text(&output), cluster.logs_of_all());
}

#[test]
fn image_and_last_checkpoint_are_at_the_next_node_before_the_pod_is_frozen() {
    let mut cluster = Cluster::new();
    let layout = cluster.dir.path().join("image");
    busybox_layout(&layout);
    for node in ["a1", "a2"] {
        cluster.agent(node, &["--capacity", "cpu=1,memory=1Gi"]);
    }
    // Some memory that stays as it is, and a count.
    let script = format!(
        "x=$(busybox head -c 3000000 /dev/urandom | busybox base64); i=0; \
         while [ $i -lt {NUMBERS} ]; do echo $i; i=$((i+1)); busybox sleep 0.05; done"
    );
    let file = format!(
        "image: oci:{}:latest\ncommand: [sh, -c, {}]\nresources: {{cpu: 100m, memory: 64Mi}}\n\
         checkpoint: {{mode: criu}}\n",
        layout.display(),
        serde_json::json!(script)
    );
    cluster.submit("counter", &file);
    let from = until("it runs", 60, || running_at(&cluster.job("counter")));
    let to = if from == "a1" { "a2" } else { "a1" };
    until("it counts", 60, || (cluster.logs("counter").lines().count() > 20).then_some(()));
    done(&cluster, &["checkpoint", "counter"]);
    let there = cluster.dir.path().join(to);
    let (layers, kept) = (there.join("images/layers"), there.join("checkpoints"));
    assert!(entries(&layers).is_empty() && entries(&kept).is_empty());

    done(&cluster, &["migrate", "counter", "--to", to]);
    until(&format!("it runs on {to}\n{}", cluster.logs_of_all()), 60, || {
        (running_at(&cluster.job("counter"))? == to).then_some(())
    });
    let rows = cluster.json(&["get", "checkpoints"]).expect("a list");
    let [left_with, before] = rows.as_array().map(Vec::as_slice).expect("rows") else { panic!("{rows:#}") };
    // Its time is when the pod began to stand still.
    let at = Timestamp::parse(left_with["at"].as_str().expect("a time")).expect("a time");
    let frozen_at = UNIX_EPOCH + Duration::from_millis(at.0);
    let staged = kept.join(before["id"].as_str().expect("a digest").trim_start_matches("sha256:"));
    // What says whose it is was written last; later the restore has taken most of it over.
    let whole = staged.join("pod");
    for made in entries(&layers).iter().chain([&whole]) {
        assert!(made_at(made) < frozen_at, "{} came late: {rows:#}", made.display());
    }
    assert_eq!((entries(&layers).len(), entries(&kept)), (1, vec![staged]));

    let job = cluster.until_phase("counter", "Succeeded", 120);
    assert_eq!((&job["migrations"], &job["failures"]), (&1.into(), &0.into()), "{job:#}");
    let got: Vec<usize> = cluster.logs("counter").lines().filter_map(|line| line.parse().ok()).collect();
    assert_eq!(got, (0..NUMBERS).collect::<Vec<_>>());
}
