//! What a person would try, step by step.

use berth_protocol::codec;
use berth_protocol::ids::{Digest, Epoch, Generation, JobName, LedgerId, Namespace, NodeId, PodId, Run};
use berth_protocol::job::{DisconnectAction, JobSpec, Restart, RestartPolicy, Workspace};
use berth_protocol::message::node::{Events, NodeEvent, NumberedEvent, PodChange, PodEvent};
use berth_protocol::message::user::{Answer, JobPhase, JobStatus, NodeState, PodStatus, Verdict};
use berth_protocol::pod::{Cause, PodPhase};
use berth_protocol::topic::{NodeTopic, Topic};
use berth_protocol::units::{Bytes, MilliCpu, Millis, Timestamp};

use super::super::cluster::Output;
use super::super::{Effect, Event, fit};
use super::world::{KEY, World, at, inventory, outcome, spec};

fn program(spec: &mut JobSpec, ms: u64, code: u8) {
    spec.pod.containers[0].command = vec!["run".to_owned(), ms.to_string(), code.to_string()];
}

fn generation(answer: &Answer) -> u64 {
    match &answer.verdict {
        Verdict::Accepted { generation, .. } => generation.0,
        Verdict::Rejected { rejected } => panic!("rejected: {rejected:?}"),
    }
}

fn code(answer: &Answer) -> &str {
    match &answer.verdict {
        Verdict::Rejected { rejected } => &rejected.code,
        Verdict::Accepted { .. } => "accepted",
    }
}

fn phase(world: &World, job: &str) -> Option<JobPhase> {
    world.status(job).map(|status| status.phase)
}

fn finish(world: &mut World, job: &str) -> JobStatus {
    world.until("the job ends", |w| phase(w, job).is_some_and(JobPhase::is_final));
    world.status(job).unwrap()
}

fn pod_of(world: &World, job: &str) -> PodId {
    world.controller.cluster.names[&(Namespace::default_namespace(), JobName::parse(job).unwrap())].pod(0)
}

/// The node's agent has one thing more to tell of a pod's first epoch.
fn tell(world: &mut World, node: &NodeId, pod: &PodId, change: PodChange) {
    let now = world.now;
    let agent = world.agents.get_mut(node).unwrap();
    let event = NodeEvent::Pod(PodEvent { pod: pod.clone(), epoch: Epoch(1), run: Run(1), change });
    agent.events_last += 1;
    agent.events.push_back(NumberedEvent { n: agent.events_last, at: Timestamp(now), event });
    agent.events_at = now;
    world.run(3_000);
}

#[test]
fn a_job_runs_to_its_end() {
    let mut world = World::new();
    let node = world.add("n1", inventory(4, 0));
    world.run(100);
    assert_eq!(generation(&world.submit(&spec("hello"))), 1);
    let status = world.status("hello").unwrap();
    assert_eq!(status.phase, JobPhase::Pending);
    assert_eq!((status.pods[0].phase, status.pods[0].epoch), (PodPhase::Assigned, Epoch(1)));
    world.until("it runs", |w| phase(w, "hello") == Some(JobPhase::Running));
    let status = finish(&mut world, "hello");
    assert_eq!(status.phase, JobPhase::Succeeded);
    assert_eq!(status.pods[0].phase, PodPhase::Succeeded);
    assert_eq!(status.pods[0].exit_code, Some(0));
    assert!(status.started_at.is_some() && status.finished_at >= status.started_at);
    assert_eq!((status.failures, status.evictions), (0, 0));
    assert!(world.node(&node).state == NodeState::Online);
    // Nothing but heartbeats from here on, and the same file changes nothing.
    let (store, sent) = (world.store.clone(), world.messages);
    assert_eq!(generation(&world.submit(&spec("hello"))), 1);
    world.run(30_000);
    assert_eq!(world.store, store);
    assert!(world.messages - sent <= 8, "{} messages", world.messages - sent);
}

