//! How well the controller as a whole packs: prices made from what it is asked for, pods moved for others.

use std::collections::BTreeSet;

use berth_protocol::ids::NodeId;
use berth_protocol::job::{CheckpointMode, JobSpec, Volume, VolumeSource};
use berth_protocol::message::user::JobPhase;
use berth_protocol::resources::{Gpu, GpuRequest, Inventory};
use berth_protocol::units::{Bytes, MilliCpu};

use super::super::schedule::relocate::MOVE_AFTER;
use super::super::{Effect, Event, Note};
use super::world::{World, inventory, spec};

fn node(cores: u64, gpus: usize) -> Inventory {
    let mut has = inventory(cores, gpus);
    has.memory = Bytes(1024 * Bytes::GIB);
    has
}

fn job(name: &str, cpu: u64, gpu: Option<(u32, u32)>) -> JobSpec {
    let mut job = spec(name);
    let container = &mut job.pod.containers[0];
    let gpu = gpu.map(|(count, milli)| GpuRequest { count, milli, memory: None, model: BTreeSet::new() });
    container.resources.gpu = gpu;
    (container.resources.cpu, container.limits.cpu) = (MilliCpu(cpu), MilliCpu(cpu));
    container.command[1] = "100000000".to_owned();
    job
}

/// Thousandths of devices that pods have.
fn allocated(world: &World) -> u64 {
    let jobs = world.controller.cluster.jobs.values();
    let charges = jobs.flat_map(|job| job.placed().iter().filter_map(|i| job.assignment(*i)));
    charges.flat_map(|a| a.charge.gpus.iter()).map(|share| u64::from(share.milli)).sum()
}

fn node_of(world: &World, job: &str) -> Option<NodeId> {
    world.status(job)?.pods[0].node.clone()
}

#[test]
fn a_share_goes_to_the_device_that_is_broken_already() {
    for prices in [true, false] {
        let mut world = World::new();
        world.prices = prices;
        let (a, b) = (world.add("a", node(32, 2)), world.add("b", node(32, 2)));
        world.run(100);
        let mut both = job("both", 8_000, Some((2, 1000)));
        both.pod.containers[0].command[1] = "20000".to_owned();
        world.submit(&both);
        world.submit(&job("first", 2_000, Some((1, 500))));
        assert_eq!((node_of(&world, "both"), node_of(&world, "first")), (Some(a.clone()), Some(b.clone())));
        world.until("a is free again", |w| w.status("both").unwrap().phase == JobPhase::Succeeded);
        world.submit(&job("second", 2_000, Some((1, 500))));
        assert_eq!(node_of(&world, "second"), Some(if prices { b } else { a }));
    }
}

/// A fleet that has seen what its users ask for, and is then offered more than it has; what it takes of that, in
/// thousandths of its devices, and how often prices were made.
fn filled(seed: u64, prices: bool) -> (u64, usize) {
    let mut state = seed;
    let mut draw = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as usize % below
    };
    let mut world = World::new();
    world.prices = prices;
    let mut capacity = 0;
    for i in 0..12 {
        let gpus = [2, 2, 4, 8][draw(4)];
        capacity += gpus as u64 * 1000;
        world.add(&format!("n{i}"), node(12 * gpus as u64, gpus));
    }
    world.run(100);
    let mut one = |i: u64, ms: u64| {
        let (cpu, gpu) = [
            (4_000, Some((1, 460))),
            (6_000, Some((1, 550))),
            (3_000, Some((1, 320))),
            (8_000, Some((1, 810))),
            (2_000, Some((1, 230))),
            (2_000, Some((1, 160))),
            (4_000, Some((1, 500))),
            (8_000, Some((1, 1000))),
            (12_000, Some((1, 1000))),
            (10_000, Some((1, 1000))),
            (6_000, Some((1, 1000))),
            (16_000, Some((1, 1000))),
            (20_000, Some((2, 1000))),
            (90_000, Some((8, 1000))),
            (8_000, None),
            (6_000, None),
        ][draw(16)];
        let mut job = job(&format!("j{i}"), cpu, gpu);
        job.pod.containers[0].command[1] = ms.to_string();
        (job, gpu.map_or(0, |(count, milli)| u64::from(count * milli)))
    };
    for i in 0..60 {
        world.submit(&one(i, 100).0);
        world.run(200);
    }
    let mut offered = 0;
    for i in 60.. {
        let (job, milli) = one(i, 100_000_000);
        offered += milli;
        if offered > capacity * 12 / 10 {
            break;
        }
        let name = job.name.to_string();
        world.submit(&job);
        // As in the replays that schedulers are compared by, what fits nowhere is gone for good.
        if node_of(&world, &name).is_none() {
            world.command(&name, &name, "cancel");
        }
        world.run(200);
    }
    (allocated(&world) * 1000 / capacity, world.quotes)
}

