//! What pods of each share are worth, from the cutting-stock programme behind packing: devices are cut into shares by
//! patterns, nodes lend CPU and memory, and the fleet serves as large a multiple of the demand as it can. The dual price
//! of a share is what serving one more of it costs (Gilmore and Gomory, 1961).

use std::collections::BTreeMap;

use super::prices::Demand;
use super::problem::Room;
use super::simplex::{Column, Simplex};

/// Shares are cut in steps of this many thousandths.
const STEP: usize = 10;
const STEPS: usize = 1000 / STEP;
const ROUNDS_MAX: usize = 400;
const PIVOTS_MAX: usize = 20_000;
const GIB: f64 = (1u64 << 30) as f64;

/// Nodes of one size.
struct Kind {
    cpu: u64,
    memory: u64,
    devices: usize,
    nodes: usize,
}

struct Wanted {
    cpu: u64,
    memory: u64,
    devices: usize,
    milli: usize,
    count: u64,
}

impl Wanted {
    fn fits(&self, kind: &Kind) -> bool {
        self.cpu <= kind.cpu && self.memory <= kind.memory && self.devices <= kind.devices
    }

    fn is_share(&self) -> bool {
        self.devices == 1 && self.milli < 1000
    }
}

const CPU: usize = 0;
const MEMORY: usize = 1;
const DEVICES: usize = 2;

/// By CPU and share, in thousandths of a device.
pub fn worth(demand: &Demand, rooms: &[Room]) -> BTreeMap<(u64, usize), i64> {
    let kinds = kinds(rooms);
    let wanted = wanted(demand, &kinds);
    let row = |kind: usize, what: usize| kind * 3 + what;
    let class = |k: usize| kinds.len() * 3 + k;
    let mut bounds = Vec::new();
    for kind in &kinds {
        let nodes = kind.nodes as f64;
        bounds.push(nodes * kind.cpu as f64 / 1000.0);
        bounds.push(nodes * kind.memory as f64 / GIB);
        bounds.push(nodes * kind.devices as f64);
    }
    // A little slack, unlike from row to row, keeps the simplex from standing still.
    bounds.extend((0..wanted.len()).map(|k| 1e-4 * (1.0 + (k * 7 % 13) as f64)));
    let mut programme = Simplex::new(bounds);
    programme.add(Column {
        gain: 1.0,
        entries: wanted.iter().enumerate().map(|(k, w)| (class(k), w.count as f64)).collect(),
    });
    let column = |kind: usize, devices: f64, cut: &[(usize, f64)]| {
        let sum = |of: &dyn Fn(&Wanted) -> f64| cut.iter().map(|(k, n)| n * of(&wanted[*k])).sum::<f64>();
        let mut entries = vec![
            (row(kind, CPU), sum(&|w| w.cpu as f64 / 1000.0)),
            (row(kind, MEMORY), sum(&|w| w.memory as f64 / GIB)),
            (row(kind, DEVICES), devices),
        ];
        entries.extend(cut.iter().map(|(k, n)| (class(*k), -n)));
        Column { gain: 0.0, entries }
    };
    for (i, kind) in kinds.iter().enumerate() {
        for (k, w) in wanted.iter().enumerate().filter(|(_, w)| w.fits(kind)) {
            let (devices, n) =
                if w.is_share() { (1.0, (1000 / w.milli) as f64) } else { (w.devices as f64, 1.0) };
            programme.add(column(i, devices, &[(k, n)]));
        }
    }
    let mut pivots = 0;
    for _ in 0..ROUNDS_MAX {
        pivots += programme.improve(PIVOTS_MAX - pivots.min(PIVOTS_MAX));
        let mut fresh = Vec::new();
        for (i, kind) in kinds.iter().enumerate().filter(|(_, kind)| kind.devices > 0) {
            let cut = best_cut(&wanted, kind, |k| {
                let w = &wanted[k];
                let prices = programme.prices();
                prices[class(k)]
                    - prices[row(i, CPU)] * w.cpu as f64 / 1000.0
                    - prices[row(i, MEMORY)] * w.memory as f64 / GIB
            });
            let column = column(i, 1.0, &cut);
            if programme.gain(&column) > 1e-7 {
                fresh.push(column);
            }
        }
        if fresh.is_empty() || pivots >= PIVOTS_MAX {
            break;
        }
        fresh.into_iter().for_each(|column| programme.add(column));
    }
    let prices = programme.prices();
    let devices: f64 = kinds.iter().map(|kind| (kind.nodes * kind.devices) as f64).sum();
    let paid = kinds
        .iter()
        .enumerate()
        .map(|(i, kind)| prices[row(i, DEVICES)] * (kind.nodes * kind.devices) as f64);
    let device = paid.sum::<f64>() / devices.max(1.0);
    let mut worth = BTreeMap::new();
    for (k, w) in wanted.iter().enumerate().filter(|(_, w)| w.is_share()) {
        // Where devices are not what the fleet runs out of, a share is worth itself.
        let (price, scarce) = (prices[class(k)], device > 1e-6 * prices[class(k)] && device > 0.0);
        let price = if scarce { (price / device * 1000.0).round() as i64 } else { w.milli as i64 };
        let known: &mut i64 = worth.entry((w.cpu, w.milli)).or_default();
        *known = price.clamp(0, 1000).max(*known);
    }
    worth
}

