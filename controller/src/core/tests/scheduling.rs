//! Whose turn it is, what room is held, who makes way: seen as users see it.

use berth_protocol::ids::{JobName, Namespace, NodeId};
use berth_protocol::job::JobSpec;
use berth_protocol::message::user::{JobPhase, JobStatus, Verdict};
use berth_protocol::pod::PodPhase;
use berth_protocol::topic::{JobTopic, Topic};
use berth_protocol::units::{Bytes, MilliCpu};
use proptest::prelude::*;

use super::super::schedule::quota::Allowance;
use super::super::schedule::turn::{HOLD_AFTER, OVERDUE_AFTER};
use super::world::{World, inventory, spec};

fn job(name: &str, namespace: &str, cores: u64, ms: u64) -> JobSpec {
    let mut job = spec(name);
    job.namespace = Namespace::parse(namespace).unwrap();
    job.pod.namespace = job.namespace.clone();
    let container = &mut job.pod.containers[0];
    container.resources.cpu = MilliCpu(cores * 1000);
    container.limits.cpu = MilliCpu(cores * 1000);
    container.command[1] = ms.to_string();
    job
}

fn status(world: &World, namespace: &str, name: &str) -> Option<JobStatus> {
    let namespace = Namespace::parse(namespace).unwrap();
    let topic = Topic::job(&namespace, &JobName::parse(name).unwrap(), JobTopic::Status);
    world.retained.get(&topic).map(|payload| serde_json::from_slice(payload).unwrap())
}

fn placed(world: &World, namespace: &str, name: &str) -> usize {
    let pods = status(world, namespace, name).map(|status| status.pods).unwrap_or_default();
    pods.iter().filter(|pod| pod.node.is_some() && !pod.phase.is_final()).count()
}

fn cluster(nodes: &[u64]) -> (World, Vec<NodeId>) {
    let mut world = World::new();
    let nodes = nodes.iter().enumerate();
    let nodes = nodes.map(|(i, cores)| world.add(&format!("n{i}"), inventory(*cores, 0))).collect();
    world.run(100);
    (world, nodes)
}

#[test]
fn namespaces_share_by_weight() {
    let (mut world, _) = cluster(&[12]);
    let allowances = &mut world.controller.scheduler.ledger.allowances;
    allowances.insert(Namespace::parse("b").unwrap(), Allowance { weight: 3, ..Allowance::default() });
    let mut first = job("first", "a", 12, 10_000);
    world.submit(&first);
    for namespace in ["a", "b"] {
        let mut many = job("many", namespace, 1, 1_000_000);
        (many.parallelism, many.completions) = (12, 12);
        world.submit(&many);
    }
    world.until("the first ends", |w| status(w, "a", "first").unwrap().phase == JobPhase::Succeeded);
    world.run(1_000);
    assert_eq!((placed(&world, "a", "many"), placed(&world, "b", "many")), (3, 9));
    // Priority goes before share.
    first.name = JobName::parse("late").unwrap();
    first.pod.job = first.name.clone();
    first.priority = 1;
    first.preemptible = false;
    first.pod.containers[0].resources.cpu = MilliCpu(1000);
    first.pod.containers[0].limits.cpu = MilliCpu(1000);
    world.submit(&first);
    world.until("it has made its way", |w| placed(w, "a", "late") == 1);
}

#[test]
fn quotas_hold_and_are_told() {
    let (mut world, _) = cluster(&[12]);
    let quota = Allowance { cpu: Some(MilliCpu(2000)), ..Allowance::default() };
    world.controller.scheduler.ledger.allowances.insert(Namespace::default_namespace(), quota);
    let mut many = job("many", "default", 1, 10_000);
    (many.parallelism, many.completions) = (4, 4);
    world.submit(&many);
    assert_eq!(placed(&world, "default", "many"), 2);
    let said = status(&world, "default", "many").unwrap();
    assert_eq!(said.reason.as_deref(), Some("QuotaExceeded"));
    let message = said.message.unwrap();
    assert!(message.contains("the quota of namespace default is 2 cores, 2 are in use"), "{message}");
    let mut gang = job("gang", "default", 1, 10_000);
    (gang.parallelism, gang.completions, gang.gang) = (3, 3, true);
    world.submit(&gang);
    world.until("the rest follows", |w| status(w, "default", "many").unwrap().phase == JobPhase::Succeeded);
    assert_eq!(placed(&world, "default", "gang"), 0, "a gang beyond the quota never starts");
}