#[test]
fn the_live_controller_packs_better_by_its_own_prices_than_by_first_fit() {
    let all = |prices: bool| (1..=4).map(|seed| filled(seed, prices)).collect::<Vec<_>>();
    let (bid, first) = (all(true), all(false));
    let sum = |runs: &[(u64, usize)]| runs.iter().map(|(milli, _)| milli).sum::<u64>();
    eprintln!("of 4000 thousandths: {} by price, {} by first fit", sum(&bid), sum(&first));
    assert!(sum(&bid) > sum(&first) + 4 * 10, "{bid:?} and {first:?}");
    assert_eq!(filled(1, true), bid[0], "the same input, the same output");
}

#[test]
fn prices_are_asked_for_seldom_and_solving_again_moves_nobody() {
    let mut world = World::new();
    world.add("a", node(64, 8));
    world.run(100);
    for i in 0..12 {
        world.submit(&job(&format!("j{i}"), 2_000, Some((1, 500))));
    }
    world.run(3_000);
    let (quotes, messages, epochs) = (world.quotes, world.messages, world.epochs.clone());
    assert!((1..=2).contains(&quotes), "{quotes}");
    world.run(600_000);
    assert_eq!((world.quotes, &world.epochs), (quotes, &epochs), "nothing new, no new prices");
    let grown = world.messages - messages;
    // After a restart what runs is what prices are made from, and nobody moves.
    world.restart_controller();
    world.run(600_000);
    assert_eq!(world.epochs, epochs);
    assert!(world.quotes > quotes && grown > 0);
}

/// Two nodes, each with a pod that is in the way of a larger one; the cheaper of them to move is on the first.
fn in_the_way() -> (World, [NodeId; 2]) {
    let mut world = World::new();
    let nodes = [world.add("a", node(6, 0)), world.add("b", node(6, 0))];
    world.run(100);
    let cores = |name: &str, cores: u64, ms: u64| {
        let mut job = job(name, cores * 1000, None);
        job.pod.containers[0].command[1] = ms.to_string();
        job
    };
    world.submit(&cores("gone", 3, 5_000));
    world.submit(&cores("small", 2, 600_000));
    world.submit(&cores("large", 3, 900_000));
    world.until("there is room, in two parts", |w| w.status("gone").unwrap().phase == JobPhase::Succeeded);
    assert_eq!(
        (node_of(&world, "small"), node_of(&world, "large")),
        (Some(nodes[0].clone()), Some(nodes[1].clone()))
    );
    world.submit(&cores("whole", 6, 10_000));
    assert_eq!(node_of(&world, "whole"), None);
    (world, nodes)
}

#[test]
fn a_pod_moves_with_its_work_so_that_another_fits() {
    let (mut world, nodes) = in_the_way();
    let begun = world.now;
    world.until("others wait", |w| w.now >= begun + MOVE_AFTER.0 - 1_000);
    assert_eq!(world.status("small").unwrap().migrations, 0, "not before its time");
    world.until("it runs", |w| w.status("whole").unwrap().phase == JobPhase::Running);
    assert!(world.now - begun < MOVE_AFTER.0 + 15_000, "{} ms", world.now - begun);
    let small = world.status("small").unwrap();
    assert_eq!(
        (node_of(&world, "whole"), node_of(&world, "small")),
        (Some(nodes[0].clone()), Some(nodes[1].clone()))
    );
    assert_eq!((small.migrations, small.failures), (1, 0));
    assert_eq!(world.status("large").unwrap().migrations, 0);
    world.until("it ends", |w| w.status("small").unwrap().phase == JobPhase::Succeeded);
    assert!(world.now - begun < 610_000, "its work was kept: {} ms", world.now - begun);
    assert!(world.controller.scheduler.reserved.is_empty() && world.controller.relocations.is_empty());
    assert!(!world.controller.scheduler.holds.is_any());
}