fn kinds(rooms: &[Room]) -> Vec<Kind> {
    let mut kinds: BTreeMap<(u64, u64, usize), usize> = BTreeMap::new();
    for room in rooms {
        let devices = room.devices.iter().filter(|device| device.usable).count();
        *kinds.entry((room.size.cpu_milli, room.size.memory_bytes, devices)).or_default() += 1;
    }
    kinds.into_iter().map(|((cpu, memory, devices), nodes)| Kind { cpu, memory, devices, nodes }).collect()
}

fn wanted(demand: &Demand, kinds: &[Kind]) -> Vec<Wanted> {
    let mut counts: BTreeMap<(u64, u64, usize, usize), u64> = BTreeMap::new();
    for (shape, count) in demand {
        let key = (shape.cpu_milli, shape.memory_bytes, shape.gpus, shape.gpu_milli as usize);
        *counts.entry(key).or_default() += count;
    }
    let all = counts.into_iter().map(|((cpu, memory, devices, milli), count)| Wanted {
        cpu,
        memory,
        devices,
        milli,
        count,
    });
    all.filter(|w| kinds.iter().any(|kind| w.fits(kind))).collect()
}

/// The most valuable way to cut one device: how many of which class.
fn best_cut(wanted: &[Wanted], kind: &Kind, value: impl Fn(usize) -> f64) -> Vec<(usize, f64)> {
    let shares: Vec<(usize, usize, f64)> = wanted
        .iter()
        .enumerate()
        .filter(|(_, w)| w.is_share() && w.fits(kind))
        .map(|(k, w)| (k, (w.milli / STEP).max(1), value(k)))
        .filter(|(_, _, value)| *value > 0.0)
        .collect();
    let mut best = [0.0_f64; STEPS + 1];
    let mut choice = [None; STEPS + 1];
    for size in 1..=STEPS {
        best[size] = best[size - 1];
        for (i, (_, steps, value)) in shares.iter().enumerate().filter(|(_, (_, steps, _))| *steps <= size) {
            let total = value + best[size - steps];
            if total > best[size] + 1e-12 {
                best[size] = total;
                choice[size] = Some(i);
            }
        }
    }
    let mut counts: BTreeMap<usize, f64> = BTreeMap::new();
    let mut size = STEPS;
    while size > 0 {
        match choice[size] {
            Some(i) => {
                let (k, steps, _) = shares[i];
                *counts.entry(k).or_default() += 1.0;
                size -= steps;
            }
            None => size -= 1,
        }
    }
    counts.into_iter().collect()
}
