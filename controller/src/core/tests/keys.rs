//! Agents that have a node's name and not its key, or its key and not its past.

use berth_protocol::ids::{LedgerId, NodeId, SessionNonce};
use berth_protocol::message::node::{Bye, Covers, Heartbeat, Hello};
use berth_protocol::message::user::NodeState;
use berth_protocol::sign::PublicKey;
use berth_protocol::topic::NodeTopic;

use super::world::{KEY, World, inventory, spec};

const OTHER: PublicKey = PublicKey::from_bytes([9; 32]);

/// A pod that runs on the only node.
fn world() -> (World, NodeId) {
    let mut world = World::new();
    let node = world.add("n1", inventory(1, 0));
    let mut long = spec("long");
    long.pod.containers[0].command = vec!["run".to_owned(), "3600000".to_owned(), "0".to_owned()];
    world.submit(&long);
    world.run(10_000);
    assert_eq!(world.agents[&node].pods.len(), 1);
    (world, node)
}

/// The hello of another agent of the node's name, on the same machine.
fn second(world: &mut World, node: &NodeId) -> Hello {
    let first: Hello = world.overheard(node, NodeTopic::Hello);
    Hello {
        nonce: SessionNonce::parse("second").unwrap(),
        previous: None,
        earlier: Vec::new(),
        session: 1,
        ledger: LedgerId::parse("second").unwrap(),
        pods: Vec::new(),
        events_acked: 0,
        events_last: 0,
        ..first
    }
}

fn refused(world: &World) -> u64 {
    world.controller.counters().refused.get("other-key").copied().unwrap_or(0)
}

#[test]
fn a_second_agent_of_a_nodes_name_is_refused_and_told_while_the_first_may_run_its_pods() {
    let (mut world, node) = world();
    let hello = second(&mut world, &node);
    let told = world.says(&node, NodeTopic::Hello, OTHER, &hello);
    assert_eq!(told.len(), 1);
    assert_eq!((&told[0].nonce, &told[0].covers), (&hello.nonce, &Covers::Pairs(Vec::new())));
    assert!(told[0].refused.as_ref().is_some_and(|why| why.contains("--node")), "{told:?}");
    assert_eq!(refused(&world), 1);
    // Nothing of the first is touched.
    world.run(120_000);
    assert_eq!(world.status("long").unwrap().evictions, 0);
    assert_eq!(world.status("long").unwrap().pods[0].epoch.0, 1);
    // Not after a restart of the controller either, which has heard nobody yet.
    world.restart_controller();
    assert_eq!(world.says(&node, NodeTopic::Hello, OTHER, &hello).len(), 1);
    world.run(30_000);
    assert_eq!(world.status("long").unwrap().evictions, 0);
}

#[test]
fn it_is_taken_in_once_the_first_ones_grants_are_over() {
    let (mut world, node) = world();
    let hello = second(&mut world, &node);
    world.agents.get_mut(&node).unwrap().up = false;
    world.run(50_000);
    assert!(world.says(&node, NodeTopic::Hello, OTHER, &hello)[0].refused.is_some());
    world.run(20_000);
    let told = world.says(&node, NodeTopic::Hello, OTHER, &hello);
    assert!(told.iter().all(|lease| lease.refused.is_none()), "{told:?}");
    // From then on the name is the second one's.
    world.agents.get_mut(&node).unwrap().up = true;
    let first: Hello = world.overheard(&node, NodeTopic::Hello);
    assert!(world.says(&node, NodeTopic::Hello, KEY, &first)[0].refused.is_some());
}

#[test]
fn one_that_left_without_pods_is_not_waited_for() {
    let mut world = World::new();
    let node = world.add("n1", inventory(1, 0));
    world.run(10_000);
    let hello = second(&mut world, &node);
    assert!(world.says(&node, NodeTopic::Hello, OTHER, &hello)[0].refused.is_some());
    let nonce = world.agents[&node].nonce();
    world.says(&node, NodeTopic::Bye, KEY, &Bye { nonce });
    let told = world.says(&node, NodeTopic::Hello, OTHER, &hello);
    assert!(told.iter().all(|lease| lease.refused.is_none()), "{told:?}");
}

#[test]
fn what_another_key_says_of_a_node_changes_nothing() {
    let (mut world, node) = world();
    let beat: Heartbeat = world.overheard(&node, NodeTopic::Heartbeat);
    let ahead = Heartbeat { seq: beat.seq + 100, ..beat.clone() };
    assert!(world.says(&node, NodeTopic::Heartbeat, OTHER, &ahead).is_empty());
    let nonce = world.agents[&node].nonce();
    world.says(&node, NodeTopic::Bye, OTHER, &Bye { nonce });
    assert_eq!(world.node(&node).state, NodeState::Online);
    assert_eq!(refused(&world), 2);
    assert_eq!(world.says(&node, NodeTopic::Heartbeat, KEY, &beat).len(), 1, "its own is answered");
}

#[test]
fn a_session_begun_before_the_one_that_is_known_counts_on_from_that() {
    let (mut world, node) = world();
    let now: Hello = world.overheard(&node, NodeTopic::Hello);
    // As where its disk was put back: what the controller has acknowledged since, it will number again.
    let back = |session| Hello {
        nonce: SessionNonce::parse("back").unwrap(),
        previous: None,
        session,
        events_acked: 0,
        events_last: 0,
        pods: Vec::new(),
        ..now.clone()
    };
    for session in [now.session - 1, now.session] {
        let told = world.says(&node, NodeTopic::Hello, KEY, &back(session));
        assert_eq!(told.iter().map(|lease| lease.session).collect::<Vec<_>>(), [Some(now.session)]);
        assert!(told[0].refused.is_some());
    }
    assert_eq!(world.says(&node, NodeTopic::Hello, KEY, &now), [], "its own, said again");
    // The other may be there as long as this.
    assert!(world.says(&node, NodeTopic::Hello, KEY, &back(now.session + 1))[0].refused.is_some());
    world.agents.get_mut(&node).unwrap().up = false;
    world.run(70_000);
    let taken = world.says(&node, NodeTopic::Hello, KEY, &back(now.session + 1));
    assert!(taken.iter().all(|lease| lease.refused.is_none() && lease.acked == 0), "{taken:?}");
    let known = &world.controller.cluster.nodes[&node];
    assert_eq!((known.record.nonce.as_str(), known.outbox.as_ref().unwrap().acked), ("back", 0));
}
