//! Machines that an operator gives up.

use berth_protocol::ids::NodeId;
use berth_protocol::job::{DisconnectAction, JobSpec};
use berth_protocol::message::user::{JobPhase, NodeState};

use super::world::{World, inventory, spec};

fn long(action: DisconnectAction) -> JobSpec {
    let mut long = spec("long");
    long.pod.containers[0].command = vec!["run".to_owned(), "300000".to_owned(), "0".to_owned()];
    long.pod.on_disconnect.action = action;
    long
}

/// A job on the first of so many nodes, which falls silent with all but the last, and where it is after two minutes.
fn silent(action: DisconnectAction, nodes: usize) -> (World, NodeId) {
    let mut world = World::new();
    let first = world.add("n1", inventory(1, 0));
    world.submit(&long(action));
    world.run(5_000);
    for n in 2..=nodes {
        world.add(&format!("n{n}"), inventory(1, 0));
    }
    world.run(15_000);
    let last = NodeId::parse(&format!("n{nodes}")).unwrap();
    for agent in world.agents.values_mut().filter(|agent| agent.id != last) {
        agent.cut = true;
    }
    world.run(120_000);
    assert_eq!(at(&world), first);
    (world, last)
}

fn at(world: &World) -> NodeId {
    world.status("long").unwrap().pods[0].node.clone().unwrap()
}

/// What it is refused for; empty: it is taken.
fn give_up(world: &mut World, node: &str, powered_off: bool) -> String {
    let query = format!(r#"{{"nodeLost":{{"node":"{node}","poweredOff":{powered_off}}}}}"#);
    world.query(&query)["error"]["message"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn what_goes_on_alone_goes_elsewhere_only_where_its_machine_is_said_to_be_off() {
    let (mut world, second) = silent(DisconnectAction::Continue, 2);
    assert_eq!(give_up(&mut world, "n1", false), "");
    world.run(60_000);
    assert_eq!(at(&world).as_str(), "n1");
    assert_eq!(give_up(&mut world, "n1", true), "");
    world.run(10_000);
    assert_eq!(at(&world), second);
    assert_eq!(world.status("long").unwrap().pods[0].epoch.0, 2);
    // It was not off: what went elsewhere ends there.
    world.agents.values_mut().for_each(|agent| agent.cut = false);
    world.run(30_000);
    let first = NodeId::parse("n1").unwrap();
    let pod = world.controller.cluster.jobs.keys().next().unwrap().pod(0);
    assert!(!world.agents[&first].runs(&pod, world.now));
    assert_eq!(world.node(&first).state, NodeState::Online);
    world.run(400_000);
    assert_eq!(world.status("long").unwrap().phase, JobPhase::Succeeded);
}

#[test]
fn a_machine_that_is_given_up_is_waited_for_no_longer_though_most_are_silent() {
    for restarted in [false, true] {
        let (mut world, last) = silent(DisconnectAction::Pause, 5);
        assert_eq!(give_up(&mut world, "n1", false), "");
        if restarted {
            world.restart_controller();
            world.run(120_000);
        }
        world.run(10_000);
        assert_eq!(at(&world), last, "restarted: {restarted}");
        assert_eq!(
            world.node(&NodeId::parse("n2").unwrap()).state,
            NodeState::Silent,
            "of the others nothing is known"
        );
    }
}

#[test]
fn a_lease_is_waited_for_though_the_machine_is_said_to_be_off() {
    let mut world = World::new();
    let first = world.add("n1", inventory(1, 0));
    world.submit(&long(DisconnectAction::Pause));
    world.run(5_000);
    world.add("n2", inventory(1, 0));
    world.run(5_000);
    let refused = give_up(&mut world, "n1", true);
    assert!(refused.contains("n1 is there"), "{refused}");
    let refused = give_up(&mut world, "n9", true);
    assert!(refused.contains("no node n9"), "{refused}");
    world.agents.get_mut(&first).unwrap().cut = true;
    world.run(30_000);
    assert_eq!(give_up(&mut world, "n1", true), "");
    let pod = world.controller.cluster.jobs.keys().next().unwrap().pod(0);
    for _ in 0..60 {
        let run = world.agents.values().filter(|agent| agent.runs(&pod, world.now)).count();
        assert!(run < 2, "it runs twice at {}", world.now);
        world.run(1_000);
    }
    assert_eq!(at(&world).as_str(), "n2");
}
