//! A bus that loses, doubles and reorders, nodes that vanish, reboot and return, a controller that restarts: whatever
//! happens, no pod runs twice at once, epochs only grow, and every job ends.

use std::collections::BTreeMap;

use berth_protocol::ids::{Epoch, NodeId, PodId};
use berth_protocol::job::{Restart, RestartPolicy};
use berth_protocol::message::user::JobPhase;
use berth_protocol::units::Millis;

use super::super::Event;
use super::world::{World, inventory, spec};

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

fn oracle(world: &World, seen: &mut BTreeMap<PodId, Epoch>) {
    let mut running: BTreeMap<&PodId, &NodeId> = BTreeMap::new();
    for agent in world.agents.values() {
        for pod in agent.pods.keys().filter(|pod| agent.runs(pod, world.now)) {
            if let Some(other) = running.insert(pod, &agent.id) {
                panic!("{pod} runs on {other} and on {} at {}", agent.id, world.now);
            }
        }
    }
    for (uid, job) in &world.controller.cluster.jobs {
        for (index, pod) in job.pods() {
            let last = seen.entry(uid.pod(*index)).or_default();
            assert!(pod.epoch >= *last, "an epoch went back");
            *last = pod.epoch;
            for id in &pod.saved.checkpoints {
                assert!(world.depot.contains_key(id), "a checkpoint that a pod names was collected");
            }
        }
    }
}

/// What is reloaded from the store is what was there.
fn reloads(world: &World) {
    let (again, aside) = super::super::records::load(world.entries(), super::world::at(world.now)).unwrap();
    assert_eq!(aside, super::super::SetAside::default());
    for (uid, job) in &world.controller.cluster.jobs {
        let other = &again.jobs[uid];
        assert_eq!(job.file, other.file);
        assert_eq!(job.run, other.run, "{uid}");
        let stored = job.pods().iter().filter(|(_, pod)| pod.is_stored());
        for (index, pod) in stored {
            let mut pod = pod.clone();
            if let super::super::cluster::PodState::Placed(assignment) = &mut pod.state {
                assignment.progress = None;
                assignment.staging.iter_mut().for_each(|staging| staging.named = None);
            }
            assert_eq!(Some(&pod), other.pod(*index), "{uid} {index}");
        }
    }
    assert_eq!(world.controller.cluster.checkpoints, again.checkpoints);
    for (id, node) in &world.controller.cluster.nodes {
        assert_eq!(node.record, again.nodes[id].record);
        assert_eq!(node.outbox, again.nodes[id].outbox);
    }
}

fn storm(seed: u64) {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut world = World::new();
    let mut seen = BTreeMap::new();
    let nodes: Vec<NodeId> = (0..3).map(|i| world.add(&format!("n{i}"), inventory(2, 0))).collect();
    for i in 0..4 {
        let mut job = spec(&format!("job{i}"));
        let code = u8::from(i == 3);
        let ms = dice.roll(60_000);
        job.pod.containers[0].command = vec!["run".to_owned(), ms.to_string(), code.to_string()];
        (job.parallelism, job.completions) = (2, 3);
        if i == 3 {
            job.pod.restart =
                Restart { policy: RestartPolicy::OnFailure, backoff_limit: 2, ..Restart::default() };
        }
        job.pod.checkpoint.interval = (i == 0).then_some(Millis::from_secs(5));
        job.active_deadline = (i == 1).then_some(Millis::from_secs(100_000));
        world.submit(&job);
    }
    let stop = world.now + 400_000;
    while world.now < stop {
        world.agents_act();
        while !world.network.is_empty() {
            let n = world.network.len() as u64;
            let i = if dice.roll(4) == 0 { dice.roll(n) } else { 0 };
            let (topic, payload) = world.network.remove(usize::try_from(i).unwrap()).unwrap();
            match dice.roll(12) {
                0 => {}
                1 => {
                    world.network.push_back((topic.clone(), payload.clone()));
                    world.deliver(topic, payload);
                }
                _ => world.deliver(topic, payload),
            }
            oracle(&world, &mut seen);
        }
        let node = &nodes[usize::try_from(dice.roll(3)).unwrap()];
        let now = world.now;
        match dice.roll(150) {
            0 => world.restart_controller(),
            1 => world.agents.get_mut(node).unwrap().restart(),
            2 => world.agents.get_mut(node).unwrap().reboot(now),
            3..=5 => {
                let agent = world.agents.get_mut(node).unwrap();
                agent.cut = !agent.cut;
            }
            6 => {
                world.feed(Event::BusDown);
                world.feed(Event::BusUp);
            }
            7..=9 => {
                let job = format!("job{}", dice.roll(4));
                world.order(&job, "migrate", &format!(r#""node":"{node}""#));
            }
            10 => world.order(&format!("job{}", dice.roll(3)), "suspend", r#""node":null"#),
            11..=13 => world.order(&format!("job{}", dice.roll(3)), "resume", r#""node":null"#),
            14 => world.order(&format!("job{}", dice.roll(4)), "checkpoint", r#""node":null"#),
            15 => world.ask(&format!(r#"{{"drain":{{"node":"{node}","deadline":{}}}}}"#, dice.roll(60_000))),
            16..=18 => world.ask(&format!(r#"{{"uncordon":{{"node":"{node}"}}}}"#)),
            19 => {
                let agent = world.agents.get_mut(node).unwrap();
                agent.dumps_fail = !agent.dumps_fail;
            }
            21 => {
                use super::world::Stages;
                let agent = world.agents.get_mut(node).unwrap();
                let all = [Stages::AtOnce, Stages::Never, Stages::Fails, Stages::Ignores];
                agent.stages = all[usize::try_from(dice.roll(4)).unwrap()];
            }
            20 => {
                let agent = world.agents.get_mut(node).unwrap();
                agent.restores_fail = !agent.restores_fail;
            }
            _ => {}
        }
        reloads(&world);
        world.now = world.next().min(world.now + 1 + dice.roll(2_000));
        world.feed(Event::Tick);
        oracle(&world, &mut seen);
    }
    for agent in world.agents.values_mut() {
        (agent.cut, agent.dumps_fail, agent.restores_fail) = (false, false, false);
    }
    for node in &nodes {
        world.ask(&format!(r#"{{"uncordon":{{"node":"{node}"}}}}"#));
    }
    for i in 0..4 {
        world.order(&format!("job{i}"), "resume", r#""node":null"#);
    }
    for i in 0..4 {
        let name = format!("job{i}");
        world.until(&format!("{name} ends (seed {seed})"), |w| {
            w.status(&name).is_some_and(|status| status.phase.is_final())
        });
        let status = world.status(&name).unwrap();
        let want = if i == 3 { JobPhase::Failed } else { JobPhase::Succeeded };
        assert_eq!(status.phase, want, "seed {seed}: {status:?}");
        assert!(i == 3 || status.failures == 0, "an eviction counted as a failure");
    }
    oracle(&world, &mut seen);
    world.run(60_000);
    assert!(
        world
            .controller
            .cluster
            .nodes
            .values()
            .all(|node| node.pods.is_empty() && node.record.strays.is_empty())
    );
}

#[test]
fn whatever_the_bus_does_no_job_is_lost_and_no_pod_runs_twice() {
    let seeds = std::env::var("SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    for seed in 1..=seeds {
        storm(seed);
    }
}