/// A stream of short jobs, one more whenever one ends.
fn stream(
    world: &mut World,
    priority: i32,
    width: usize,
    ms: u64,
    upto: u64,
    mut done: impl FnMut(&World) -> bool,
) -> u64 {
    let start = world.now;
    let mut next = 0;
    let mut live: Vec<String> = Vec::new();
    while world.now - start < upto && !done(world) {
        live.retain(|name| !status(world, "default", name).is_some_and(|s| s.phase.is_final()));
        while live.len() < width {
            let name = format!("s{next}");
            next += 1;
            let mut short = job(&name, "default", 1, ms);
            short.priority = priority;
            world.submit(&short);
            live.push(name);
        }
        world.run(1_000);
    }
    world.now - start
}

#[test]
fn backfill_goes_on_but_not_in_the_room_that_is_held_for_the_first() {
    let (mut world, _) = cluster(&[4, 4]);
    let length = 20_000;
    stream(&mut world, 0, 10, length, 5_000, |_| false);
    let big = job("big", "default", 4, 10_000);
    world.submit(&big);
    let took = stream(&mut world, 0, 10, length, 600_000, |w| placed(w, "default", "big") == 1);
    assert!(took <= HOLD_AFTER.0 + length + 5_000, "{took} ms");
    let others = world.controller.cluster.jobs.values().filter(|job| !job.placed().is_empty()).count();
    assert!(others >= 3, "the other node is used meanwhile: {others}");
}

#[test]
fn no_job_that_fits_waits_for_ever_whatever_goes_before_it() {
    let (mut world, _) = cluster(&[4, 4]);
    let length = 60_000;
    stream(&mut world, 5, 20, length, 5_000, |_| false);
    let mut poor = job("poor", "default", 4, 30_000);
    poor.preemptible = false;
    world.submit(&poor);
    let mut held = false;
    let took = stream(&mut world, 5, 20, length, 2 * OVERDUE_AFTER.0, |w| {
        let message = status(w, "default", "poor").and_then(|status| status.message).unwrap_or_default();
        held |= message.contains("is held for it");
        placed(w, "default", "poor") == 1
    });
    assert!((OVERDUE_AFTER.0..=OVERDUE_AFTER.0 + length + 5_000).contains(&took), "{took} ms");
    assert!(held, "the status says that room is held");
}

#[test]
fn the_pods_that_lose_least_make_way() {
    let (mut world, _) = cluster(&[2, 2]);
    for (i, (name, wait)) in
        [("old", 600_000), ("mid", 300_000), ("safe", 10_000), ("young", 10_000)].into_iter().enumerate()
    {
        let mut low = job(name, "default", 1, 100_000_000);
        low.preemptible = name != "safe";
        low.priority = if i == 1 { 1 } else { 0 };
        world.submit(&low);
        world.run(wait);
    }
    let mut urgent = job("urgent", "default", 1, 1_000);
    urgent.priority = 1;
    world.submit(&urgent);
    let said = status(&world, "default", "urgent").unwrap();
    assert!(said.message.as_deref().unwrap_or_default().contains("makes way"), "{said:?}");
    world.until("it runs", |w| status(w, "default", "urgent").unwrap().phase == JobPhase::Running);
    let young = status(&world, "default", "young").unwrap();
    assert_eq!((young.evictions, young.failures, young.phase), (1, 0, JobPhase::Pending));
    assert_eq!(young.pods[0].reason.as_deref(), Some("Preempted"));
    for other in ["old", "mid", "safe"] {
        assert_eq!(status(&world, "default", other).unwrap().evictions, 0, "{other}");
    }
    world.until("it comes back", |w| placed(w, "default", "young") == 1);
    // Nothing of equal priority makes way, and nothing that may not.
    let mut equal = job("equal", "default", 2, 1_000);
    equal.priority = 1;
    world.submit(&equal);
    world.run(20_000);
    assert_eq!(placed(&world, "default", "equal"), 0);
    for other in ["old", "mid", "safe", "young"] {
        assert_eq!(placed(&world, "default", other), 1, "{other}");
    }
}