#[test]
fn a_file_that_comes_again_behind_a_later_one_changes_nothing() {
    let mut world = World::new();
    world.add("n1", inventory(4, 0));
    let with = |ms: u64, more: &[(&str, serde_json::Value)]| {
        let mut job = spec("twice");
        program(&mut job, ms, 0);
        let mut file = berth_protocol::job::render(&job);
        for (field, value) in more {
            file[*field] = value.clone();
        }
        serde_json::to_vec(&file).unwrap()
    };
    let (a, b) = (serde_json::json!("a"), serde_json::json!("b"));
    let (first, second) = (with(1, &[("id", a)]), with(2, &[("id", b.clone())]));
    assert_eq!(generation(&world.submit_bytes("twice", &first)), 1);
    assert_eq!(generation(&world.submit_bytes("twice", &first)), 1);
    assert_eq!(generation(&world.submit_bytes("twice", &second)), 2);
    assert_eq!(code(&world.submit_bytes("twice", &first)), "Overtaken");
    assert_eq!(generation(&world.submit_bytes("twice", &second)), 2);
    // Sent by somebody, on purpose or not: what comes last counts, where nobody says otherwise.
    assert_eq!(generation(&world.submit_bytes("twice", &with(1, &[]))), 3);
    assert_eq!(code(&world.submit_bytes("twice", &with(2, &[("id", b)]))), "Overtaken");
    assert_eq!(code(&world.submit_bytes("twice", &with(2, &[("replaces", 2.into())]))), "Overtaken");
    assert_eq!(generation(&world.submit_bytes("twice", &with(2, &[("replaces", 3.into())]))), 4);
    world.restart_controller();
    assert_eq!(code(&world.submit_bytes("twice", &first)), "Overtaken");
}

