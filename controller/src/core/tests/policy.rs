//! What nodes' own policies allow no pod: a constraint like any other.

use berth_protocol::ids::NodeId;
use berth_protocol::job::{JobSpec, Network};
use berth_protocol::message::node::{NodeEvent, NumberedEvent};
use berth_protocol::policy::{ImagePattern, Largest, Policy};
use berth_protocol::resources::Inventory;
use berth_protocol::units::{MilliCpu, Timestamp};

use super::world::{World, inventory, spec};

fn granting(policy: Policy) -> Inventory {
    Inventory { host_image: policy.host_image, policy: Some(Box::new(policy)), ..inventory(8, 0) }
}

fn open() -> Policy {
    Policy { host_image: true, ..Policy::default() }
}

fn only_from(registry: &str) -> Policy {
    Policy { registries: Some(vec![ImagePattern::parse(registry).unwrap()]), ..open() }
}

fn long(name: &str, image: &str) -> JobSpec {
    let mut job = spec(name);
    job.pod.containers[0].image = image.to_owned();
    job.pod.containers[0].command[1] = "100000000".to_owned();
    job
}

fn node_of(world: &World, job: &str) -> Option<String> {
    world.status(job).unwrap().pods.first()?.node.as_ref().map(ToString::to_string)
}

fn why(world: &World, job: &str) -> String {
    world.status(job).unwrap().message.unwrap_or_default()
}

/// The agent was started anew with another policy.
fn tell(world: &mut World, node: &NodeId, policy: Policy) {
    let now = world.now;
    let agent = world.agents.get_mut(node).unwrap();
    agent.inventory = granting(policy);
    agent.events_last += 1;
    let event = NodeEvent::Inventory(Box::new(agent.inventory.clone()));
    agent.events.push_back(NumberedEvent { n: agent.events_last, at: Timestamp(now), event });
    agent.events_at = now;
    world.run(3_000);
}

#[test]
fn pods_go_where_they_are_allowed_and_wait_where_they_are_not() {
    let mut world = World::new();
    world.add("a", granting(Policy { networks: [Network::None].into(), ..open() }));
    world.add("b", granting(only_from("docker.io")));
    // Of a version that says nothing of it.
    world.add("c", Inventory { host_image: true, ..inventory(1, 0) });
    world.run(100);
    let mut job = long("bridge", "python:3");
    job.pod.network = Network::Bridge;
    world.submit(&job);
    assert_eq!(node_of(&world, "bridge").as_deref(), Some("b"));
    let mut job = long("other", "ghcr.io/x/y:1");
    job.pod.network = Network::None;
    world.submit(&job);
    assert_eq!(node_of(&world, "other").as_deref(), Some("a"));
    job = long("neither", "ghcr.io/x/y:1");
    job.pod.network = Network::Host;
    (job.pod.containers[0].resources.cpu, job.pod.containers[0].limits.cpu) =
        (MilliCpu(2000), MilliCpu(2000));
    world.submit(&job);
    assert_eq!(node_of(&world, "neither"), None);
    let said = why(&world, "neither");
    for part in [
        "0 of 3 nodes fit",
        "1 has a policy that allows no `network: host`",
        "1 has a policy that allows no image of ghcr.io/x/y",
        "1 needs 2 cores",
    ] {
        assert!(said.contains(part), "{said}");
    }
}

/// As long as no policy looks at repositories or amounts, jobs are not told apart by them. Those that wait are when one does.
#[test]
fn a_policy_that_looks_closer_holds_for_jobs_that_were_there_before_it() {
    let mut world = World::new();
    let a = world.add("a", granting(open()));
    world.run(100);
    world.submit(&long("runs", "ghcr.io/x/y:1"));
    assert_eq!(node_of(&world, "runs").as_deref(), Some("a"));
    let mut wide = long("wide", "python:3");
    (wide.pod.containers[0].resources.cpu, wide.pod.containers[0].limits.cpu) =
        (MilliCpu(8000), MilliCpu(16_000));
    world.submit(&wide);
    world.submit(&JobSpec { name: "second".parse().unwrap(), ..wide.clone() });
    assert!(why(&world, "wide").contains("1 needs 8 cores"), "{}", why(&world, "wide"));
    let largest = Largest { cpu: Some(MilliCpu(10_000)), ..Largest::default() };
    tell(&mut world, &a, Policy { largest, ..only_from("docker.io") });
    // What runs there is not touched, and what bursts beyond it does not come.
    assert_eq!(node_of(&world, "runs").as_deref(), Some("a"));
    for job in ["wide", "second"] {
        assert!(why(&world, job).contains("allows no pods with more cores than 10"), "{}", why(&world, job));
    }
    world.submit(&long("late", "ghcr.io/x/y:2"));
    assert!(why(&world, "late").contains("allows no image of ghcr.io/x/y"), "{}", why(&world, "late"));
    world.submit(&long("fine", "python:3"));
    assert_eq!(node_of(&world, "fine").as_deref(), Some("a"));
    // Another node's lets it in, and what waits goes there.
    world.add("b", Inventory { cpu: MilliCpu(64_000), ..granting(open()) });
    world.run(10_000);
    for job in ["late", "wide"] {
        assert_eq!(node_of(&world, job).as_deref(), Some("b"), "{}", why(&world, job));
    }
}