#[test]
fn who_cannot_be_saved_stays_and_the_plan_is_dropped() {
    let (mut world, nodes) = in_the_way();
    world.agents.get_mut(&nodes[0]).unwrap().dumps_fail = true;
    let begun = world.now;
    world.until("the other one moved", |w| {
        w.status("large").unwrap().migrations == 1 || w.now > begun + 300_000
    });
    // The small one would have been cheaper, and could not be saved; the large one has nowhere to go.
    let (small, large) = (world.status("small").unwrap(), world.status("large").unwrap());
    assert_eq!((small.migrations, small.evictions, large.migrations, large.evictions), (0, 0, 0, 0));
    assert_eq!(small.phase, JobPhase::Running);
    assert!(world.controller.scheduler.reserved.is_empty(), "no seat is kept for nobody");
    assert!(world.controller.relocations.is_empty());
    world.agents.get_mut(&nodes[0]).unwrap().dumps_fail = false;
    world.command("small", "again", "checkpoint");
    world.until("now it moves", |w| w.status("whole").unwrap().phase == JobPhase::Running);
    assert_eq!(world.status("small").unwrap().migrations, 1);
}

#[test]
fn nobody_moves_who_may_not_nor_where_no_moves_are_wanted() {
    for (moves_max, preemptible, mode) in
        [(0, true, CheckpointMode::Auto), (8, false, CheckpointMode::Auto), (8, true, CheckpointMode::None)]
    {
        let mut world = World::new();
        world.controller.config.moves_max = moves_max;
        let (a, b) = (world.add("a", node(6, 0)), world.add("b", node(6, 0)));
        world.run(100);
        for (name, cores) in [("gone", 3), ("small", 2), ("large", 3)] {
            let mut job = job(name, cores * 1000, None);
            job.pod.containers[0].command[1] = if name == "gone" { "5000" } else { "600000" }.to_owned();
            (job.preemptible, job.pod.checkpoint.mode) = (preemptible, mode);
            world.submit(&job);
        }
        world.run(6_000);
        world.submit(&job("whole", 6_000, None));
        world.run(300_000);
        assert_eq!((node_of(&world, "small"), node_of(&world, "large")), (Some(a), Some(b)));
        assert_eq!(node_of(&world, "whole"), None);
    }
}

#[test]
fn a_plan_whose_job_is_cancelled_is_dropped_with_every_seat_kept_for_it() {
    let (mut world, _) = in_the_way();
    world.run(MOVE_AFTER.0 - 5_000);
    // Orders are given, and nobody has heard of them.
    while world.controller.relocations.is_empty() {
        world.now += 10;
        world.feed(Event::Tick);
    }
    assert_eq!(world.controller.scheduler.reserved.len(), 1);
    assert!(world.status("whole").unwrap().message.unwrap().contains("held for it while others move"));
    world.command("whole", "no-more", "cancel");
    world.run(60_000);
    assert!(world.controller.relocations.is_empty() && world.controller.scheduler.reserved.is_empty());
    assert!(!world.controller.scheduler.holds.is_any());
    let running = |world: &World, job: &str| world.status(job).unwrap().phase == JobPhase::Running;
    assert!(running(&world, "small") && running(&world, "large"));
}

