//! What room is worth: tables made from the shapes that pods have and the fleet that they meet. Pure arithmetic, made
//! anew in the background; a scheduler goes on with its old prices meanwhile.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::cutting;
use super::problem::{Room, Shape};

/// The unit of fragments and scores: 2^-16 of a thousandth of a device.
pub const FINE: u32 = 16;
/// A whole device.
const WHOLE: usize = 1000;
/// Remainders are valued in steps of this many thousandths.
const STEP: usize = 10;
const STEPS: usize = WHOLE / STEP + 1;
/// Shapes count until they cover this share of the pods, in percent; the rest are noise.
const COVERED_PERCENT: u64 = 95;

/// How often pods of each shape have come of late.
pub type Demand = BTreeMap<Shape, u64>;

/// What the fleet has of one device model.
#[derive(Debug, Clone, Default)]
struct Stock {
    devices: u64,
    wanted: f64,
}

/// The tables that scores are read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prices {
    /// CPU of the typical shapes that want devices, ascending: how many of them a node's free CPU reaches is its rank.
    cpus: Vec<u64>,
    /// Shares of the typical shapes, ascending.
    shares: Vec<usize>,
    /// For each remainder of a device the number of shares that it can hold.
    share_rank: Vec<u8>,
    /// By device model; the last for models that no price knows.
    models: Vec<Table>,
    /// `[cpu rank][remainder / STEP]`: the best value of a remainder among pods of at most that CPU, in thousandths of
    /// a device.
    value: Vec<i32>,
    /// What a pod of a share is worth, in thousandths of a device.
    worth: BTreeMap<(u64, usize), i64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Table {
    /// `[cpu rank][share rank]`: the probability that a pod wants one device, at most that share and that CPU.
    single: Vec<i64>,
    /// `[cpu rank][n]`: that a pod wants several devices, at most n.
    several: Vec<i64>,
    /// Demand bound to the model over its capacity, in thousandths.
    scarcity: i64,
}

const SEVERAL: usize = 64 + 1;

struct Typical<'a> {
    shape: &'a Shape,
    probability: f64,
}

/// The most frequent shapes; of equally frequent ones those with more CPU first.
fn typical(demand: &Demand) -> Vec<Typical<'_>> {
    // Memory is no part of a typical shape: those that differ in it alone are one.
    let mut merged: BTreeMap<(u64, usize, u32, &Option<_>), (u64, &Shape)> = BTreeMap::new();
    for (shape, count) in demand {
        let key = (shape.cpu_milli, shape.gpus, shape.gpu_milli, &shape.models);
        merged.entry(key).or_insert((0, shape)).0 += count;
    }
    let mut shapes: Vec<(u64, &Shape)> = merged.into_values().collect();
    shapes.sort_by_key(|(count, shape)| Reverse((*count, shape.cpu_milli, shape.gpu_milli)));
    let total: u64 = shapes.iter().map(|(count, _)| count).sum();
    let mut covered = 0;
    let kept = shapes.into_iter().take_while(|(count, _)| {
        let more = covered * 100 < COVERED_PERCENT * total;
        covered += if more { *count } else { 0 };
        more
    });
    let kept: Vec<(u64, &Shape)> = kept.collect();
    kept.into_iter()
        .map(|(count, shape)| Typical { shape, probability: count as f64 / covered as f64 })
        .collect()
}

impl Prices {
    pub fn new(demand: &Demand, rooms: &[Room]) -> Self {
        let typical = typical(demand);
        let wanting = || typical.iter().filter(|t| t.shape.gpus > 0);
        let mut cpus: Vec<u64> = wanting().map(|t| t.shape.cpu_milli).collect();
        cpus.sort_unstable();
        cpus.dedup();
        let mut shares: Vec<usize> =
            wanting().filter(|t| t.shape.gpus == 1).map(|t| t.shape.gpu_milli as usize).collect();
        shares.sort_unstable();
        shares.dedup();
        let share_rank = (0..=WHOLE).map(|r| shares.partition_point(|share| *share <= r) as u8).collect();
        let stock = stock(demand, rooms);
        let worth = cutting::worth(demand, rooms);
        let ranks = std::iter::once(None).chain(cpus.iter().map(Some));
        let value = ranks.flat_map(|cpu| value(&worth, cpu.copied())).collect();
        let mut prices = Self { cpus, shares, share_rank, models: Vec::new(), value, worth };
        prices.models =
            (0..=stock.len()).map(|model| prices.table(model, stock.get(model), &typical)).collect();
        prices
    }

