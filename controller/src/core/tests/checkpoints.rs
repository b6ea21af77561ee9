//! What becomes of pods that are saved: moved, suspended, drained, lost, set back, copied.

use berth_protocol::ids::{Digest, NodeId};
use berth_protocol::job::{CheckpointMode, JobSpec};
use berth_protocol::message::node::PodChange;
use berth_protocol::message::user::{Answer, JobPhase, JobStatus, Verdict};
use berth_protocol::pod::PodPhase;
use berth_protocol::resources::GpuRequest;
use berth_protocol::units::Millis;

use super::world::{World, inventory, spec};

const WORK_MS: u64 = 600_000;

pub(super) fn long(name: &str) -> JobSpec {
    let mut job = spec(name);
    job.pod.containers[0].command = ["run".to_owned(), WORK_MS.to_string(), "0".to_owned()].to_vec();
    job
}

pub(super) fn status(world: &World, job: &str) -> JobStatus {
    world.status(job).unwrap()
}

pub(super) fn node_of(world: &World, job: &str) -> Option<NodeId> {
    let status = status(world, job);
    status.pods.first().filter(|pod| pod.phase == PodPhase::Running).and_then(|pod| pod.node.clone())
}

pub(super) fn running(world: &mut World, job: &str) {
    world.until("it runs", |w| node_of(w, job).is_some());
}

pub(super) fn running_on(world: &mut World, job: &str, node: &str) {
    world.until("it runs there", |w| node_of(w, job).is_some_and(|at| at.as_str() == node));
}

pub(super) fn ends(world: &mut World, job: &str) -> JobStatus {
    world.until("the job ends", |w| status(w, job).phase.is_final());
    status(world, job)
}

pub(super) fn rejected(answer: &Answer) -> (&str, &str) {
    match &answer.verdict {
        Verdict::Rejected { rejected } => (&rejected.code, &rejected.message),
        Verdict::Accepted { .. } => ("accepted", ""),
    }
}