#[test]
fn an_operator_is_told_the_moves_and_has_them_made() {
    let (mut world, nodes) = in_the_way();
    world.run(5_000);
    let plan = world.query(r#"{"defrag":{"moves":8,"execute":false}}"#)["result"].clone();
    assert_eq!(plan["serves"]["job"], "whole", "{plan}");
    assert!(plan["stay"].is_null(), "{plan}");
    assert_eq!(
        (plan["moves"][0]["pod"].as_str(), plan["executed"].as_bool()),
        (Some("small-0"), Some(false))
    );
    assert_eq!(node_of(&world, "small"), Some(nodes[0].clone()));
    let told = world.query(r#"{"defrag":{"moves":8,"execute":true}}"#)["result"].clone();
    assert_eq!((&told["moves"], told["executed"].as_bool()), (&plan["moves"], Some(true)));
    world.until("it runs", |w| w.status("whole").unwrap().phase == JobPhase::Running);
    assert_eq!(node_of(&world, "small"), Some(nodes[1].clone()));
}

#[test]
fn who_may_not_be_moved_is_told() {
    let mut world = World::new();
    world.add("a", node(6, 0));
    world.run(100);
    for (name, preemptible) in [("still", false), ("may", true)] {
        let mut job = job(name, 2_000, None);
        (job.preemptible, job.pod.containers[0].command[1]) = (preemptible, "600000".to_owned());
        world.submit(&job);
    }
    world.run(10_000);
    let plan = world.query(r#"{"defrag":{"moves":8,"execute":false}}"#)["result"].clone();
    let stay = serde_json::json!({"notPreemptible": 1});
    assert_eq!((plan["moves"].as_array().map(Vec::len), &plan["stay"]), (Some(0), &stay), "{plan}");
}

#[test]
fn fragments_are_made_fewer_by_moves_one_after_the_other() {
    let mut world = World::new();
    let nodes: Vec<NodeId> = (0..3).map(|i| world.add(&format!("n{i}"), node(24, 2))).collect();
    world.run(100);
    // Whole devices are what is asked for most; three shares alone on three nodes break three of them.
    for i in 0..6 {
        let mut whole = job(&format!("w{i}"), 8_000, Some((2, 1000)));
        whole.pod.containers[0].command[1] = "1000".to_owned();
        world.submit(&whole);
        world.run(4_000);
    }
    for (i, id) in nodes.iter().enumerate() {
        let share = job(&format!("s{i}"), 2_000, Some((1, 300)));
        for other in nodes.iter().filter(|other| *other != id) {
            world.query(&format!(r#"{{"cordon":{{"node":"{other}"}}}}"#));
        }
        world.submit(&share);
        world.run(1_000);
        for other in &nodes {
            world.query(&format!(r#"{{"uncordon":{{"node":"{other}"}}}}"#));
        }
    }
    world.run(90_000);
    let plan = world.query(r#"{"defrag":{"moves":8,"execute":true}}"#)["result"].clone();
    let fragments = |plan: &serde_json::Value, i: usize| plan["fragmentsMilli"][i].as_u64().unwrap();
    assert!(!plan["moves"].as_array().unwrap().is_empty(), "{plan}");
    assert!(fragments(&plan, 1) < fragments(&plan, 0), "{plan}");
    let again = world.query(r#"{"defrag":{"moves":8,"execute":true}}"#);
    assert_eq!(again["error"]["code"], "Unavailable", "{again}");
    world.run(200_000);
    let shares: BTreeSet<_> = (0..3).map(|i| node_of(&world, &format!("s{i}"))).collect();
    assert!(shares.len() < 3, "{shares:?}");
    assert!(world.controller.scheduler.reserved.is_empty());
}

#[test]
fn inventories_that_lie_are_cut_down_told_once_and_harm_nobody() {
    let mut world = World::new();
    let mut absurd = node(4, 3);
    (absurd.cpu, absurd.memory, absurd.disk) = (MilliCpu(u64::MAX), Bytes(u64::MAX), Bytes(u64::MAX));
    absurd.gpus[2].uuid = absurd.gpus[1].uuid.clone();
    let gpu = absurd.gpus[0].clone();
    absurd.gpus.extend((0..200).map(|i| Gpu { uuid: format!("more-{i}"), ..gpu.clone() }));
    let liar = world.add("liar", absurd);
    let honest = world.add("honest", node(8, 2));
    world.run(100);
    let told = |world: &World| {
        let notes =
            world.deleted.iter().filter(|effect| matches!(effect, Effect::Note(Note::InventoryCut { .. })));
        notes.count()
    };
    assert_eq!(told(&world), 1);
    for i in 0..40 {
        world.submit(&job(&format!("j{i}"), 500, Some((1, 500))));
    }
    world.run(5_000);
    // Its agent starts anew and says the same.
    world.agents.get_mut(&liar).unwrap().restart();
    world.run(30_000);
    assert_eq!(told(&world), 1, "told once");
    // What runs on a node may be more than the node says it has now: then nothing is free there, until that has ended.
    let agent = world.agents.get_mut(&honest).unwrap();
    (agent.inventory.cpu, agent.inventory.memory) = (MilliCpu(100), Bytes(1));
    agent.inventory.gpus.truncate(1);
    agent.restart();
    let agent = world.agents.get_mut(&liar).unwrap();
    (agent.inventory.cpu, agent.inventory.memory) = (MilliCpu(0), Bytes(0));
    agent.inventory.gpus.clear();
    agent.restart();
    world.run(120_000);
    assert!(world.controller.scheduler.rooms().iter().all(|room| room.fit(&Default::default()).is_some()));
    let free: u64 = world.controller.scheduler.rooms().iter().map(|room| room.cpu_milli).sum();
    assert_eq!(free, 0);
    world.submit(&job("late", 500, None));
    world.run(200_000);
    assert_eq!(node_of(&world, "late"), None);
    for i in 0..40 {
        world.command(&format!("j{i}"), &format!("c{i}"), "cancel");
    }
    world.run(60_000);
    let rooms = world.controller.scheduler.rooms();
    assert_eq!(rooms.iter().map(|room| room.cpu_milli).sum::<u64>(), 100, "no more comes free than there is");
}

#[test]
fn what_others_hold_of_a_device_is_not_promised() {
    let mut world = World::new();
    let mut desktop = node(16, 1);
    // A game.
    desktop.gpus[0].outside = Bytes(desktop.gpus[0].memory.0 / 2);
    world.add("desktop", desktop);
    world.run(100);
    world.submit(&job("whole", 1_000, Some((1, 1000))));
    world.submit(&job("most", 1_000, Some((1, 600))));
    world.submit(&job("share", 1_000, Some((1, 500))));
    world.run(5_000);
    assert_eq!(["whole", "most"].map(|name| node_of(&world, name)), [None, None]);
    assert!(node_of(&world, "share").is_some());
    let why = world.query(r#"{"explain":{"namespace":"default","job":"whole"}}"#);
    assert!(why.to_string().contains("1 in part held by other programs"), "{why:#}");
}

#[test]
fn what_one_gives_back_where_too_much_is_taken_is_not_free() {
    let mut world = World::new();
    let id = world.add("a", node(4, 1));
    world.run(100);
    for name in ["one", "two", "three"] {
        world.submit(&job(name, 1_000, Some((1, 300))));
    }
    world.run(5_000);
    let agent = world.agents.get_mut(&id).unwrap();
    agent.inventory.cpu = MilliCpu(2_000);
    agent.inventory.gpus[0].outside = Bytes(agent.inventory.gpus[0].memory.0 / 2);
    agent.restart();
    world.run(30_000);
    world.command("one", "c1", "cancel");
    world.run(60_000);
    let room = &world.controller.scheduler.rooms()[0];
    assert_eq!((room.cpu_milli, room.devices[0].milli), (0, 0), "two pods of three are there");
    world.command("two", "c2", "cancel");
    world.run(60_000);
    let room = &world.controller.scheduler.rooms()[0];
    assert_eq!((room.cpu_milli, room.devices[0].milli), (1_000, 200));
}

#[test]
fn scratch_volumes_take_disk() {
    let mut world = World::new();
    world.add("a", node(8, 0));
    world.run(100);
    let disk = world.controller.scheduler.rooms()[0].disk_bytes;
    for name in ["one", "two"] {
        let mut job = job(name, 100, None);
        let source = VolumeSource::Scratch(Bytes(disk / 3 * 2));
        job.pod.volumes.push(Volume { mount: "/scratch".to_owned(), source, read_only: false, save: false });
        world.submit(&job);
    }
    world.run(5_000);
    assert_eq!(["one", "two"].map(|name| node_of(&world, name).is_some()), [true, false]);
    let why = world.query(r#"{"explain":{"namespace":"default","job":"two"}}"#);
    assert!(why.to_string().contains("of disk"), "{why:#}");
}
