//! Which faults, when, how long: drawn from a seed before anything is broken. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use fastrand::Rng;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    KillAgent,
    StopAgent,
    KillLeader,
    KillStandby,
    KillBroker,
    KillEtcd,
    CutNode,
    CutController,
    CutBroker,
    WorseLine,
    KillShim,
    KillProgram,
    Drain,
    Migrate,
    Checkpoint,
}

/// What each is called, how often of 100, and for how long in ms: until it is made good, or nothing.
const KINDS: [(Kind, &str, usize, u64, u64); 15] = [
    (Kind::KillAgent, "agent killed", 12, 0, 5_000),
    (Kind::StopAgent, "agent stopped", 7, 1_000, 60_000),
    (Kind::KillLeader, "leader killed", 5, 0, 5_000),
    (Kind::KillStandby, "standby killed", 4, 0, 5_000),
    (Kind::KillBroker, "broker killed", 5, 0, 10_000),
    (Kind::KillEtcd, "etcd killed", 5, 0, 5_000),
    (Kind::CutNode, "node cut off", 13, 1_000, 90_000),
    (Kind::CutController, "controller cut off", 4, 1_000, 30_000),
    (Kind::CutBroker, "broker cut off", 3, 1_000, 15_000),
    (Kind::WorseLine, "line worse", 8, 5_000, 60_000),
    (Kind::KillShim, "shim killed", 8, 0, 0),
    (Kind::KillProgram, "program killed", 8, 0, 0),
    (Kind::Drain, "node drained", 4, 5_000, 40_000),
    (Kind::Migrate, "pod moved", 8, 0, 0),
    (Kind::Checkpoint, "pod saved", 6, 0, 0),
];

impl Kind {
    pub fn name(self) -> &'static str {
        KINDS.iter().find(|row| row.0 == self).map_or("", |row| row.1)
    }
}

/// A fault to come.
#[derive(Debug, Clone, PartialEq)]
pub struct Strike {
    /// From the beginning.
    pub at: Duration,
    pub kind: Kind,
    /// Until it is made good; a few take long, most do not.
    pub lasts: Duration,
    /// Chooses among those whom it may hit.
    pub whom: usize,
}

/// `count` faults, evenly over `length`, in their order.
pub fn draw(seed: u64, count: usize, length: Duration) -> Vec<Strike> {
    let mut random = Rng::with_seed(seed);
    (0..count)
        .map(|n| {
            let share = (n as f64 + random.f64()) / count as f64;
            let (kind, _, _, least, most) = KINDS[pick(&mut random)];
            let lasts = least + ((most - least) as f64 * random.f64().powi(3)) as u64;
            let at = length.mul_f64(share);
            Strike { at, kind, lasts: Duration::from_millis(lasts), whom: random.usize(..) }
        })
        .collect()
}

fn pick(random: &mut Rng) -> usize {
    let mut ticket = random.usize(0..KINDS.iter().map(|row| row.2).sum());
    for (index, row) in KINDS.iter().enumerate() {
        match ticket.checked_sub(row.2) {
            Some(rest) => ticket = rest,
            None => return index,
        }
    }
    0
}

/// This kind and then the others, in an order that `whom` says: where there is nobody for one, the next is tried.
pub fn instead(strike: &Strike) -> impl Iterator<Item = Kind> + use<> {
    let turn = strike.whom % KINDS.len();
    let others = (0..KINDS.len()).map(move |n| KINDS[(n + turn) % KINDS.len()].0);
    let kind = strike.kind;
    std::iter::once(kind).chain(others.filter(move |other| *other != kind))
}

/// `5 agent killed, 3 pod moved`.
pub fn in_words(counts: &BTreeMap<Kind, usize>) -> String {
    let parts = counts.iter().map(|(kind, count)| format!("{count} {}", kind.name()));
    parts.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_plan() {
        let length = Duration::from_secs(1800);
        let plan = draw(7, 500, length);
        assert_eq!(plan, draw(7, 500, length));
        assert_ne!(plan, draw(8, 500, length));
        assert_eq!(plan.len(), 500);
        assert!(plan.is_sorted_by_key(|strike| strike.at));
        assert!(plan.iter().all(|strike| strike.at < length));
        for (kind, name, _, least, most) in KINDS {
            let of_kind: Vec<&Strike> = plan.iter().filter(|strike| strike.kind == kind).collect();
            assert!(of_kind.len() > 3, "{name}: {}", of_kind.len());
            let span = Duration::from_millis(least)..=Duration::from_millis(most);
            assert!(of_kind.iter().all(|strike| span.contains(&strike.lasts)), "{name}");
        }
        let quarter = plan.iter().filter(|strike| strike.at < length / 4).count();
        assert_eq!(quarter, 125);
    }

    #[test]
    fn every_kind_is_tried_once() {
        for strike in draw(1, 50, Duration::from_secs(60)) {
            let mut order: Vec<Kind> = instead(&strike).collect();
            assert_eq!(order[0], strike.kind);
            order.sort();
            order.dedup();
            assert_eq!(order.len(), KINDS.len());
        }
    }
}
