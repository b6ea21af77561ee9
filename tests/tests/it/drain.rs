//! A node full of pods, emptied.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::Value;

use crate::cluster::{Cluster, text, until};

const PODS: usize = 20;
const DEADLINE_S: u64 = 50;

/// Each pod's numbers, in the order of its log.
fn numbers(cluster: &Cluster, job: &str) -> BTreeMap<String, Vec<usize>> {
    let mut all: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for line in cluster.logs(job).lines() {
        let mut words = line.split_whitespace();
        let (Some(pod), Some(number)) = (words.next(), words.next_back()) else { panic!("{line}") };
        all.entry(pod.to_owned()).or_default().push(number.parse().unwrap_or_else(|_| panic!("{line}")));
    }
    all
}

fn running_on(job: &Value, node: &str) -> usize {
    let pods = job["pods"].as_array().map(Vec::as_slice).unwrap_or_default();
    pods.iter().filter(|pod| pod["phase"] == "Running" && pod["node"] == node).count()
}

#[test]
fn a_node_with_20_pods_is_drained_by_its_deadline_and_nothing_is_lost() {
    let mut cluster = Cluster::new();
    let stop = cluster.dir.path().join("stop");
    std::fs::create_dir(&stop).expect("a directory");
    let stop_path = stop.display().to_string();
    let flags = ["--capacity", "cpu=2,memory=2Gi", "--allow-host-path", &stop_path];
    cluster.agent("full", &flags);
    // Counts until it is told to end, by a file.
    let job = format!(
        "image: host\n\
         command: [sh, -c, \"i=0; while [ ! -e /stop/now ]; do echo $i; i=$((i+1)); sleep 0.2; done\"]\n\
         parallelism: {PODS}\ncompletions: {PODS}\nnetwork: none\n\
         resources: {{cpu: 50m, memory: 32Mi}}\nlimits: {{cpu: 1}}\ncheckpoint: {{mode: criu}}\n\
         volumes: [{{mount: /stop, host: {stop_path}, readOnly: true}}]\n"
    );
    cluster.submit("counters", &job);
    until(&format!("all run\n{}", cluster.logs_of_all()), 60, || {
        (running_on(&cluster.job("counters"), "full") == PODS).then_some(())
    });
    cluster.agent("empty", &flags);
    until("each has counted", 30, || {
        let numbers = numbers(&cluster, "counters");
        (numbers.len() == PODS && numbers.values().all(|numbers| numbers.len() > 2)).then_some(())
    });
    let before = numbers(&cluster, "counters");

    let begun = Instant::now();
    let drained = cluster.run(&["drain", "full", "--deadline", &format!("{DEADLINE_S}s")]);
    let took = begun.elapsed();
    assert!(drained.status.success(), "{}\n{}", text(&drained), cluster.logs_of_all());
    assert!(took.as_secs() < DEADLINE_S, "{took:?}");
    until(&format!("all run elsewhere: {:#}", cluster.job("counters")), 60, || {
        (running_on(&cluster.job("counters"), "empty") == PODS).then_some(())
    });
    until("each has counted on", 30, || {
        let numbers = numbers(&cluster, "counters");
        before.iter().all(|(pod, before)| numbers[pod].len() > before.len() + 2).then_some(())
    });

    std::fs::write(stop.join("now"), "").expect("a file");
    let ended = cluster.until_phase("counters", "Succeeded", 60);
    let counted = ["evictions", "migrations", "failures"].map(|name| ended[name].as_u64());
    assert_eq!(counted, [Some(PODS as u64), Some(PODS as u64), Some(0)], "{ended:#}");
    for pod in ended["pods"].as_array().expect("pods") {
        // Once: a start that failed would have cost an epoch.
        assert_eq!((&pod["epoch"], &pod["restarts"]), (&2.into(), &0.into()), "{pod:#}");
    }
    let numbers = numbers(&cluster, "counters");
    assert_eq!(numbers.len(), PODS);
    for (pod, numbers) in numbers {
        assert_eq!(numbers, (0..numbers.len()).collect::<Vec<_>>(), "{pod}");
    }
}
