//! Pods arrive one by one and stay, as in the replay of openb that the field compares by (Weng et al., USENIX ATC 2023):
//! the list shuffled, filled up to the load by rows drawn again, and a pod that fits nowhere dropped for good.

use std::collections::BTreeMap;

use crate::core::schedule::policy::Policy;
use crate::core::schedule::prices::Prices;
use crate::core::schedule::problem::{Room, Shape};

use super::fleet::Fleet;
use super::random::Random;
use super::stopwatch::Stopwatch;
use super::trace::Pod;

/// What the fleet has, and what a pod takes of it, in the unit that loads are measured in: thousandths of devices, or of
/// cores in a fleet without devices.
pub struct Measure {
    pub devices: bool,
    pub capacity: u64,
    pub cpu: u64,
    pub memory: u64,
}

impl Measure {
    pub fn new(rooms: &[Room]) -> Self {
        let devices: u64 = rooms.iter().map(|room| room.devices.len() as u64 * 1000).sum();
        let cpu = rooms.iter().map(|room| room.size.cpu_milli).sum();
        let memory = rooms.iter().map(|room| room.size.memory_bytes).sum();
        Self { devices: devices > 0, capacity: if devices > 0 { devices } else { cpu }, cpu, memory }
    }

    pub fn of(&self, shape: &Shape) -> u64 {
        if self.devices { shape.gpus as u64 * u64::from(shape.gpu_milli) } else { shape.cpu_milli }
    }
}

/// One event's state, in percent of the fleet.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    pub arrived: f64,
    pub devices: f64,
    pub cpu: f64,
    pub memory: f64,
}

pub struct Outcome {
    pub points: Vec<Point>,
    pub pods: usize,
    pub dropped: usize,
    pub moves: usize,
    pub decisions_per_second: f64,
    pub fill: Vec<f64>,
}

/// The order of arrival: indices into `pods`.
fn arrivals(pods: &[Pod], measure: &Measure, load: f64, random: &mut Random) -> Vec<usize> {
    let size: Vec<u64> = pods.iter().map(|pod| measure.of(&pod.shape)).collect();
    let target = (load * measure.capacity as f64) as u64;
    let mut order: Vec<usize> = (0..pods.len()).collect();
    random.shuffle(&mut order);
    let mut total: u64 = size.iter().sum();
    while total > target {
        total -= size[order.remove(random.below(order.len()))];
    }
    // Pods without a size of their own would come forever.
    if size.iter().any(|size| *size > 0) && order.len() == pods.len() {
        loop {
            let i = random.below(pods.len());
            // As the artefact does, it is one device's share that must not overshoot.
            let step = if measure.devices { u64::from(pods[i].shape.gpu_milli) } else { size[i] };
            if total + step > target {
                break;
            }
            total += size[i];
            order.push(i);
        }
    }
    order
}

pub fn replay(
    policy: Policy,
    rooms: &[Room],
    pods: &[Pod],
    prices: &Prices,
    load: f64,
    moves_max: usize,
    seed: u64,
) -> Outcome {
    let mut random = Random::new(seed);
    let measure = Measure::new(rooms);
    let order = arrivals(pods, &measure, load, &mut random);
    let mut rooms = rooms.to_vec();
    random.shuffle(&mut rooms);
    let mut fleet = Fleet::new(policy, seed, &rooms, prices, moves_max > 0);
    let (mut arrived, mut used, mut cpu, mut memory) = (0, 0, 0, 0);
    let (mut dropped, mut moves) = (0, 0);
    let mut points = Vec::with_capacity(order.len());
    // Shapes that no moves helped: nothing ends here, so they ask again only once something has moved.
    let mut hopeless: BTreeMap<&Shape, usize> = BTreeMap::new();
    let percent = |part: u64, whole: u64| part as f64 / whole.max(1) as f64 * 100.0;
    let watch = Stopwatch::start();
    for (pod, i) in order.iter().enumerate() {
        let shape = &pods[*i].shape;
        arrived += measure.of(shape);
        let mut seated = fleet.place(pod, shape);
        if !seated && moves_max > 0 && hopeless.get(shape) != Some(&moves) {
            match fleet.squeeze(pod, shape, moves_max) {
                Some(plan) => {
                    moves += plan.moves.len();
                    seated = true;
                }
                None => {
                    hopeless.insert(shape, moves);
                }
            }
        }
        if seated {
            used += measure.of(shape);
            cpu += shape.cpu_milli;
            memory += shape.memory_bytes;
        } else {
            dropped += 1;
        }
        points.push(Point {
            arrived: percent(arrived, measure.capacity),
            devices: percent(used, measure.capacity),
            cpu: percent(cpu, measure.cpu),
            memory: percent(memory, measure.memory),
        });
    }
    let seconds = watch.seconds();
    Outcome {
        pods: order.len(),
        dropped,
        moves,
        decisions_per_second: order.len() as f64 / seconds.max(1e-9),
        fill: fleet.fill(),
        points,
    }
}

/// The mean of what `of` tells over the events at which the arrived percentage rounds to `at`.
pub fn mean_at(points: &[Point], at: f64, of: impl Fn(&Point) -> f64) -> Option<f64> {
    let near = |most: f64| {
        let values: Vec<f64> =
            points.iter().filter(|p| (p.arrived.round() - at).abs() <= most).map(&of).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    near(0.0).or_else(|| near(1.0))
}
