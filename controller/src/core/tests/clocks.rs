//! Nodes whose clock stands still for a while, as that of a virtual machine that is paused.

use berth_protocol::message::node::{Covers, Heartbeat};
use berth_protocol::topic::NodeTopic;
use berth_protocol::units::BootMs;

use super::world::{KEY, World, inventory};

#[test]
fn a_machine_that_was_paused_is_granted_again_once_by_its_clock_too_all_is_over() {
    let mut world = World::new();
    let node = world.add("n1", inventory(1, 0));
    world.run(30_000);
    let mut beat: Heartbeat = world.overheard(&node, NodeTopic::Heartbeat);
    world.agents.get_mut(&node).unwrap().up = false;
    // By its clock ten seconds have passed, by all others forty.
    let mut boot = beat.boot_ms.0;
    let mut granted = Vec::new();
    for at in 0..12 {
        world.run(if at == 0 { 40_000 } else { 10_000 });
        boot += 10_000;
        (beat.seq, beat.boot_ms) = (beat.seq + 1, BootMs(boot));
        let lease = world.says(&node, NodeTopic::Heartbeat, KEY, &beat);
        beat.last_grant = Some(lease[0].seq);
        granted.push(matches!(lease[0].covers, Covers::All(_)));
    }
    let first = granted.iter().position(|granted| *granted).expect("it is granted in the end");
    // 60 s, and the margin.
    assert_eq!(first, 7, "{granted:?}");
    assert!(granted[first..].iter().all(|granted| *granted));
}
