//! Nodes that hold a pod's image: taken among equals, and among equals alone.

use berth_protocol::ids::NodeId;
use berth_protocol::image::{ImageName, Images};
use berth_protocol::job::JobSpec;
use berth_protocol::message::node::{NodeEvent, NumberedEvent};
use berth_protocol::resources::Inventory;
use berth_protocol::units::Timestamp;
use serde_json::json;

use super::world::{World, inventory, spec};

fn holding(has: Inventory, images: &[&str]) -> Inventory {
    let images = Images::cut(images.iter().map(|name| ImageName::parse(name).unwrap()));
    Inventory { images, host_image: true, ..has }
}

fn job(name: &str, image: &str) -> JobSpec {
    let mut job = spec(name);
    let container = &mut job.pod.containers[0];
    container.image = image.to_owned();
    container.command[1] = "100000000".to_owned();
    job
}

/// How many of a job's pods each node has.
fn placed(world: &World, job: &str) -> Vec<(String, usize)> {
    let status = world.status(job).unwrap();
    let mut nodes: Vec<String> =
        status.pods.iter().filter_map(|p| Some(p.node.as_ref()?.to_string())).collect();
    nodes.sort();
    nodes.chunk_by(|a, b| a == b).map(|node| (node[0].clone(), node.len())).collect()
}

fn submit(world: &mut World, job: &JobSpec) -> Vec<(String, usize)> {
    world.submit(job);
    placed(world, job.name.as_str())
}

fn on(nodes: &[(&str, usize)]) -> Vec<(String, usize)> {
    nodes.iter().map(|(node, pods)| ((*node).to_owned(), *pods)).collect()
}

/// The node's agent says what it holds now.
fn tell(world: &mut World, node: &NodeId, images: &[&str]) {
    let now = world.now;
    let agent = world.agents.get_mut(node).unwrap();
    agent.inventory = holding(agent.inventory.clone(), images);
    agent.events_last += 1;
    let event = NodeEvent::Inventory(Box::new(agent.inventory.clone()));
    agent.events.push_back(NumberedEvent { n: agent.events_last, at: Timestamp(now), event });
    agent.events_at = now;
    world.run(3_000);
}

#[test]
fn of_equals_the_node_that_holds_the_image_is_taken() {
    let mut world = World::new();
    world.add("a", holding(inventory(8, 0), &[]));
    let b = world.add("b", holding(inventory(8, 0), &["python:3.12", "oci:/images/busybox"]));
    world.run(100);
    for (name, image, node) in [
        ("host", "host", "a"),
        ("other", "python:3.13", "a"),
        ("same", "docker.io/library/python:3.12", "b"),
        ("layout", "oci:/images/busybox", "b"),
    ] {
        assert_eq!(submit(&mut world, &job(name, image)), on(&[(node, 1)]), "{name}");
    }
    let mut explain = |job: &str| {
        world.query(&format!(r#"{{"explain":{{"namespace":"default","job":"{job}"}}}}"#))["result"].take()
    };
    let same = explain("same");
    assert_eq!([&same["nodes"][0]["hasImage"], &same["nodes"][1]["hasImage"]], [&json!(false), &json!(true)]);
    let had = json!("the node had the image already");
    let why = |of: &serde_json::Value| of["seats"][0]["why"].as_array().unwrap().contains(&had);
    assert!(why(&same), "{same:#}");
    let (host, other) = (explain("host"), explain("other"));
    assert!(host["nodes"][0]["hasImage"].is_null() && !why(&host), "{host:#}");
    assert!(!why(&other) && other["nodes"][1]["hasImage"] == json!(false), "{other:#}");
    // All of them where the node is asked for, none in what is published again and again.
    let node = world.query(r#"{"node":{"node":"b"}}"#);
    assert_eq!(node["result"]["images"], json!(["docker.io/library/python:3.12", "oci:/images/busybox"]));
    assert!(world.node(&b).images.is_empty());
}

#[test]
fn what_a_node_says_counts_from_then_on_and_is_remembered() {
    let mut world = World::new();
    world.add("a", holding(inventory(32, 0), &[]));
    let b = world.add("b", holding(inventory(32, 0), &[]));
    world.run(100);
    let mut count = 0;
    // One after the other, so that the nodes are equals each time.
    let mut next = |world: &mut World| {
        count += 1;
        let name = format!("j{count}");
        let on = submit(world, &job(&name, "python:3.12"));
        world.command(&name, "over", "cancel");
        world.run(60_000);
        on
    };
    assert_eq!(next(&mut world), on(&[("a", 1)]));
    let version = |world: &World| world.controller.cluster.nodes[&b].version;
    let before = version(&world);
    tell(&mut world, &b, &["redis:7", "python:3.12"]);
    assert_eq!(version(&world), before, "no rule is asked again for an image");
    assert_eq!(next(&mut world), on(&[("b", 1)]));
    world.restart_controller();
    // Until it may place anew.
    world.run(60_000);
    assert_eq!(next(&mut world), on(&[("b", 1)]));
    tell(&mut world, &b, &["redis:7"]);
    assert_eq!(next(&mut world), on(&[("a", 1)]));
}

#[test]
fn no_image_makes_up_for_a_worse_score() {
    let mut world = World::new();
    // Its GPUs want the cores that a pod without one would take.
    world.add("a", holding(inventory(8, 4), &["python:3.12"]));
    world.add("b", holding(inventory(8, 0), &[]));
    world.run(100);
    assert_eq!(submit(&mut world, &job("plain", "python:3.12")), on(&[("b", 1)]));
}

#[test]
fn gangs_and_pods_kept_apart_begin_where_the_image_is() {
    let mut world = World::new();
    world.add("a", holding(inventory(4, 0), &[]));
    world.add("b", holding(inventory(4, 0), &["python:3.12"]));
    world.add("c", holding(inventory(4, 0), &[]));
    world.run(100);
    let many = |name: &str, pods: u32| {
        let mut job = job(name, "python:3.12");
        (job.parallelism, job.completions) = (pods, pods);
        job
    };
    let mut apart = many("apart", 2);
    apart.placement.anti_affinity = Some("job".to_owned());
    assert_eq!(submit(&mut world, &apart), on(&[("a", 1), ("b", 1)]));
    let mut gang = many("gang", 5);
    gang.gang = true;
    assert_eq!(submit(&mut world, &gang), on(&[("a", 2), ("b", 3)]));
}
