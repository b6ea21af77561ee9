//! What a pod needs is at its next node before it is asked to leave, and no move hangs on it.

use berth_protocol::chunk::{GrantFor, GrantRequest};
use berth_protocol::ids::{Digest, NodeId};
use berth_protocol::image::{ImageName, Images};
use berth_protocol::message::node::{ChunkServer, StageState};
use berth_protocol::pod::PodPhase;
use berth_protocol::units::Bytes;

use super::checkpoints::{ends, long, node_of, rejected, running, running_on, saved, status, two_nodes};
use super::world::{Agent, Stages, World, inventory, spec};

/// A job that runs on one of two nodes, and the other one, whose agent does so with what it is to stage.
fn about_to_move(stages: Stages) -> (World, NodeId, NodeId) {
    with_memory(128, stages)
}

fn with_memory(mib: u64, stages: Stages) -> (World, NodeId, NodeId) {
    let mut world = two_nodes();
    let mut job = long("a");
    job.pod.containers[0].resources.memory = Bytes(mib * Bytes::MIB);
    job.pod.containers[0].limits.memory = Bytes(mib * Bytes::MIB);
    world.submit(&job);
    running(&mut world, "a");
    world.run(10_000);
    let from = node_of(&world, "a").unwrap();
    let to = NodeId::parse(if from.as_str() == "n1" { "n2" } else { "n1" }).unwrap();
    agent(&mut world, &to).stages = stages;
    (world, from, to)
}

fn agent<'a>(world: &'a mut World, node: &NodeId) -> &'a mut Agent {
    world.agents.get_mut(node).unwrap()
}

