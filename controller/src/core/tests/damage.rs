//! A store with damaged records: what they belong to is set aside, the rest goes on, and nothing runs twice.

use berth_protocol::ids::{JobName, JobUid, Namespace, NodeId};
use berth_protocol::job::JobSpec;
use berth_protocol::message::user::JobPhase;

use super::super::{Effect, Event};
use super::world::{World, inventory, spec};

fn long(name: &str) -> JobSpec {
    let mut spec = spec(name);
    spec.pod.containers[0].command = vec!["run".to_owned(), "60000".to_owned(), "0".to_owned()];
    spec
}

fn uid(world: &World, job: &str) -> JobUid {
    world.controller.cluster.names[&(Namespace::default_namespace(), JobName::parse(job).unwrap())].clone()
}

fn runs(world: &World, uid: &JobUid) -> bool {
    world.agents.values().any(|agent| agent.runs(&uid.pod(0), world.now))
}

/// Two jobs that run, each on a node of its own.
fn two() -> (World, JobUid, JobUid, NodeId) {
    let mut world = World::new();
    let node = world.add("n1", inventory(1, 0));
    world.add("n2", inventory(1, 0));
    for name in ["broken", "whole"] {
        let mut spec = long(name);
        spec.pod.containers[0].resources.cpu = berth_protocol::units::MilliCpu(600);
        world.submit(&spec);
    }
    world.run(10_000);
    let (broken, whole) = (uid(&world, "broken"), uid(&world, "whole"));
    assert!(runs(&world, &broken) && runs(&world, &whole));
    (world, broken, whole, node)
}

#[test]
fn a_damaged_record_costs_its_job_alone() {
    for key in ["job/{}", "run/{}", "pod/{}/0"] {
        let (mut world, broken, whole, _) = two();
        let key = key.replace("{}", broken.as_str());
        assert!(world.store.contains_key(&key), "{key}");
        let before = world.store.clone();
        world.damaged.insert(key.clone());
        world.restart_controller();
        let aside = world.controller.set_aside();
        assert_eq!(
            (&aside.damaged, aside.jobs.iter().collect::<Vec<_>>()),
            (&vec![key.clone()], vec![&broken])
        );
        world.until("the other job ends", |w| {
            w.status("whole").is_some_and(|job| job.phase == JobPhase::Succeeded)
        });
        assert!(!world.controller.cluster.jobs.contains_key(&broken));
        assert!(world.controller.cluster.jobs.contains_key(&whole));
        assert!(!runs(&world, &broken), "{key}: nobody may answer for it, so it stands still");
        // Nothing of it is written or removed: whoever mends the store finds it as it was.
        for (key, value) in before.iter().filter(|(key, _)| key.contains(broken.as_str())) {
            assert_eq!(world.store.get(key), Some(value), "{key}");
        }
        world.damaged.clear();
        world.restart_controller();
        world.until("it ends as well", |w| {
            w.status("broken").is_some_and(|job| job.phase == JobPhase::Succeeded)
        });
    }
}

#[test]
fn a_job_without_its_file_is_set_aside_too() {
    let (mut world, broken, ..) = two();
    world.store.remove(&format!("job/{broken}"));
    world.restart_controller();
    assert_eq!(world.controller.set_aside().jobs.iter().collect::<Vec<_>>(), [&broken]);
}

#[test]
fn a_node_whose_record_is_damaged_or_lost_is_known_by_its_ledger() {
    for lost in [false, true] {
        known_by_its_ledger(lost);
    }
}

fn known_by_its_ledger(lost: bool) {
    let (mut world, broken, _, _) = two();
    let node =
        world.agents.values().find(|agent| agent.pods.contains_key(&broken.pod(0))).unwrap().id.clone();
    if lost {
        world.store.remove(&format!("node/{node}"));
    } else {
        world.damaged.insert(format!("node/{node}"));
    }
    world.restart_controller();
    assert!(world.controller.set_aside().jobs.is_empty());
    world.run(30_000);
    assert!(runs(&world, &broken), "its machine is the same");
    world.until("both jobs end", |w| {
        ["broken", "whole"]
            .iter()
            .all(|job| w.status(job).is_some_and(|job| job.phase == JobPhase::Succeeded))
    });
    assert_eq!(world.status("broken").unwrap().evictions, 0);
}

/// The name alone proves nothing: another machine with an empty ledger would attest that the pod is gone.
#[test]
fn another_machine_does_not_speak_for_a_node_whose_record_is_damaged() {
    let (mut world, broken, _, _) = two();
    let node =
        world.agents.values().find(|agent| agent.pods.contains_key(&broken.pod(0))).unwrap().id.clone();
    world.damaged.extend([format!("node/{node}"), format!("outbox/{node}")]);
    world.restart_controller();
    world.run(15_000);
    let epoch = world.controller.cluster.jobs[&broken].pods()[&0].epoch;
    assert_eq!(epoch.0, 1, "nothing took its place");
    assert!(world.controller.counters().refused.contains_key("other-hardware"));
    // Once its lease is over it may run elsewhere: a pod that pauses stands still by then.
    world.until("both jobs end", |w| {
        ["broken", "whole"]
            .iter()
            .all(|job| w.status(job).is_some_and(|job| job.phase == JobPhase::Succeeded))
    });
    assert_eq!(world.status("broken").unwrap().evictions, 1);
}

#[test]
fn while_anything_is_damaged_no_checkpoint_is_an_orphan() {
    let (mut world, broken, _, _) = two();
    let manifests = vec![(berth_protocol::ids::Digest::of(b"one"), berth_protocol::units::Timestamp(0))];
    let deletes = |world: &mut World| {
        let now = super::world::at(world.now + 40 * 86_400_000);
        let step = world.controller.step(now, Event::DepotListed(manifests.clone()));
        step.effects.iter().any(|effect| matches!(effect, Effect::DeleteCheckpoint(_)))
    };
    world.damaged.insert(format!("pod/{broken}/0"));
    world.restart_controller();
    assert!(!deletes(&mut world));
    world.damaged.clear();
    world.restart_controller();
    assert!(deletes(&mut world));
}
