//! What a person would try, step by step.

use berth_protocol::codec;
use berth_protocol::ids::{Epoch, Generation, LedgerId, Run};
use berth_protocol::job::{DisconnectAction, JobSpec, Restart, RestartPolicy};
use berth_protocol::message::node::{Events, NodeEvent, NumberedEvent, PodChange, PodEvent};
use berth_protocol::message::user::{Answer, JobPhase, JobStatus, NodeState, Verdict};
use berth_protocol::pod::{Cause, PodPhase};
use berth_protocol::topic::{NodeTopic, Topic};
use berth_protocol::units::{MilliCpu, Millis, Timestamp};

use super::super::Event;
use super::world::{World, inventory, outcome, spec};

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
    // 10 + 20 + 40 s, less up to a quarter.
    let took = world.now - start;
    assert!((52_000..72_000).contains(&took), "{took}");
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
            world.feed(super::super::Event::Message { topic, payload: payload.as_bytes().to_vec() });
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
        world.feed(Event::Message { topic: topic.clone(), payload });
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