    fn table(&self, model: usize, stock: Option<&Stock>, typical: &[Typical<'_>]) -> Table {
        let width = self.shares.len() + 1;
        let ranks = self.cpus.len() + 1;
        let mut single = vec![0.0; ranks * width];
        let mut several = vec![0.0; ranks * SEVERAL];
        for t in typical.iter().filter(|t| t.shape.gpus > 0) {
            if t.shape.models.as_ref().is_some_and(|models| !models.contains(&model)) {
                continue;
            }
            let cpu = self.cpu_rank(t.shape.cpu_milli);
            for rank in cpu..ranks {
                if t.shape.gpus == 1 {
                    let share = usize::from(self.share_rank[t.shape.gpu_milli as usize]);
                    for cell in &mut single[rank * width + share..(rank + 1) * width] {
                        *cell += t.probability;
                    }
                } else {
                    for cell in
                        &mut several[rank * SEVERAL + t.shape.gpus.min(SEVERAL - 1)..(rank + 1) * SEVERAL]
                    {
                        *cell += t.probability;
                    }
                }
            }
        }
        let fine =
            |values: Vec<f64>| values.into_iter().map(|p| (p * f64::from(1u32 << FINE)) as i64).collect();
        let scarcity = stock.map_or(0.0, |stock| stock.wanted / (stock.devices.max(1) as f64));
        Table { single: fine(single), several: fine(several), scarcity: (scarcity * 1000.0) as i64 }
    }

    /// How many CPU steps `cpu_milli` reaches.
    #[inline]
    pub fn cpu_rank(&self, cpu_milli: u64) -> usize {
        self.cpus.partition_point(|cpu| *cpu <= cpu_milli)
    }

    #[inline]
    pub fn of(&self, model: usize, cpu_rank: usize) -> View<'_> {
        let table = &self.models[model.min(self.models.len() - 1)];
        let width = self.shares.len() + 1;
        View {
            single: &table.single[cpu_rank * width..(cpu_rank + 1) * width],
            several: &table.several[cpu_rank * SEVERAL..(cpu_rank + 1) * SEVERAL],
            share_rank: &self.share_rank,
            value: &self.value[cpu_rank * STEPS..(cpu_rank + 1) * STEPS],
        }
    }

    pub fn scarcity(&self, model: usize) -> i64 {
        self.models[model.min(self.models.len() - 1)].scarcity
    }

    /// What a pod of `shape` is worth, in thousandths of a device; only shares have prices of their own.
    pub fn worth(&self, shape: &Shape) -> i64 {
        if shape.gpu_milli as usize == WHOLE || shape.gpus != 1 {
            return (WHOLE * shape.gpus) as i64;
        }
        self.worth.get(&(shape.cpu_milli, shape.gpu_milli as usize)).copied().unwrap_or(0)
    }
}

/// The tables for one model and one amount of free CPU.
#[derive(Clone, Copy)]
pub struct View<'a> {
    single: &'a [i64],
    several: &'a [i64],
    share_rank: &'a [u8],
    value: &'a [i32],
}

impl View<'_> {
    /// What pods that want one device could use of a remainder, in fine units.
    #[inline]
    pub fn usable(&self, remainder: usize) -> i64 {
        remainder as i64 * self.single[usize::from(self.share_rank[remainder])]
    }

    /// The best value of a remainder, in thousandths of a device.
    #[inline]
    pub fn value(&self, remainder: usize) -> i64 {
        i64::from(self.value[remainder / STEP])
    }

    /// What pods that want several devices could use of `whole` free ones.
    #[inline]
    pub fn together(&self, whole: usize) -> i64 {
        (WHOLE * whole) as i64 * self.several[whole]
    }
}

fn stock(demand: &Demand, rooms: &[Room]) -> Vec<Stock> {
    let mut stock: Vec<Stock> = Vec::new();
    let devices = rooms.iter().flat_map(|room| &room.devices).filter(|device| device.usable);
    for device in devices {
        if stock.len() <= device.model {
            stock.resize(device.model + 1, Stock::default());
        }
        stock[device.model].devices += 1;
    }
    let milli = |shape: &Shape| shape.gpus as f64 * f64::from(shape.gpu_milli);
    let total: f64 = demand.iter().map(|(shape, count)| *count as f64 * milli(shape)).sum();
    let capacity: u64 = stock.iter().map(|stock| stock.devices).sum();
    // Demand is scaled to what would just fill the fleet.
    let scale = if total > 0.0 { capacity as f64 / total } else { 0.0 };
    for (shape, count) in demand.iter().filter(|(shape, _)| shape.gpus > 0) {
        let Some(models) = &shape.models else { continue };
        let allowed: Vec<usize> = models.iter().copied().filter(|model| *model < stock.len()).collect();
        let devices: u64 = allowed.iter().map(|model| stock[*model].devices).sum();
        for model in allowed.iter().filter(|_| devices > 0) {
            let part = stock[*model].devices as f64 / devices as f64;
            stock[*model].wanted += *count as f64 * milli(shape) * scale * part;
        }
    }
    stock
}

/// The best knapsack of each remainder among shares of at most that CPU; a whole device is worth itself.
fn value(worth: &BTreeMap<(u64, usize), i64>, cpu: Option<u64>) -> Vec<i32> {
    let mut value = vec![0; STEPS];
    let Some(cpu) = cpu else { return value };
    let mut best: BTreeMap<usize, i64> = BTreeMap::new();
    for ((_, milli), worth) in worth.range(..=(cpu, WHOLE)) {
        let steps = milli.div_ceil(STEP).max(1);
        let known = best.entry(steps).or_default();
        *known = (*known).max(*worth);
    }
    for r in 1..STEPS {
        let with = best.range(..=r).map(|(steps, worth)| value[r - steps] + *worth as i32).max();
        value[r] = value[r - 1].max(with.unwrap_or(0));
    }
    value[STEPS - 1] = value[STEPS - 1].max(WHOLE as i32);
    value
}
