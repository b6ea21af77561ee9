//! What a history is made of, drawn from its seed before it begins: machines, jobs, mishaps, wishes. A list, so that a
//! failing history can be played again without a part of it.

use std::fmt;

use berth_agent::policy::Granted;
use berth_protocol::message::user::JobPhase;
use berth_protocol::policy::Policy;
use berth_protocol::units::MilliCpu;

use crate::wishes::Wish;
use crate::world::Fault;

/// A seed's history as planned. How messages fare on their way is drawn while it is played, for each machine from a
/// stream of its own: what is left out changes little for the others.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    /// What each machine has.
    pub(crate) nodes: Vec<MilliCpu>,
    /// How long the history is disturbed, in ms.
    pub(crate) span: u64,
    pub(crate) items: Vec<Item>,
}

/// By every machine, what the jobs of histories need.
pub(crate) fn granted() -> Granted {
    Granted { rules: Policy { host_image: true, ..Policy::default() }, ..Granted::default() }
}

/// Something that can be left out, with what undoes it.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    Job(Job),
    Mishap(Vec<(u64, Fault)>),
    Wish(Vec<(u64, Wish)>),
}

#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub name: String,
    pub file: String,
    pub expect: Expect,
    /// Failures that the file forgives, where it has one pod.
    pub forgives: Option<u32>,
    /// Of the file: what is sent of one has one id.
    pub version: u32,
    pub at: u64,
    /// When it is sent again, with another `onDisconnect`.
    pub again: Option<u64>,
}

/// How a job's program makes it end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    Succeeded,
    Failed,
    /// It fails now and then, and is forgiven so often.
    Either,
}

impl Expect {
    pub fn is(self, phase: Option<JobPhase>) -> bool {
        match phase {
            Some(JobPhase::Succeeded) => self != Expect::Failed,
            Some(JobPhase::Failed) => self != Expect::Succeeded,
            _ => false,
        }
    }
}

impl Plan {
    pub fn of(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let count = if rng.u8(0..5) == 0 { rng.usize(8..=20) } else { rng.usize(3..8) };
        let nodes: Vec<MilliCpu> = (0..count).map(|_| MilliCpu(rng.u64(1..5) * 1000)).collect();
        let span = if count > 7 { 150_000 } else { 300_000 };
        let mut plan = Self { seed, nodes, span, items: Vec::new() };
        // One machine may never return, or never hear anything again; `continue` pods on it would wait for an operator.
        let dead = rng.u8(0..3) == 0;
        for n in 0..rng.usize(1..8.max(count)) {
            plan.items.push(Item::Job(job(&mut rng, n, span, dead)));
        }
        if dead {
            // The first one stays, so that there is room for everything in the end.
            let (at, node) = (rng.u64(1_000..span), rng.usize(1..count));
            let fault = if rng.bool() { Fault::Burn(node) } else { Fault::Deafen(node) };
            plan.items.push(Item::Mishap(vec![(at, fault)]));
        }
        for _ in 0..rng.usize(0..12.max(count)) {
            plan.items.push(Item::Mishap(crate::world::mishap(&mut rng, count, span)));
        }
        let jobs = plan.items.iter().filter(|item| matches!(item, Item::Job(_))).count();
        for _ in 0..rng.usize(0..12) {
            plan.items.push(Item::Wish(crate::wishes::draw(&mut rng, count, jobs, span)));
        }
        for _ in 0..rng.usize(0..6).saturating_sub(3) {
            plan.items.push(Item::Mishap(crate::world::deposition(&mut rng, count, span)));
        }
        if rng.u8(0..4) == 0 {
            plan.items.push(Item::Mishap(crate::world::rollback(&mut rng, count, span)));
        }
        if rng.u8(0..6) == 0 {
            plan.items.push(Item::Mishap(crate::world::damage(&mut rng, span)));
        }
        for _ in 0..rng.usize(0..6).saturating_sub(3) {
            let (at, node) = (rng.u64(1_000..span), rng.usize(0..count));
            plan.items.push(Item::Wish(vec![(at, Wish::Lost(node))]));
        }
        plan
    }