#[test]
fn a_gang_preempts_for_all_of_it_or_nobody() {
    let (mut world, _) = cluster(&[2, 2]);
    for name in ["a", "b", "c", "d"] {
        world.submit(&job(name, "default", 1, 100_000_000));
    }
    world.run(10_000);
    let mut gang = job("gang", "default", 2, 1_000);
    (gang.parallelism, gang.completions, gang.gang, gang.priority) = (3, 3, true, 9);
    world.submit(&gang);
    world.run(10_000);
    let evictions = |world: &World| {
        ["a", "b", "c", "d"].map(|name| status(world, "default", name).unwrap().evictions).iter().sum::<u32>()
    };
    assert_eq!(evictions(&world), 0, "three do not fit, whoever leaves");
    gang.name = JobName::parse("pair").unwrap();
    gang.pod.job = gang.name.clone();
    (gang.parallelism, gang.completions) = (2, 2);
    world.submit(&gang);
    world.until("both run", |w| placed(w, "default", "pair") == 2);
    assert_eq!(evictions(&world), 4);
}

#[derive(Debug, Clone)]
struct Draft {
    cores: u64,
    memory_gib: u64,
    pods: u32,
    gang: bool,
    apart: bool,
    zone: Option<u8>,
    priority: i32,
    namespace: bool,
    ms: u64,
}

fn draft() -> impl Strategy<Value = Draft> {
    let amounts = (1..5u64, 0..4u64, 1..4u32, 1..40u64);
    let rules = (any::<bool>(), any::<bool>(), proptest::option::of(0..2u8), 0..3i32, any::<bool>());
    (amounts, rules).prop_map(
        |((cores, memory_gib, pods, secs), (gang, apart, zone, priority, namespace))| Draft {
            cores,
            memory_gib,
            pods,
            gang,
            apart,
            zone,
            priority,
            namespace,
            ms: secs * 1000,
        },
    )
}