fn migrate(world: &mut World, to: &NodeId) -> u64 {
    let answer = world.command_with("a", "migrate", &format!(r#""node":"{to}""#));
    assert_eq!(rejected(&answer).0, "accepted", "{answer:?}");
    world.now
}

/// It runs where it was, and was not asked for a checkpoint.
fn runs_on(world: &World, from: &NodeId) -> bool {
    let status = status(world, "a");
    let pod = &status.pods[0];
    pod.phase == PodPhase::Running && pod.node.as_ref() == Some(from) && pod.epoch.0 == 1
}

/// What was to be staged is there, or is not, as of the agent's next heartbeat.
fn tell(world: &mut World, node: &NodeId, state: StageState) {
    let now = world.now;
    let agent = agent(world, node);
    agent.staged.values_mut().for_each(|staged| staged.state = state.clone());
    agent.beat_at = now;
}

#[test]
fn a_pod_runs_on_until_what_it_needs_is_there() {
    let (mut world, from, to) = about_to_move(Stages::Never);
    let checkpoint = saved(&mut world, "a");
    migrate(&mut world, &to);
    world.run(50_000);
    assert!(runs_on(&world, &from));
    let message = status(&world, "a").pods[0].message.clone().unwrap();
    assert_eq!(message, format!("runs on until {to} has what it needs, to go on at {to}"));
    let asked = agent(&mut world, &to).asked.clone();
    assert_eq!((asked.len(), asked[0].epoch.0, asked[0].from), (1, 1, Some(checkpoint)));
    // That node may load that checkpoint, and nobody else or nothing else.
    let grant = |world: &World, node: &NodeId, checkpoint| {
        let what = GrantFor::Load { checkpoint };
        let (pod, epoch) = (asked[0].pod.clone(), asked[0].epoch);
        world.controller.grant(node, &GrantRequest { pod, epoch, what }).is_some()
    };
    assert!(grant(&world, &to, checkpoint));
    assert!(!grant(&world, &from, checkpoint) && !grant(&world, &to, Digest::of(b"another")));
    tell(&mut world, &to, StageState::Ready);
    let told = world.now;
    running_on(&mut world, "a", to.as_str());
    assert!(world.now - told < 5_000, "{} ms", world.now - told);
    assert!(world.controller.cluster.staging.is_empty() && world.controller.scheduler.reserved.is_empty());
    assert!(agent(&mut world, &to).staged.is_empty(), "it is no longer named");
    assert!(!grant(&world, &to, checkpoint));
    assert_eq!(status(&world, "a").migrations, 1);
}

#[test]
fn a_pod_with_much_memory_is_saved_a_first_time_while_it_runs_on() {
    let (mut world, from, to) = with_memory(1024, Stages::Never);
    migrate(&mut world, &to);
    world.until("it is saved", |world| status(world, "a").checkpoint.is_some());
    let first = status(&world, "a").checkpoint.unwrap().id;
    world.run(1_000);
    assert!(runs_on(&world, &from));
    let asked = agent(&mut world, &to).asked.clone();
    assert_eq!((asked.len(), asked[0].from), (1, Some(first)), "what was saved, once it is");
    tell(&mut world, &to, StageState::Ready);
    running_on(&mut world, "a", to.as_str());
    assert_ne!(status(&world, "a").checkpoint.unwrap().id, first, "it leaves with one of its own");
    assert_eq!(status(&world, "a").migrations, 1);
    // The next time there is one that is like it, and what of it is there was brought already.
    agent(&mut world, &from).stages = Stages::Never;
    let last = status(&world, "a").checkpoint.unwrap().id;
    migrate(&mut world, &from);
    world.run(1_000);
    assert_eq!(status(&world, "a").checkpoint.unwrap().id, last);
}

#[test]
fn who_cannot_be_saved_a_first_time_is_not_waited_for() {
    let (mut world, from, to) = with_memory(1024, Stages::Never);
    agent(&mut world, &from).dumps_fail = true;
    let begun = migrate(&mut world, &to);
    world.run(3_000);
    // Nothing of it is there to be brought, but its image is.
    assert_eq!(agent(&mut world, &to).asked[0].from, None);
    agent(&mut world, &from).dumps_fail = false;
    tell(&mut world, &to, StageState::Ready);
    running_on(&mut world, "a", to.as_str());
    assert!(world.now - begun < 10_000);
    // Before a deadline time is too short for two.
    let (mut world, from, _) = with_memory(1024, Stages::Never);
    world.query(&format!(r#"{{"drain":{{"node":"{from}","deadline":60000}}}}"#));
    world.run(15_000);
    assert!(status(&world, "a").checkpoint.is_none());
}

#[test]
fn a_node_that_keeps_the_checkpoint_is_named_to_who_may_load_it() {
    let (mut world, from, to) = about_to_move(Stages::Never);
    let server = ChunkServer { url: "http://10.0.0.1:7421".to_owned(), secret: [5; 32] };
    let serving = agent(&mut world, &from);
    serving.chunks = Some(server.clone());
    serving.restart();
    world.run(1_000);
    let checkpoint = saved(&mut world, "a");
    migrate(&mut world, &to);
    world.run(5_000);
    let asked = agent(&mut world, &to).asked[0].clone();
    let request = |what| GrantRequest { pod: asked.pod.clone(), epoch: asked.epoch, what };
    let load = request(GrantFor::Load { checkpoint });
    let granted = world.controller.grant(&to, &load).unwrap();
    assert_eq!(granted.holder, Some((server, None)));
    assert_eq!(world.controller.grant(&from, &request(GrantFor::Save)).unwrap().holder, None);
    // One that has fallen silent is not asked.
    agent(&mut world, &from).cut = true;
    world.run(30_000);
    assert_eq!(world.controller.grant(&to, &load).unwrap().holder, None);
}

#[test]
fn no_move_hangs_on_what_does_not_come() {
    for (stages, most) in [(Stages::Fails, 5_000), (Stages::Ignores, 5_000), (Stages::Never, 65_000)] {
        let (mut world, _, to) = about_to_move(stages);
        let begun = migrate(&mut world, &to);
        running_on(&mut world, "a", to.as_str());
        let took = world.now - begun;
        assert!(took < most, "{stages:?}: {took} ms");
        assert!(stages != Stages::Never || took >= 60_000, "{took} ms");
        assert_eq!(status(&world, "a").migrations, 1);
    }
}

#[test]
fn what_is_there_already_is_not_waited_for() {
    let mut world = World::new();
    let images = Images::cut([ImageName::parse("oci:/images/busybox").unwrap()]);
    for node in ["n1", "n2"] {
        let mut has = inventory(4, 0);
        has.images = images.clone();
        world.add(node, has);
        agent(&mut world, &NodeId::parse(node).unwrap()).stages = Stages::Never;
    }
    world.run(100);
    world.submit(&long("a"));
    running(&mut world, "a");
    let home = node_of(&world, "a").unwrap();
    let there = NodeId::parse(if home.as_str() == "n1" { "n2" } else { "n1" }).unwrap();
    let begun = migrate(&mut world, &there);
    running_on(&mut world, "a", there.as_str());
    assert!(world.now - begun < 5_000);
    // The checkpoint that it left with is still where it was taken.
    let begun = migrate(&mut world, &home);
    running_on(&mut world, "a", home.as_str());
    assert!(world.now - begun < 5_000);
    assert!(world.agents.values().all(|agent| agent.asked.is_empty()));
    // One of the place where it is has to be brought.
    saved(&mut world, "a");
    agent(&mut world, &there).stages = Stages::AtOnce;
    migrate(&mut world, &there);
    running_on(&mut world, "a", there.as_str());
    assert_eq!(agent(&mut world, &there).asked.len(), 1);
}

#[test]
fn a_restart_of_either_side_changes_nothing() {
    let (mut world, from, to) = about_to_move(Stages::Never);
    migrate(&mut world, &to);
    world.run(5_000);
    world.restart_controller();
    world.run(5_000);
    agent(&mut world, &to).restart();
    world.run(10_000);
    assert!(runs_on(&world, &from));
    assert_eq!(agent(&mut world, &to).staged.len(), 1, "named anew");
    // Its seat is its own all the while.
    let mut large = spec("large");
    large.pod.containers[0].resources.cpu.0 = 4_000;
    large.pod.containers[0].limits.cpu.0 = 4_000;
    world.submit(&large);
    world.run(10_000);
    assert_eq!(status(&world, "large").pods[0].phase, PodPhase::Pending);
    tell(&mut world, &to, StageState::Ready);
    running_on(&mut world, "a", to.as_str());
    ends(&mut world, "large");
}

#[test]
fn a_drain_waits_no_longer_than_its_deadline_allows() {
    let drained = |deadline: Option<u64>, memory: u64| {
        let mut world = two_nodes();
        let mut job = long("a");
        job.pod.containers[0].resources.memory.0 = memory;
        job.pod.containers[0].limits.memory.0 = memory;
        world.submit(&job);
        running(&mut world, "a");
        world.run(10_000);
        let from = node_of(&world, "a").unwrap();
        world.agents.values_mut().for_each(|agent| agent.stages = Stages::Never);
        let within = deadline.map(|ms| format!(r#","deadline":{ms}"#)).unwrap_or_default();
        let begun = world.now;
        world.query(&format!(r#"{{"drain":{{"node":"{from}"{within}}}}}"#));
        world.until("it is elsewhere", |w| node_of(w, "a").is_some_and(|at| at != from));
        assert_eq!(status(&world, "a").migrations, 1);
        (world.now - begun) / 1_000
    };
    const MIB: u64 = 1 << 20;
    for (deadline, memory, waits) in [
        (None, 128 * MIB, 60..64),
        (Some(600_000), 128 * MIB, 60..64),
        (Some(30_000), 128 * MIB, 10..14),
        (Some(2_000), 128 * MIB, 0..3),
        // Six seconds go for saving that much.
        (Some(60_000), 6 * 200 * MIB, 20..24),
        (Some(8_000), 6 * 200 * MIB, 2..5),
        (Some(6_500), 6 * 200 * MIB, 0..3),
    ] {
        let waited = drained(deadline, memory);
        assert!(waits.contains(&waited), "{deadline:?}, {memory}: {waited} s");
    }
}

#[test]
fn a_notice_that_comes_while_a_pod_waits_shortens_the_wait() {
    let (mut world, from, to) = about_to_move(Stages::Never);
    let begun = migrate(&mut world, &to);
    world.run(5_000);
    world.query(&format!(r#"{{"drain":{{"node":"{from}","deadline":15000}}}}"#));
    running_on(&mut world, "a", to.as_str());
    assert!((10_000..13_000).contains(&(world.now - begun)), "{} ms", world.now - begun);
}

#[test]
fn an_order_given_again_is_the_same_one_and_another_target_another() {
    let (mut world, from, to) = about_to_move(Stages::Never);
    let third = world.add("n3", inventory(4, 0));
    agent(&mut world, &third).stages = Stages::Never;
    world.run(100);
    let begun = migrate(&mut world, &to);
    world.run(20_000);
    migrate(&mut world, &to);
    world.run(30_000);
    assert!(runs_on(&world, &from));
    let again = migrate(&mut world, &third);
    world.run(2_000);
    assert!(agent(&mut world, &to).staged.is_empty() && agent(&mut world, &third).staged.len() == 1);
    assert_eq!(world.controller.scheduler.reserved.len(), 1);
    running_on(&mut world, "a", "n3");
    assert!(world.now - begun > 60_000 && world.now - again < 65_000);
}

#[test]
fn who_was_not_asked_to_leave_yet_stays_when_the_drain_is_taken_back() {
    let (mut world, from, to) = about_to_move(Stages::Never);
    world.query(&format!(r#"{{"drain":{{"node":"{from}"}}}}"#));
    world.run(10_000);
    assert!(!agent(&mut world, &to).staged.is_empty());
    assert_eq!(world.query(&format!(r#"{{"uncordon":{{"node":"{from}"}}}}"#))["result"]["state"], "online");
    world.run(120_000);
    assert!(runs_on(&world, &from));
    assert!(agent(&mut world, &to).staged.is_empty() && world.controller.scheduler.reserved.is_empty());
}

#[test]
fn a_move_is_called_off_where_its_target_is_lost_while_the_pod_waits_and_a_drain_goes_elsewhere() {
    let (mut world, from, to) = about_to_move(Stages::Never);
    migrate(&mut world, &to);
    world.run(5_000);
    agent(&mut world, &to).up = false;
    world.run(60_000);
    assert!(runs_on(&world, &from));
    let message = status(&world, "a").pods[0].message.clone().unwrap();
    assert!(message.contains(&format!("stays here instead of going to {to}")), "{message}");
    assert!(world.controller.cluster.staging.is_empty() && world.controller.scheduler.reserved.is_empty());

    let (mut world, from, to) = about_to_move(Stages::Never);
    world.query(&format!(r#"{{"drain":{{"node":"{from}"}}}}"#));
    world.run(5_000);
    agent(&mut world, &to).up = false;
    world.add("n3", inventory(4, 0));
    running_on(&mut world, "a", "n3");
    assert_eq!(status(&world, "a").migrations, 1);
}

#[test]
fn a_job_that_ends_or_is_suspended_leaves_nothing_of_its_wait() {
    for command in ["cancel", "suspend"] {
        let (mut world, _, to) = about_to_move(Stages::Never);
        migrate(&mut world, &to);
        world.run(5_000);
        assert_eq!(world.controller.scheduler.reserved.len(), 1);
        world.command("a", "c1", command);
        world.run(5_000);
        assert!(
            world.controller.cluster.staging.is_empty() && world.controller.scheduler.reserved.is_empty()
        );
        assert!(agent(&mut world, &to).staged.is_empty());
    }
}

#[test]
fn of_many_pods_as_many_are_named_at_once_as_a_message_holds() {
    const PODS: usize = 40;
    let mut world = World::new();
    let from = world.add("n1", inventory(64, 0));
    world.run(100);
    let mut job = long("a");
    job.pod.containers[0].resources.cpu.0 = 100;
    (job.parallelism, job.completions) = (PODS as u32, PODS as u32);
    world.submit(&job);
    world.run(1_000);
    let to = world.add("n2", inventory(64, 0));
    world.run(1_000);
    agent(&mut world, &to).stages = Stages::Never;
    world.query(&format!(r#"{{"drain":{{"node":"{from}"}}}}"#));
    world.run(5_000);
    assert_eq!(agent(&mut world, &to).staged.len(), 16);
    let begun = world.now;
    agent(&mut world, &to).stages = Stages::AtOnce;
    tell(&mut world, &to, StageState::Ready);
    let there = |world: &World| {
        let status = status(world, "a");
        status
            .pods
            .iter()
            .filter(|pod| pod.phase == PodPhase::Running && pod.node.as_ref() == Some(&to))
            .count()
    };
    world.until("all are there", |w| there(w) == PODS);
    assert!(world.now - begun < 20_000, "{} ms", world.now - begun);
    assert_eq!(agent(&mut world, &to).asked.len(), PODS);
}