    /// As many things as can be left out.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The history with these of its things alone, by their place in the list.
    pub fn only(&self, kept: &[usize]) -> Self {
        let items = kept.iter().filter_map(|at| self.items.get(*at).cloned()).collect();
        Self { items, ..self.clone() }
    }

    /// The fewest things of those given with which it still goes wrong, as `fails` tells (delta debugging, Zeller 1999).
    pub fn shrunk(&self, from: Vec<usize>, fails: impl Fn(&Plan) -> bool) -> Vec<usize> {
        let (mut kept, mut part) = (from, 2);
        while kept.len() > 1 {
            let size = kept.len().div_ceil(part);
            let without = |n: usize| -> Vec<usize> {
                let (left, right) = (n * size, ((n + 1) * size).min(kept.len()));
                kept.iter()
                    .enumerate()
                    .filter(|(at, _)| !(left..right).contains(at))
                    .map(|(_, i)| *i)
                    .collect()
            };
            let parts = kept.len().div_ceil(size);
            match (0..parts).map(without).find(|rest| fails(&self.only(rest))) {
                Some(rest) => (kept, part) = (rest, part.max(3) - 1),
                None if size == 1 => break,
                None => part = (2 * part).min(kept.len()),
            }
        }
        kept
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cores: Vec<u64> = self.nodes.iter().map(|cpu| cpu.0 / 1000).collect();
        writeln!(f, "seed {}, {} ms of faults, nodes with {cores:?} cores", self.seed, self.span)?;
        for item in &self.items {
            match item {
                Item::Job(job) => {
                    let again = job.again.map(|at| format!(", again at {at} ms")).unwrap_or_default();
                    writeln!(
                        f,
                        "  {} at {} ms{again}: {}",
                        job.name,
                        job.at,
                        job.file.trim().replace('\n', "; ")
                    )?;
                }
                Item::Mishap(faults) => writeln!(f, "  {faults:?}")?,
                Item::Wish(wishes) => writeln!(f, "  {wishes:?}")?,
            }
        }
        Ok(())
    }
}

fn job(rng: &mut fastrand::Rng, n: usize, span: u64, dead: bool) -> Job {
    let (code, flaky, retries) = match rng.u8(0..8) {
        0 => (3, "", false),
        1 => (3, "", true),
        2 => (3, ", flaky", true),
        _ => (0, "", false),
    };
    let work = match rng.u8(0..4) {
        _ if retries => rng.u64(50..40_000),
        0 | 1 => rng.u64(50..60_000),
        _ => rng.u64(60_000..200_000),
    };
    let actions: &[&str] = if dead { &["pause", "stop"] } else { &["pause", "continue", "stop"] };
    let action = rng.choice(actions).copied().unwrap_or("pause");
    let completions = if retries { 1 } else { rng.u32(1..4) };
    let checkpoint =
        rng.choice(["{mode: none}", "{mode: criu}", "{mode: criu, interval: 7s}"]).unwrap_or("{}");
    let grace = rng.choice([5, 120]).unwrap_or(5);
    let mut file = format!(
        "image: host\ncommand: [work, \"{work}\", \"{code}\"{flaky}]\nresources: {{cpu: 500m, memory: 64Mi}}\n\
         completions: {completions}\nparallelism: {completions}\nonDisconnect: {{do: {action}}}\n\
         terminationGracePeriodSeconds: {grace}\ncheckpoint: {checkpoint}\n"
    );
    if retries {
        file.push_str("restartPolicy: OnFailure\nbackoffLimit: 2\nretry: {min: 2s, max: 20s}\n");
    }
    let expect = match (code, flaky) {
        (0, _) => Expect::Succeeded,
        (_, "") => Expect::Failed,
        _ => Expect::Either,
    };
    let at = rng.u64(0..span / 2);
    // Soon enough, now and then, for the first file to come once more behind the second.
    let again = match rng.u8(0..6) {
        0 => Some(at + rng.u64(1_000..150_000)),
        1 => Some(at + rng.u64(100..6_000)),
        _ => None,
    };
    let forgives = (completions == 1).then_some(if retries { 2 } else { 0 });
    Job { name: format!("job{n}"), file, expect, forgives, version: 1, at, again }
}
