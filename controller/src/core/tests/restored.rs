//! A backup takes the place of a store that knew more.

use berth_protocol::ids::{Epoch, NodeId, PodId};
use berth_protocol::job::{DisconnectAction, JobSpec};
use berth_protocol::message::node::Hello;
use berth_protocol::message::user::JobPhase;
use berth_protocol::topic::NodeTopic;

use super::super::restored;
use super::world::{KEY, World, at, inventory, spec};

fn long() -> JobSpec {
    let mut long = spec("long");
    long.pod.containers[0].command = vec!["run".to_owned(), "90000".to_owned(), "0".to_owned()];
    long
}

type Backup = std::collections::BTreeMap<String, Vec<u8>>;

/// As `berth-controller restore` does it, and the controller's start.
fn restore(world: &mut World, backup: Backup) {
    world.store = backup;
    let (key, value) = restored::entry(&world.entries(), at(world.now)).unwrap();
    world.store.insert(key, value);
    world.term += 1_000;
    world.restart_controller();
}

fn pod(world: &World) -> PodId {
    world.controller.cluster.jobs.keys().next().unwrap().pod(0)
}

/// The job runs on the only node.
fn begun(job: &JobSpec) -> (World, NodeId) {
    let mut world = World::new();
    let node = world.add("n1", inventory(1, 0));
    world.submit(job);
    world.run(10_000);
    (world, node)
}

/// Until the job has ended; never does its pod run twice.
fn watch(world: &mut World) {
    let pod = pod(world);
    for _ in 0..400 {
        let run = world.agents.values().filter(|agent| agent.runs(&pod, world.now)).count();
        assert!(run < 2, "the pod runs twice at {}", world.now);
        world.run(1_000);
    }
    assert_eq!(world.status("long").unwrap().phase, JobPhase::Succeeded);
}

fn epoch(world: &World) -> Epoch {
    world.status("long").unwrap().pods[0].epoch
}

#[test]
fn a_pod_that_has_moved_since_the_backup_gets_an_epoch_above_all() {
    let (mut world, first) = begun(&long());
    let backup = world.store.clone();
    world.agents.get_mut(&first).unwrap().up = false;
    world.add("n2", inventory(1, 0));
    world.run(90_000);
    assert_eq!(epoch(&world), Epoch(2));
    // The second is cut off, and runs it by its grant; the first is back, and says truly that it has nothing.
    let second = NodeId::parse("n2").unwrap();
    world.agents.get_mut(&second).unwrap().cut = true;
    restore(&mut world, backup);
    let first = world.agents.get_mut(&first).unwrap();
    (first.up, first.boot) = (true, first.boot + 1);
    first.pods.clear();
    first.hello_due = true;
    world.run(120_000);
    world.agents.get_mut(&second).unwrap().cut = false;
    watch(&mut world);
    assert_eq!(epoch(&world), Epoch(1_001));
}

#[test]
fn a_pod_that_was_placed_since_the_backup_is_not_placed_beside_itself() {
    let mut world = World::new();
    world.submit(&long());
    let backup = world.store.clone();
    let first = world.add("n1", inventory(1, 0));
    world.run(10_000);
    assert!(world.agents[&first].runs(&pod(&world), world.now));
    world.agents.get_mut(&first).unwrap().cut = true;
    world.add("n2", inventory(1, 0));
    restore(&mut world, backup);
    watch(&mut world);
    assert_eq!(epoch(&world), Epoch(1_000));
    // The next start does not wait again.
    world.restart_controller();
    world.run(15_000);
    let mut next = long();
    next.name = berth_protocol::ids::JobName::parse("next").unwrap();
    world.submit(&next);
    world.run(5_000);
    assert_eq!(world.status("next").unwrap().phase, JobPhase::Running);
}

#[test]
fn what_goes_on_alone_and_ended_since_the_backup_begins_anew_however_often_its_agent_began_since() {
    let mut alone = long();
    alone.pod.on_disconnect.action = DisconnectAction::Continue;
    let (mut world, node) = begun(&alone);
    let backup = world.store.clone();
    for _ in 0..3 {
        world.agents.get_mut(&node).unwrap().restart();
        world.run(10_000);
    }
    world.run(90_000);
    assert_eq!(world.status("long").unwrap().phase, JobPhase::Succeeded);
    restore(&mut world, backup);
    watch(&mut world);
    assert_eq!(epoch(&world), Epoch(1_001));
}

#[test]
fn events_that_an_earlier_controller_has_acknowledged_are_not_waited_for_though_an_old_hello_knows_of_none() {
    let mut world = World::new();
    let node = world.add("n1", inventory(1, 0));
    let hello: Hello = world.overheard(&node, NodeTopic::Hello);
    world.run(5_000);
    let backup = world.store.clone();
    world.submit(&long());
    world.run(120_000);
    assert!(world.agents[&node].events_acked > 0);
    restore(&mut world, backup);
    // Of a version that does not say what it has heard.
    world.says(&node, NodeTopic::Hello, KEY, &Hello { heard: None, ..hello });
    world.run(10_000);
    world.submit(&long());
    watch(&mut world);
}

#[test]
fn what_a_node_said_before_the_restoration_and_comes_late_is_not_believed() {
    let (mut world, node) = begun(&long());
    let (backup, hello) = (world.store.clone(), world.overheard::<Hello>(&node, NodeTopic::Hello));
    assert_eq!(hello.pods.len(), 1);
    world.run(120_000);
    assert_eq!(world.status("long").unwrap().phase, JobPhase::Succeeded);
    restore(&mut world, backup);
    world.says(&node, NodeTopic::Hello, KEY, &hello);
    assert_eq!(world.controller.counters().refused.get("unhearing-hello"), Some(&1));
    assert!(world.controller.cluster.nodes[&node].session.is_none());
    watch(&mut world);
}