/// Saves the job's pod where it is; returns which checkpoint that is.
pub(super) fn saved(world: &mut World, job: &str) -> Digest {
    let last = |world: &World| status(world, job).checkpoint.map(|checkpoint| checkpoint.id);
    let before = last(world);
    let answer = world.command_with(job, "checkpoint", r#""node":null"#);
    assert_eq!(rejected(&answer).0, "accepted", "{answer:?}");
    world.until("it is saved", |w| last(w) != before);
    last(world).unwrap()
}

pub(super) fn two_nodes() -> World {
    let mut world = World::new();
    world.add("n1", inventory(4, 0));
    world.add("n2", inventory(4, 0));
    world.run(100);
    world
}

#[test]
fn a_job_is_moved_and_goes_on_where_it_was() {
    let mut world = two_nodes();
    let begun = world.now;
    world.submit(&long("counter"));
    for to in ["n2", "n1", "n2"] {
        running(&mut world, "counter");
        world.run(60_000);
        let answer = world.command_with("counter", "migrate", &format!(r#""node":"{to}""#));
        assert_eq!(rejected(&answer).0, "accepted", "{answer:?}");
        running_on(&mut world, "counter", to);
    }
    let end = ends(&mut world, "counter");
    assert_eq!((end.phase, end.failures), (JobPhase::Succeeded, 0));
    // The first `to` may be where it was.
    assert!(end.migrations >= 2 && end.evictions == end.migrations, "{end:?}");
    let checkpoint = end.checkpoint.expect("a checkpoint was taken");
    assert_eq!((checkpoint.bytes.0, checkpoint.new_bytes.0), (1000, 100));
    assert!(world.now - begun < WORK_MS + 60_000, "work was lost: {} ms", world.now - begun);
}

#[test]
fn what_a_move_lacks_is_said_before_anything_is_stopped() {
    let mut world = World::new();
    world.add("n1", inventory(4, 0));
    world.run(100);
    world.submit(&long("a"));
    running(&mut world, "a");
    let mut old = inventory(4, 0);
    (old.arch, old.criu) = ("aarch64".to_owned(), None);
    world.add("n2", old);
    world.add("n3", inventory(0, 0));
    world.run(100);
    for (command, more, code, text) in [
        (
            "migrate",
            r#""node":"n2""#,
            "Unfit",
            "the checkpoint is of x86_64, the node is aarch64; it has no CRIU",
        ),
        ("migrate", r#""node":"n3""#, "Unfit", "needs 1 core, 0 are free"),
        ("migrate", r#""node":"n9""#, "NoSuchNode", "there is no node n9"),
        ("migrate", r#""id":"m-1""#, "InvalidCommand", "wants a `node`"),
        ("restore", r#""id":"r-1""#, "InvalidCommand", "wants a `checkpoint`"),
    ] {
        let answer = world.command_with("a", command, more);
        let (got, message) = rejected(&answer);
        assert_eq!(got, code, "{message}");
        assert!(message.contains(text), "{message}");
    }
    let mut none = long("none");
    none.pod.checkpoint.mode = CheckpointMode::None;
    world.submit(&none);
    running(&mut world, "none");
    for command in ["checkpoint", "migrate"] {
        let answer = world.command_with("none", command, r#""node":"n1""#);
        let expect = if command == "migrate" { "accepted" } else { "CannotCheckpoint" };
        assert_eq!(rejected(&answer).0, expect, "{answer:?}");
    }
    assert_eq!(status(&world, "a").pods[0].epoch.0, 1);
}

fn on_gpus(name: &str, count: u32) -> JobSpec {
    let mut job = long(name);
    let gpu = GpuRequest { count, milli: 1000, memory: None, model: Default::default() };
    job.pod.containers[0].resources.gpu = Some(gpu);
    job
}

#[test]
fn memory_of_gpus_that_cannot_be_saved_is_refused_before_anything_is_stopped() {
    let mut world = World::new();
    let mut old = inventory(4, 2);
    old.saves_gpus = false;
    world.add("n1", old);
    world.add("n2", inventory(4, 0));
    world.run(100);
    let mut itself = on_gpus("itself", 1);
    itself.pod.checkpoint.signal = Some("SIGUSR1".to_owned());
    for (job, expect) in [
        (on_gpus("one", 1), "the driver of node host cannot save the memory of GPUs"),
        (on_gpus("many", 2), "it has 2 GPUs, and memory that GPUs give each other access to cannot be saved"),
        (itself, ""),
    ] {
        let name = job.name.as_str();
        world.submit(&job);
        running(&mut world, name);
        let answer = world.command_with(name, "checkpoint", r#""node":null"#);
        let (code, message) = rejected(&answer);
        match expect {
            "" => assert_eq!(code, "accepted", "{message}"),
            expect => {
                assert_eq!(code, "CannotCheckpoint", "{message}");
                assert!(message.contains(expect) && message.contains("`checkpoint.signal`"), "{message}");
            }
        }
        world.command(name, "c-1", "cancel");
        world.until("it is cancelled", |w| status(w, name).phase.is_final());
    }
}

#[test]
fn saved_memory_of_a_gpu_goes_on_on_one_of_the_same_model() {
    let mut world = World::new();
    let n1 = world.add("n1", inventory(4, 1));
    world.agents.get_mut(&n1).unwrap().gpus_saved = vec!["NVIDIA A100-SXM4-80GB".to_owned()];
    world.run(100);
    world.submit(&on_gpus("train", 1));
    running(&mut world, "train");
    let mut mixed = inventory(4, 3);
    mixed.gpus.iter_mut().zip(["a", "b", "c"]).for_each(|(gpu, name)| gpu.uuid = format!("GPU-{name}"));
    mixed.gpus[0].model = "NVIDIA H100".to_owned();
    mixed.gpus[1].model = "NVIDIA L4".to_owned();
    world.add("n2", mixed);
    world.run(100);
    let answer = world.command_with("train", "migrate", r#""node":"n2""#);
    assert_eq!(rejected(&answer).0, "accepted", "{answer:?}");
    running_on(&mut world, "train", "n2");
    let jobs = &world.controller.cluster.jobs;
    let charges = jobs.values().flat_map(|job| job.assignment(0)).flat_map(|a| a.charge.gpus.iter());
    assert_eq!(charges.map(|share| share.uuid.as_str()).collect::<Vec<_>>(), ["GPU-c"]);
}

#[test]
fn a_lost_nodes_pod_goes_on_from_its_last_interval() {
    let mut world = two_nodes();
    let mut job = long("train");
    job.pod.checkpoint.interval = Some(Millis::from_secs(60));
    let begun = world.now;
    world.submit(&job);
    running(&mut world, "train");
    world.run(310_000);
    assert!(status(&world, "train").checkpoint.is_some());
    let node = node_of(&world, "train").unwrap();
    world.agents.get_mut(&node).unwrap().up = false;
    let end = ends(&mut world, "train");
    assert_eq!((end.phase, end.evictions, end.failures), (JobPhase::Succeeded, 1, 0));
    // Silence and its judgement take some 75 s, and a minute of work may be lost.
    assert!(world.now - begun < WORK_MS + 150_000, "{}", world.now - begun);
    // As many are kept as the job asks for.
    let rows = world.query(r#"{"checkpoints":{"namespace":"default","job":"train"}}"#);
    assert_eq!(rows["result"]["rows"].as_array().unwrap().len(), 3, "{rows}");
    assert_eq!(world.depot.len(), 3);
}

#[test]
fn suspended_is_saved_and_resumed_goes_on() {
    let mut world = two_nodes();
    world.submit(&long("a"));
    running(&mut world, "a");
    world.run(300_000);
    world.command("a", "s1", "suspend");
    world.until("it is saved", |w| w.depot.len() == 1 && status(w, "a").pods[0].phase == PodPhase::Pending);
    assert_eq!(status(&world, "a").phase, JobPhase::Suspended);
    world.run(3_600_000);
    let resumed = world.now;
    world.command("a", "r1", "resume");
    let end = ends(&mut world, "a");
    assert_eq!((end.phase, end.evictions, end.migrations), (JobPhase::Succeeded, 0, 0));
    assert!(world.now - resumed < 320_000, "{}", world.now - resumed);
}

#[test]
fn a_drain_saves_what_has_no_room_and_it_goes_on_when_room_comes() {
    let mut world = World::new();
    world.add("n1", inventory(2, 0));
    world.run(100);
    for name in ["a", "b"] {
        world.submit(&long(name));
        running(&mut world, name);
    }
    world.run(60_000);
    let reply = world.query(r#"{"drain":{"node":"n1","deadline":600000}}"#);
    assert_eq!(reply["result"]["drain"]["left"], 2, "{reply}");
    world.until("the node is empty", |w| w.node(&NodeId::parse("n1").unwrap()).pods == 0);
    for name in ["a", "b"] {
        let status = status(&world, name);
        assert_eq!((status.pods[0].phase, status.evictions), (PodPhase::Pending, 1), "{status:?}");
    }
    assert_eq!(world.depot.len(), 2);
    world.restart_controller();
    world.run(20_000);
    assert!(world.node(&NodeId::parse("n1").unwrap()).drain.is_some());
    world.add("n2", inventory(1, 0));
    world.until("one goes on", |w| ["a", "b"].iter().any(|job| node_of(w, job).is_some()));
    assert_eq!(world.query(r#"{"uncordon":{"node":"n1"}}"#)["result"]["state"], "online");
    for name in ["a", "b"] {
        running(&mut world, name);
    }
    assert_eq!(world.query(r#"{"drain":{"node":"nix"}}"#)["error"]["code"], "NotFound");
}

#[test]
fn what_cannot_be_saved_stays_until_the_deadline() {
    let mut world = two_nodes();
    world.submit(&long("a"));
    running(&mut world, "a");
    let node = node_of(&world, "a").unwrap();
    world.agents.get_mut(&node).unwrap().dumps_fail = true;
    world.query(&format!(r#"{{"drain":{{"node":"{node}","deadline":120000}}}}"#));
    world.run(100_000);
    assert_eq!(node_of(&world, "a"), Some(node.clone()));
    let message = status(&world, "a").pods[0].message.clone().unwrap();
    assert!(message.contains("drained"), "{message}");
    let began = world.now;
    world.until("it is elsewhere", |w| node_of(w, "a").is_some_and(|at| at != node));
    assert!(world.now - began < 60_000);
    assert_eq!(status(&world, "a").evictions, 1);
}

#[test]
fn each_checkpoint_that_fails_is_told_anew() {
    let mut world = two_nodes();
    world.submit(&long("a"));
    running(&mut world, "a");
    let node = node_of(&world, "a").unwrap();
    world.agents.get_mut(&node).unwrap().dumps_fail = true;
    let mut told = Vec::new();
    for _ in 0..2 {
        world.command_with("a", "checkpoint", r#""node":null"#);
        world.run(10_000);
        told.push(status(&world, "a").pods[0].message.clone().unwrap());
    }
    // Whoever waits for one tells it from the one before by its words.
    assert!(told.iter().all(|message| message.contains("failed: no luck")), "{told:?}");
    assert_ne!(told[0], told[1]);
}

#[test]
fn a_resume_hook_that_failed_is_told_until_the_next_checkpoint() {
    let mut world = two_nodes();
    world.submit(&long("a"));
    running(&mut world, "a");
    let node = node_of(&world, "a").unwrap();
    let now = world.now;
    let agent = world.agents.get_mut(&node).unwrap();
    let pod = agent.pods.keys().next().unwrap().clone();
    agent.report(now, &pod, PodChange::ResumeFailed { why: "the resume hook ended with code 3".to_owned() });
    world.run(10_000);
    let told = status(&world, "a").pods[0].clone();
    assert_eq!(told.message.as_deref(), Some("the resume hook ended with code 3"));
    assert_eq!(told.phase, PodPhase::Running);
    saved(&mut world, "a");
    assert_eq!(status(&world, "a").pods[0].message, None);
}

#[test]
fn a_move_that_cannot_be_saved_stays_where_it_is_and_says_so() {
    let mut world = two_nodes();
    world.submit(&long("a"));
    running(&mut world, "a");
    let node = node_of(&world, "a").unwrap();
    world.agents.get_mut(&node).unwrap().dumps_fail = true;
    let to = if node.as_str() == "n1" { "n2" } else { "n1" };
    world.command_with("a", "migrate", &format!(r#""node":"{to}""#));
    world.run(60_000);
    let status = status(&world, "a");
    assert_eq!((status.pods[0].node.clone(), status.pods[0].epoch.0), (Some(node), 1));
    let message = status.pods[0].message.clone().unwrap();
    assert!(message.contains("failed: no luck") && message.contains("stays here"), "{message}");
}

#[test]
fn a_restore_that_fails_is_tried_elsewhere_then_from_before_then_from_the_start() {
    let mut world = two_nodes();
    world.submit(&long("a"));
    for _ in 0..2 {
        running(&mut world, "a");
        world.run(30_000);
        let answer = world.command_with("a", "checkpoint", r#""node":null"#);
        assert_eq!(rejected(&answer).0, "accepted", "{answer:?}");
        world.run(10_000);
    }
    assert_eq!(world.depot.len(), 2);
    for agent in world.agents.values_mut() {
        agent.restores_fail = true;
    }
    let begun = world.now;
    world.command("a", "s", "suspend");
    world.until("it is saved", |w| w.depot.len() == 3 && status(w, "a").pods[0].phase == PodPhase::Pending);
    world.command("a", "r", "resume");
    running(&mut world, "a");
    // Three checkpoints, each on both nodes.
    assert_eq!(world.controller.counters().restore_failures, 6);
    assert_eq!(status(&world, "a").pods[0].epoch.0, 8);
    assert!(world.now - begun < 60_000);
    let end = ends(&mut world, "a");
    assert_eq!((end.phase, end.evictions, end.failures), (JobPhase::Succeeded, 0, 0));
}

/// Its checkpoint could not be started on the first node, and it is given to the second, which is out of reach.
fn failed_on_the_first(world: &mut World) -> (NodeId, NodeId) {
    world.submit(&long("a"));
    running(world, "a");
    world.run(30_000);
    world.command("a", "s", "suspend");
    world.until("it is saved", |w| w.depot.len() == 1 && status(w, "a").pods[0].phase == PodPhase::Pending);
    let [first, second] = ["n1", "n2"].map(|node| NodeId::parse(node).unwrap());
    world.agents.get_mut(&first).unwrap().restores_fail = true;
    world.agents.get_mut(&second).unwrap().cut = true;
    world.command("a", "r", "resume");
    world.until("it is to go to the second", |w| status(w, "a").pods[0].node.as_ref() == Some(&second));
    assert_eq!(world.controller.counters().restore_failures, 1);
    world.agents.get_mut(&first).unwrap().restores_fail = false;
    (first, second)
}

#[test]
fn where_a_checkpoint_could_not_be_started_it_is_tried_again_once_no_other_node_is_left() {
    let mut world = two_nodes();
    let (first, _) = failed_on_the_first(&mut world);
    world.run(120_000);
    assert_eq!(status(&world, "a").pods[0].node, Some(first));
    assert_eq!(ends(&mut world, "a").phase, JobPhase::Succeeded);
    assert_eq!(world.controller.counters().restore_failures, 1);
}

#[test]
fn who_sends_it_where_its_checkpoint_could_not_be_started_has_it_tried_there_again() {
    let mut world = two_nodes();
    let (first, second) = failed_on_the_first(&mut world);
    let answer = world.command_with("a", "migrate", &format!(r#""node":"{first}""#));
    assert_eq!(rejected(&answer).0, "accepted", "{answer:?}");
    world.agents.get_mut(&second).unwrap().cut = false;
    world.run(30_000);
    assert_eq!(status(&world, "a").pods[0].node, Some(first));
    assert_eq!(ends(&mut world, "a").phase, JobPhase::Succeeded);
}

#[test]
fn copies_and_the_way_back() {
    let mut world = two_nodes();
    world.submit(&long("a"));
    running(&mut world, "a");
    world.run(30_000);
    world.command_with("a", "checkpoint", r#""node":null"#);
    world.until("it is saved", |w| status(w, "a").checkpoint.is_some());
    let id: Digest = *world.depot.keys().next().unwrap();
    for copy in ["b", "c"] {
        let answer = world.command_with(copy, "restore", &format!(r#""checkpoint":"{id}","id":"{copy}""#));
        assert_eq!(rejected(&answer).0, "accepted", "{answer:?}");
        // The same id again makes no second one, nor sets the first back.
        world.command_with(copy, "restore", &format!(r#""checkpoint":"{id}","id":"{copy}""#));
        running(&mut world, copy);
        assert_eq!(status(&world, copy).pods[0].epoch.0, 1);
    }
    let taken = world.command_with("b", "restore", &format!(r#""checkpoint":"{id}""#));
    assert_eq!(rejected(&taken).0, "NameTaken");
    let missing = world.command_with("d", "restore", &format!(r#""checkpoint":"{}""#, Digest::of(b"no")));
    assert_eq!(rejected(&missing).0, "NoSuchCheckpoint");
    world.run(200_000);
    let back = world.now;
    let answer = world.command_with("a", "restore", &format!(r#""checkpoint":"{id}""#));
    assert_eq!(rejected(&answer).0, "accepted", "{answer:?}");
    let end = ends(&mut world, "a");
    assert_eq!((end.phase, end.evictions), (JobPhase::Succeeded, 0));
    assert!(world.now - back > WORK_MS - 60_000, "it was set back");
    for copy in ["b", "c"] {
        assert_eq!(ends(&mut world, copy).phase, JobPhase::Succeeded);
    }
    // As long as a job names it, it stays; with the last it goes.
    let week = 8 * 86_400_000;
    world.run(week);
    assert_eq!(world.status("a"), None);
    assert!(world.depot.is_empty());
    assert!(!world.store.keys().any(|key| key.starts_with("checkpoint/")));
}

#[test]
fn what_a_copy_began_with_stays_however_often_its_own_job_lets_it_go() {
    let mut world = two_nodes();
    let mut job = long("a");
    job.pod.checkpoint.keep = 1;
    world.submit(&job);
    running(&mut world, "a");
    world.run(10_000);
    let first = saved(&mut world, "a");
    world.command_with("b", "restore", &format!(r#""checkpoint":"{first}""#));
    running(&mut world, "b");
    saved(&mut world, "a");
    let answer = world.command_with("a", "restore", &format!(r#""checkpoint":"{first}""#));
    assert_eq!(rejected(&answer).0, "accepted", "{answer:?}");
    world.until("it is set back", |w| status(w, "a").pods[0].epoch.0 == 2 && node_of(w, "a").is_some());
    for _ in 0..3 {
        saved(&mut world, "a");
        assert!(world.depot.contains_key(&first), "the copy names it");
    }
    assert!(world.controller.cluster.checkpoints.contains_key(&first));
    assert_eq!(world.depot.len(), 2);
}

#[test]
fn a_job_restored_under_the_name_of_one_that_is_being_forgotten_keeps_it() {
    for restarts in [false, true] {
        let mut world = two_nodes();
        let mut job = long("a");
        job.ttl = Millis::from_secs(60);
        world.submit(&job);
        running(&mut world, "a");
        world.run(10_000);
        let id = saved(&mut world, "a");
        world.command("a", "c1", "cancel");
        ends(&mut world, "a");
        world.until("its status is cleared", |w| w.status("a").is_none());
        let answer = world.command_with("a", "restore", &format!(r#""checkpoint":"{id}""#));
        assert_eq!(rejected(&answer).0, "accepted", "{answer:?}");
        if restarts {
            world.restart_controller();
        }
        world.run(30_000);
        assert_eq!(world.controller.cluster.jobs.len(), 1, "the other is forgotten");
        assert!(node_of(&world, "a").is_some());
        let found = world.query(r#"{"job":{"namespace":"default","job":"a"}}"#);
        assert_eq!(found["result"]["phase"], "Running", "{found}");
    }
}

#[test]
fn a_checkpoint_waits_for_a_node_that_can_start_it() {
    let mut world = World::new();
    let mut modern = inventory(4, 0);
    modern.cpu_features.insert("avx512f".to_owned());
    let node = world.add("n1", modern.clone());
    world.run(100);
    world.submit(&long("a"));
    running(&mut world, "a");
    world.run(30_000);
    world.add("n2", inventory(4, 0));
    world.run(100);
    world.query(&format!(r#"{{"drain":{{"node":"{node}"}}}}"#));
    world.run(60_000);
    let status = status(&world, "a");
    assert_eq!(status.pods[0].phase, PodPhase::Pending, "{status:?}");
    let explained = world.query(r#"{"explain":{"namespace":"default","job":"a"}}"#);
    assert!(explained.to_string().contains("its processor lacks avx512f"), "{explained}");
    let id = world.depot.keys().next().unwrap().hex();
    let detail = world.query(&format!(r#"{{"checkpoint":{{"namespace":"default","id":"{}"}}}}"#, &id[..8]));
    assert_eq!(detail["result"]["nodes"][1]["fits"], false, "{detail}");
    world.add("n3", modern);
    running_on(&mut world, "a", "n3");
}