/// What must hold at every moment, by the store's truth.
fn laws(world: &World) -> Result<(), TestCaseError> {
    let cluster = &world.controller.cluster;
    let mut used: std::collections::BTreeMap<&Namespace, u64> = std::collections::BTreeMap::new();
    for (id, node) in &cluster.nodes {
        let has = &node.record.inventory;
        let (mut cpu, mut memory) = (0, 0);
        for pod in node.pods.keys() {
            let job = &cluster.jobs[&pod.uid];
            let charge = &job.assignment(pod.index).unwrap().charge;
            cpu += charge.cpu.0;
            memory += charge.memory.0;
            *used.entry(&job.file.spec.namespace).or_default() += charge.cpu.0;
            if let Some(affinity) = &job.file.spec.placement.affinity {
                let zone = affinity.split('"').nth(1).unwrap();
                prop_assert_eq!(has.labels.get("zone").map(String::as_str), Some(zone), "{}", id);
            }
            let tainted = has.taints.iter().all(|taint| job.file.spec.placement.tolerations.contains(taint));
            prop_assert!(tainted);
        }
        prop_assert!(cpu <= has.cpu.0 && memory <= has.memory.0, "{} is over its capacity", id);
    }
    for job in cluster.jobs.values() {
        let spec = &job.file.spec;
        let nodes: Vec<_> = job.placed().iter().map(|i| &job.assignment(*i).unwrap().node).collect();
        if spec.placement.anti_affinity.is_some() {
            let distinct: std::collections::BTreeSet<_> = nodes.iter().collect();
            prop_assert_eq!(distinct.len(), nodes.len(), "two pods of {} on one node", spec.name.as_str());
        }
        if spec.gang && job.run.evictions == 0 && job.run.started_at.is_none() {
            let all = job.placed().is_empty() || job.waiting().is_empty();
            prop_assert!(all, "gang {} is split", spec.name.as_str());
        }
    }
    for (namespace, cpu) in used {
        let ledger = &world.controller.scheduler.ledger;
        prop_assert_eq!(ledger.used(namespace).cpu, cpu);
        if let Some(most) = ledger.allowance(namespace).cpu {
            prop_assert!(cpu <= most.0, "{} is over its quota", namespace.as_str());
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever is submitted: the laws hold at every moment, what the scheduler keeps is what follows from the records
    /// alone, and every job that fits ends.
    #[test]
    fn laws_hold_and_every_job_that_fits_ends(
        nodes in proptest::collection::vec((2..7u64, proptest::option::of(0..2u8), any::<bool>()), 1..5),
        drafts in proptest::collection::vec((draft(), 0..20u64), 1..12),
        quota in proptest::option::of(4..9u64),
    ) {
        let mut world = World::new();
        for (i, (cores, zone, tainted)) in nodes.iter().enumerate() {
            let mut has = inventory(*cores, 0);
            has.labels.extend(zone.map(|zone| ("zone".to_owned(), format!("z{zone}"))));
            if *tainted && i > 0 {
                has.taints.insert("spot".to_owned());
            }
            world.add(&format!("n{i}"), has);
        }
        if let Some(cores) = quota {
            let quota = Allowance { cpu: Some(MilliCpu(cores * 1000)), ..Allowance::default() };
            world.controller.scheduler.ledger.allowances.insert(Namespace::parse("b").unwrap(), quota);
        }
        world.run(100);
        let mut names = Vec::new();
        for (i, (draft, pause)) in drafts.iter().enumerate() {
            let namespace = if draft.namespace { "default" } else { "b" };
            let mut job = job(&format!("j{i}"), namespace, draft.cores, draft.ms);
            let memory = Bytes((draft.memory_gib * Bytes::GIB).max(128 * Bytes::MIB));
            job.pod.containers[0].resources.memory = memory;
            job.pod.containers[0].limits.memory = memory;
            (job.parallelism, job.completions) = (draft.pods, draft.pods);
            (job.gang, job.priority) = (draft.gang, draft.priority);
            job.placement.anti_affinity = draft.apart.then(|| "job".to_owned());
            job.placement.affinity = draft.zone.map(|zone| format!("node.labels.zone == \"z{zone}\""));
            let accepted = matches!(world.submit(&job).verdict, Verdict::Accepted { .. });
            prop_assert!(accepted);
            names.push((namespace, format!("j{i}")));
            laws(&world)?;
            world.run(pause * 1000);
            laws(&world)?;
        }
        for _ in 0..200 {
            world.run(5_000);
            laws(&world)?;
        }
        // From the records alone the same follows.
        let kept: Vec<_> = world.controller.scheduler.rooms().to_vec();
        let nodes = world.controller.scheduler.nodes.clone();
        for id in &nodes {
            world.controller.refresh_room(id);
        }
        prop_assert_eq!(world.controller.scheduler.rooms(), &kept[..]);
        for (namespace, name) in names {
            let said = status(&world, namespace, &name).unwrap();
            if said.phase.is_final() {
                continue;
            }
            let namespace = Namespace::parse(namespace).unwrap();
            let uid = world.controller.cluster.names[&(namespace, JobName::parse(&name).unwrap())].clone();
            let fits = world.controller.could_fit(&uid) && world.controller.may_start(&uid);
            prop_assert!(!fits, "{name} fits and waits: {:?}", said.message);
            prop_assert!(said.pods.iter().all(|pod| pod.phase == PodPhase::Pending || pod.phase.is_final()));
        }
    }
}