#[test]
fn a_failure_ends_a_job_that_is_never_tried_again() {
    let mut world = World::new();
    world.add("n1", inventory(4, 0));
    let mut job = spec("bad");
    program(&mut job, 10, 3);
    world.submit(&job);
    let status = finish(&mut world, "bad");
    assert_eq!((status.phase, status.failures), (JobPhase::Failed, 1));
    assert_eq!(status.pods[0].exit_code, Some(3));
    assert_eq!(status.message.as_deref(), Some("pod bad-0 ended with exit code 3"));
    let explained = world.query(r#"{"explain":{"namespace":"default","job":"bad"}}"#);
    let summary = "it has ended: Failed, PodFailed: pod bad-0 ended with exit code 3";
    assert_eq!(explained["result"]["summary"], summary, "{explained}");
}

#[test]
fn failures_are_forgiven_up_to_the_limit_with_growing_pauses() {
    let mut world = World::new();
    world.add("n1", inventory(4, 0));
    let mut job = spec("flaky");
    program(&mut job, 10, 1);
    job.pod.restart = Restart { policy: RestartPolicy::OnFailure, backoff_limit: 3, ..Restart::default() };
    world.submit(&job);
    let start = world.now;
    let status = finish(&mut world, "flaky");
    assert_eq!((status.failures, status.reason.as_deref()), (4, Some("BackoffLimitExceeded")));
    // 10 + 20 + 40 s, less up to a tenth.
    let took = world.now - start;
    assert!((63_000..73_000).contains(&took), "{took}");
    assert_eq!(status.pods[0].epoch, Epoch(4));
}

#[test]
fn many_short_pods_through_two_slots() {
    let mut world = World::new();
    world.add("n1", inventory(2, 0));
    let mut job = spec("many");
    program(&mut job, 5, 0);
    (job.parallelism, job.completions) = (500, 500);
    world.submit(&job);
    let status = finish(&mut world, "many");
    assert_eq!(status.pod_counts.get(&PodPhase::Succeeded), Some(&500));
    assert_eq!(status.pods.len(), 100);
    println!("500 pods: {} messages from the controller", world.messages);
}

#[test]
fn what_fits_nowhere_waits_and_says_why() {
    let mut world = World::new();
    for (name, cores, zone) in [("n1", 2, Some("lab")), ("n2", 2, Some("lab")), ("n3", 8, None)] {
        let mut has = inventory(cores, 0);
        if let Some(zone) = zone {
            has.labels.insert("zone".to_owned(), zone.to_owned());
        }
        world.add(name, has);
    }
    world.run(100);
    let mut job = spec("big");
    job.pod.containers[0].resources.cpu = MilliCpu(4000);
    job.pod.containers[0].limits.cpu = MilliCpu(4000);
    job.placement.affinity = Some("node.labels.zone == \"lab\" && node.cores >= 1".to_owned());
    world.submit(&job);
    let status = world.status("big").unwrap();
    assert_eq!(status.reason.as_deref(), Some("Unschedulable"));
    assert_eq!(status.message.as_deref(), Some("0 of 3 nodes fit: 2 need 4 cores, 1 lacks label zone"));
    let reply = world.query(r#"{"explain":{"namespace":"default","job":"big"}}"#);
    let nodes = &reply["result"]["nodes"];
    assert_eq!(nodes[0]["reasons"][0], "needs 4 cores, 2 are free");
    assert_eq!(nodes[2]["reasons"][0], "lacks label zone, which the affinity asks for");
    // A node that fits comes.
    let mut has = inventory(4, 0);
    has.labels.insert("zone".to_owned(), "lab".to_owned());
    let node = world.add("n4", has);
    assert_eq!(finish(&mut world, "big").pods[0].node, Some(node));
}

#[test]
fn bad_input_is_refused_with_a_reason() {
    let mut world = World::new();
    let mut job = spec("wrong");
    job.placement.affinity = Some("node.cores >".to_owned());
    assert_eq!(code(&world.submit(&job)), "InvalidJob");
    let status = world.status("wrong").unwrap();
    assert_eq!((status.phase, status.reason.as_deref()), (JobPhase::Rejected, Some("InvalidJob")));
    assert_eq!(code(&world.command("nobody", "c1", "cancel")), "NoSuchJob");
    assert_eq!(code(&world.command("nobody", "c1", "dance")), "InvalidCommand");
    world.run(2 * 3_600_000);
    assert!(world.status("wrong").is_none(), "an hour is over");
    job.placement.affinity = None;
    assert_eq!(code(&world.submit(&job)), "accepted");
    job.placement.affinity = Some("node.cores >".to_owned());
    assert_eq!(code(&world.submit(&job)), "InvalidJob");
    assert_eq!(phase(&world, "wrong"), Some(JobPhase::Pending), "the accepted job keeps its status");
}

#[test]
fn suspend_resume_cancel_restart() {
    let mut world = World::new();
    world.add("n1", inventory(4, 0));
    let mut job = spec("long");
    program(&mut job, 3_600_000, 0);
    world.submit(&job);
    world.until("it runs", |w| phase(w, "long") == Some(JobPhase::Running));
    assert_eq!(generation(&world.command("long", "a", "suspend")), 1);
    world.run(1_000);
    let status = world.status("long").unwrap();
    assert_eq!((status.phase, status.pods[0].phase), (JobPhase::Suspended, PodPhase::Pending));
    assert_eq!(status.evictions, 0);
    world.command("long", "b", "resume");
    world.command("long", "a", "suspend"); // Seen: changes nothing.
    world.until("it runs again", |w| phase(w, "long") == Some(JobPhase::Running));
    world.command("long", "c", "cancel");
    let status = finish(&mut world, "long");
    assert_eq!(status.phase, JobPhase::Cancelled);
    assert_eq!(status.pods[0].exit_code, Some(143));
    assert_eq!(code(&world.command("long", "d", "suspend")), "JobFinished");
    assert_eq!(generation(&world.command("long", "e", "restart")), 2);
    world.until("it runs anew", |w| phase(w, "long") == Some(JobPhase::Running));
    assert_eq!(world.status("long").unwrap().pods[0].epoch, Epoch(3), "epochs go on counting");
}

#[test]
fn a_changed_file_is_a_new_generation() {
    let mut world = World::new();
    world.add("n1", inventory(4, 0));
    let mut job = spec("job");
    program(&mut job, 3_600_000, 0);
    world.submit(&job);
    world.until("it runs", |w| phase(w, "job") == Some(JobPhase::Running));
    program(&mut job, 50, 0);
    assert_eq!(generation(&world.submit(&job)), 2);
    let status = finish(&mut world, "job");
    assert_eq!((status.phase, status.generation), (JobPhase::Succeeded, Generation(2)));
    assert_eq!((status.evictions, status.pods[0].epoch), (0, Epoch(2)));
}

#[test]
fn a_silent_node_loses_its_pods_after_their_lease() {
    let mut world = World::new();
    let first = world.add("n1", inventory(4, 0));
    world.run(100);
    let mut job = spec("job");
    program(&mut job, 300_000, 0);
    world.submit(&job);
    world.until("it runs", |w| phase(w, "job") == Some(JobPhase::Running));
    let second = world.add("n2", inventory(4, 0));
    world.run(100);
    world.agents.get_mut(&first).unwrap().cut = true;
    let cut = world.now;
    world.until("it moves", |w| w.status("job").unwrap().pods[0].node.as_ref() == Some(&second));
    let took = world.now - cut;
    assert!((50_000..=71_000).contains(&took), "{took}");
    assert_eq!(world.node(&first).state, NodeState::Offline);
    let status = world.status("job").unwrap();
    assert_eq!((status.evictions, status.failures, status.pods[0].epoch), (1, 0, Epoch(2)));
    // It comes back with the old epoch, and is told to stop it.
    world.agents.get_mut(&first).unwrap().cut = false;
    world.run(30_000);
    assert_eq!(world.node(&first).state, NodeState::Online);
    assert_eq!(finish(&mut world, "job").phase, JobPhase::Succeeded);
}

/// A world of so many nodes and a job that runs on one of them.
fn long_job(nodes: usize) -> (World, Vec<NodeId>, NodeId) {
    let mut world = World::new();
    let nodes = (0..nodes).map(|i| world.add(&format!("n{i}"), inventory(4, 0))).collect();
    world.run(100);
    let mut job = spec("job");
    program(&mut job, 36_000_000, 0);
    world.submit(&job);
    world.until("it runs", |w| phase(w, "job") == Some(JobPhase::Running));
    let at = world.status("job").unwrap().pods[0].node.clone().unwrap();
    (world, nodes, at)
}

#[test]
fn a_node_that_falls_silent_while_the_broker_is_away_is_missed_all_the_same() {
    let (mut world, _, first) = long_job(2);
    world.agents.get_mut(&first).unwrap().up = false;
    world.run(10_000);
    world.feed(Event::BusDown);
    world.run(14_000);
    assert!(world.controller.counters().blind);
    world.feed(Event::BusUp);
    assert!(!world.controller.counters().blind);
    world.until("it moves", |w| w.status("job").unwrap().pods[0].node.as_ref().is_some_and(|n| *n != first));
    assert_eq!(world.node(&first).state, NodeState::Offline);
    let nodes = &world.controller.counters().nodes;
    assert_eq!((nodes["online"], nodes["silent"], nodes["offline"]), (1, 0, 1));
}

#[test]
fn who_stays_silent_when_the_others_are_heard_again_is_given_up() {
    let (mut world, nodes, first) = long_job(5);
    let others: Vec<NodeId> = nodes.into_iter().filter(|node| *node != first).take(2).collect();
    for node in others.iter().chain([&first]) {
        world.agents.get_mut(node).unwrap().cut = true;
    }
    world.run(200_000);
    assert!(world.controller.counters().blind);
    assert_eq!(world.status("job").unwrap().evictions, 0);
    for node in &others {
        world.agents.get_mut(node).unwrap().cut = false;
    }
    world.until("it moves", |w| w.status("job").unwrap().pods[0].node.as_ref().is_some_and(|n| *n != first));
    assert!(!world.controller.counters().blind);
}

#[test]
fn a_controller_that_starts_without_its_broker_gives_nobody_up() {
    let (mut world, _, node) = long_job(1);
    world.agents.get_mut(&node).unwrap().cut = true;
    world.restart_controller_alone();
    world.run(300_000);
    world.agents.get_mut(&node).unwrap().cut = false;
    world.feed(Event::BusUp);
    world.run(30_000);
    let status = world.status("job").unwrap();
    assert_eq!((status.phase, status.evictions, status.pods[0].epoch), (JobPhase::Running, 0, Epoch(1)));
}

#[test]
fn a_rebooted_node_gets_its_pods_again_and_results_in_its_outbox_count() {
    let mut world = World::new();
    let node = world.add("n1", inventory(4, 0));
    let (mut long, mut short) = (spec("long"), spec("short"));
    program(&mut long, 100_000, 0);
    program(&mut short, 5_000, 0);
    world.submit(&long);
    world.submit(&short);
    world.until("both run", |w| phase(w, "short") == Some(JobPhase::Running));
    world.run(1_000);
    world.agents.get_mut(&node).unwrap().cut = true;
    world.run(6_000);
    let now = world.now;
    let agent = world.agents.get_mut(&node).unwrap();
    agent.cut = false;
    agent.pods.retain(|_, held| held.life != super::world::Life::Over);
    agent.reboot(now);
    assert_eq!(finish(&mut world, "short").evictions, 0);
    let status = finish(&mut world, "long");
    assert_eq!((status.phase, status.evictions, status.failures), (JobPhase::Succeeded, 1, 0));
}

#[test]
fn a_restarted_controller_goes_on() {
    let mut world = World::new();
    world.add("n1", inventory(4, 0));
    let mut job = spec("job");
    program(&mut job, 60_000, 0);
    world.submit(&job);
    world.until("it runs", |w| phase(w, "job") == Some(JobPhase::Running));
    world.restart_controller();
    let status = finish(&mut world, "job");
    assert_eq!((status.phase, status.evictions, status.pods[0].epoch), (JobPhase::Succeeded, 0, Epoch(1)));
}

#[test]
fn a_deadline_counts_running_time() {
    let mut world = World::new();
    let mut job = spec("job");
    program(&mut job, 3_600_000, 0);
    job.active_deadline = Some(Millis::from_secs(300));
    world.submit(&job);
    world.run(600_000);
    assert_eq!(phase(&world, "job"), Some(JobPhase::Pending));
    world.add("n1", inventory(4, 0));
    let start = world.now;
    let status = finish(&mut world, "job");
    assert_eq!((status.phase, status.reason.as_deref()), (JobPhase::Failed, Some("DeadlineExceeded")));
    let took = world.now - start;
    assert!((300_000..302_000).contains(&took), "{took}");
}

#[test]
fn a_finished_job_is_forgotten_with_its_logs() {
    let mut world = World::new();
    world.add("n1", inventory(4, 0));
    let mut job = spec("job");
    job.ttl = Millis::from_secs(60);
    world.submit(&job);
    finish(&mut world, "job");
    world.run(80_000);
    assert!(world.status("job").is_none());
    assert!(
        !world.store.keys().any(|key| key.contains("job/") || key.contains("pod/") || key.contains("run/"))
    );
}

#[test]
fn outputs_that_several_list_go_with_the_last_of_them() {
    let mut world = World::new();
    let node = world.add("n1", inventory(4, 0));
    let stored =
        || PodChange::OutputsStored { digest: Some(Digest::of(b"same")), bytes: Bytes(1), error: None };
    for (name, minutes) in [("a", 10), ("b", 20)] {
        let mut job = spec(name);
        job.ttl = Millis::from_secs(minutes * 60);
        let digest = Digest::of(b"files");
        job.pod.workspace = Some(Workspace { digest, bytes: Bytes(1), path: "/work".to_owned() });
        world.submit(&job);
        finish(&mut world, name);
        let pod = pod_of(&world, name);
        tell(&mut world, &node, &pod, stored());
    }
    let deleted = |world: &World| {
        world
            .deleted
            .iter()
            .filter(|effect| matches!(effect, Effect::DeleteBlob(_)))
            .cloned()
            .collect::<Vec<_>>()
    };
    let first = pod_of(&world, "a");
    world.run(15 * 60_000);
    assert!(world.status("a").is_none());
    // What comes for a pod that is forgotten is not wanted, and another lists the same.
    tell(&mut world, &node, &first, stored());
    world.restart_controller();
    assert_eq!(deleted(&world), []);
    world.run(10 * 60_000);
    assert!(world.status("b").is_none());
    let both = [Effect::DeleteBlob(Digest::of(b"same")), Effect::DeleteBlob(Digest::of(b"files"))];
    assert_eq!(deleted(&world), both);
}

#[test]
fn files_that_a_changed_job_takes_along_no_more_go() {
    let mut world = World::new();
    let mut job = spec("job");
    for text in ["one", "two", "two"] {
        let digest = Digest::of(text.as_bytes());
        job.pod.workspace = Some(Workspace { digest, bytes: Bytes(1), path: "/work".to_owned() });
        job.priority += 1;
        world.submit(&job);
    }
    assert_eq!(world.deleted, [Effect::DeleteBlob(Digest::of(b"one"))]);
}

#[test]
fn a_pod_says_why_it_has_no_outputs() {
    let mut world = World::new();
    let node = world.add("n1", inventory(4, 0));
    for (name, code, said) in [
        ("good", 0, "no outputs in the depot: none was there"),
        ("bad", 3, "ended with exit code 3; no outputs in the depot: none was there"),
    ] {
        let mut job = spec(name);
        program(&mut job, 10, code);
        world.submit(&job);
        finish(&mut world, name);
        let (pod, error) = (pod_of(&world, name), Some("none was there".to_owned()));
        tell(&mut world, &node, &pod, PodChange::OutputsStored { digest: None, bytes: Bytes::ZERO, error });
        assert_eq!(world.status(name).unwrap().pods[0].message.as_deref(), Some(said));
    }
    world.restart_controller();
    let page = world.query(r#"{"pods":{"namespace":"default","job":"good"}}"#);
    assert_eq!(page["result"]["rows"][0]["message"], "no outputs in the depot: none was there", "{page}");
}

#[test]
fn outputs_come_in_pages() {
    let mut world = World::new();
    let mut job = spec("many");
    (job.parallelism, job.completions) = (150, 150);
    world.submit(&job);
    let uid = pod_of(&world, "many").uid;
    let job = world.controller.cluster.jobs.get_mut(&uid).unwrap();
    for index in 0..150 {
        let digest = Digest::of(&[index as u8]);
        let output = Output { epoch: Epoch(1), digest, bytes: Bytes(1), at: Timestamp(0) };
        job.change(index, |pod| pod.output = Some(output));
    }
    let first = world.query(r#"{"outputs":{"namespace":"default","job":"many"}}"#);
    let rows = |page: &serde_json::Value| page["result"]["rows"].as_array().unwrap().clone();
    let next = first["result"]["next"].as_str().unwrap();
    let query = format!(r#"{{"outputs":{{"namespace":"default","job":"many","after":"{next}"}}}}"#);
    let second = world.query(&query);
    assert_eq!((rows(&first).len(), rows(&second).len()), (100, 50));
    assert_eq!(rows(&second)[0]["pod"], "many-100");
    assert!(second["result"]["next"].is_null());
}

#[test]
fn a_status_is_cut_down_to_what_a_message_holds() {
    let mut world = World::new();
    let mut job = spec("many");
    (job.parallelism, job.completions) = (100, 100);
    world.submit(&job);
    let uid = pod_of(&world, "many").uid;
    let job = world.controller.cluster.jobs.get_mut(&uid).unwrap();
    for index in 0..100 {
        job.change(index, |pod| pod.saved.trouble = Some("é".repeat(512)));
    }
    world.command("many", "c1", "suspend");
    world.run(1_000);
    let mut status = world.status("many").unwrap();
    assert_eq!((status.phase, status.pods.len()), (JobPhase::Suspended, 100));
    let said =
        |pod: &PodStatus| pod.message.as_ref().is_some_and(|said| said.len() > 400 && said.ends_with('…'));
    assert!(status.pods.iter().all(said), "{:?}", status.pods[0]);
    let detail = world.query(r#"{"job":{"namespace":"default","job":"many"}}"#);
    assert_eq!(detail["result"]["podCounts"]["Pending"], 100, "{detail}");
    let page = world.query(r#"{"jobs":{}}"#);
    assert_eq!(page["result"]["rows"][0]["job"], "many", "{page}");
    assert_eq!(world.controller.counters().refused.get("oversized"), None);
    fit::status(&mut status, 4_000);
    assert!(serde_json::to_vec(&status).unwrap().len() <= 4_000);
    assert!((1..100).contains(&status.pods.len()), "{} are listed", status.pods.len());
    assert_eq!(status.pod_counts.get(&PodPhase::Pending), Some(&100));
}

#[test]
fn gangs_start_together_or_not_at_all() {
    let mut world = World::new();
    world.add("n1", inventory(2, 0));
    world.run(100);
    let mut job = spec("gang");
    (job.parallelism, job.completions, job.gang) = (3, 3, true);
    world.submit(&job);
    let status = world.status("gang").unwrap();
    assert_eq!(status.pod_counts.get(&PodPhase::Pending), Some(&3));
    world.add("n2", inventory(2, 0));
    assert_eq!(finish(&mut world, "gang").phase, JobPhase::Succeeded);
}

#[test]
fn shares_of_a_gpu_add_up_to_one() {
    let mut world = World::new();
    world.add("n1", inventory(16, 1));
    world.run(100);
    let mut job = spec("share");
    job.pod.containers[0].resources = serde_json::from_str(
        r#"{"cpu":100,"memory":134217728,"gpu":{"count":1,"milli":400,"model":["A100"]}}"#,
    )
    .unwrap();
    (job.parallelism, job.completions) = (3, 3);
    world.submit(&job);
    let status = world.status("share").unwrap();
    assert_eq!(status.pod_counts.get(&PodPhase::Assigned), Some(&2));
    let message = status.message.unwrap();
    assert_eq!(message, "0 of 1 node fits: 1 needs 400m of a GPU of model A100");
    finish(&mut world, "share");
}

#[test]
fn logs_of_pods_to_come_are_asked_for_while_someone_follows() {
    let mut world = World::new();
    world.submit(&spec("job"));
    let reply = world.query(r#"{"logs":{"namespace":"default","job":"job","follow":true}}"#);
    assert_eq!(reply["result"]["finished"], false);
    let node = world.add("n1", inventory(4, 0));
    world.run(500);
    assert_eq!(world.agents[&node].logs_asked.len(), 1);
    let reply = world.query(r#"{"pods":{}}"#);
    assert_eq!(reply["result"]["rows"][0]["pod"], "job-0", "{reply}");
}

#[test]
fn no_payload_panics() {
    let mut world = World::new();
    for kind in ["hello", "heartbeat", "event", "bye", "desired", "spec", "request", "lease"] {
        for payload in ["", "{}", "\u{ff}", r#"{"v":1,"body":{}}"#, r#"{"v":9,"body":{}}"#] {
            let cluster = berth_protocol::ids::ClusterName::parse("lab").unwrap();
            let topic = format!("berth/v1/lab/nodes/n1/{kind}");
            let topic = berth_protocol::topic::Topic::parse(&cluster, &topic).unwrap();
            world.feed(super::super::Event::Message {
                topic,
                payload: payload.as_bytes().to_vec(),
                by: Some(KEY.into()),
            });
        }
    }
    assert_eq!(world.controller.counters().refused.values().sum::<u64>(), 40);
}

#[test]
fn a_restarted_controller_waits_out_a_long_lease() {
    let mut world = World::new();
    let first = world.add("n1", inventory(4, 0));
    let mut job = spec("job");
    program(&mut job, 900_000, 0);
    job.pod.grace = Millis::from_secs(300);
    job.pod.on_disconnect.action = DisconnectAction::Stop;
    world.submit(&job);
    world.until("it runs", |w| phase(w, "job") == Some(JobPhase::Running));
    world.agents.get_mut(&first).unwrap().cut = true;
    world.restart_controller();
    let second = world.add("n2", inventory(4, 0));
    world.run(344_000);
    assert_eq!(world.status("job").unwrap().pods[0].phase, PodPhase::Lost);
    world.run(2_000);
    assert_eq!(world.status("job").unwrap().pods[0].node.as_ref(), Some(&second));
}

#[test]
fn an_event_counts_once_and_none_after_a_gap() {
    let mut world = World::new();
    let node = world.add("n1", inventory(4, 0));
    let mut job = spec("job");
    program(&mut job, 60_000, 0);
    job.pod.restart = Restart { policy: RestartPolicy::OnFailure, ..Restart::default() };
    world.submit(&job);
    world.until("it runs", |w| phase(w, "job") == Some(JobPhase::Running));
    world.run(1_000);
    let (n, nonce) = (world.agents[&node].events_last + 1, world.agents[&node].nonce());
    let pod = world.agents[&node].pods.keys().next().unwrap().clone();
    let topic = Topic::node(&node, NodeTopic::Event);
    let mut tell = |n: u64| {
        let outcome = outcome(world.now, Cause::Failure, Some(1));
        let change = PodChange::Retrying { outcome, backoff: Millis(10) };
        let event = NodeEvent::Pod(PodEvent { pod: pod.clone(), epoch: Epoch(1), run: Run(1), change });
        let events = vec![NumberedEvent { n, at: Timestamp(world.now), event }];
        let ledger = LedgerId::parse("ledger-n1").unwrap();
        let payload = codec::encode(&topic, &Events { nonce: nonce.clone(), ledger, events }).unwrap();
        world.feed(Event::Message { topic: topic.clone(), payload, by: Some(KEY.into()) });
        world.feed(Event::Tick);
        world.now += 200;
        world.feed(Event::Tick);
        world.status("job").unwrap().failures
    };
    assert_eq!(tell(n), 1);
    assert_eq!(tell(n), 1, "a double");
    assert_eq!(tell(n + 2), 1, "behind a gap");
    assert_eq!(tell(n + 1), 2);
}

#[test]
fn a_node_of_another_version_is_refused_and_named() {
    let mut world = World::new();
    let node = world.add("n1", inventory(4, 0));
    let mut hello = |node: &NodeId| {
        let payload = br#"{"v":2,"body":{}}"#.to_vec();
        let topic = Topic::node(node, NodeTopic::Hello);
        let effects = world
            .controller
            .step(at(world.now), Event::Message { topic, payload, by: Some(KEY.into()) })
            .effects;
        let notes = effects.into_iter().filter_map(|effect| match effect {
            Effect::Note(note) => Some(note.to_string()),
            _ => None,
        });
        notes.collect::<Vec<String>>()
    };
    let expect = "node n1 is refused: the message is of version 2 of the protocol between controller and agents, this \
                  program speaks version 1: upgrade the older of the two";
    assert_eq!(hello(&node), [expect]);
    assert_eq!(hello(&node), [] as [&str; 0], "once in a while");
    assert_eq!(world.controller.counters().refused["version"], 2);
}

/// Told with others that count.
#[test]
fn an_event_of_a_newer_agent_is_acknowledged() {
    let mut world = World::new();
    let node = world.add("n1", inventory(4, 0));
    world.submit(&spec("job"));
    world.until("it runs", |w| phase(w, "job") == Some(JobPhase::Running));
    let (n, nonce) = (world.agents[&node].events_last + 1, world.agents[&node].nonce());
    let event = NumberedEvent { n, at: Timestamp(world.now), event: NodeEvent::Unknown };
    let ledger = LedgerId::parse("ledger-n1").unwrap();
    let topic = Topic::node(&node, NodeTopic::Event);
    let payload = codec::encode(&topic, &Events { nonce, ledger, events: vec![event] }).unwrap();
    let payload = String::from_utf8(payload).unwrap().replace("\"unknown\"", r#"{"weather":{}}"#);
    let step = world
        .controller
        .step(at(world.now), Event::Message { topic, payload: payload.into_bytes(), by: Some(KEY.into()) });
    assert_eq!(world.controller.counters().refused["unknown-event"], 1);
    let acked = step.writes.iter().find(|write| write.key == "outbox/n1").expect("the outbox moves on");
    let acked: serde_json::Value = serde_json::from_slice(acked.value.as_deref().unwrap()).unwrap();
    assert_eq!(acked["acked"], n);
}
