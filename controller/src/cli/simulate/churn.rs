//! Pods arrive at random, run for as long as the list says, and leave: what a busy fleet looks like after hours. Waiting
//! pods are served first come, first served, with backfill; those that wait too long are made room for by moves.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::core::schedule::policy::Policy;
use crate::core::schedule::prices::Prices;
use crate::core::schedule::problem::{Room, Shape};

use super::fleet::Fleet;
use super::random::Random;
use super::replay::Measure;
use super::stopwatch::Stopwatch;
use super::trace::Pod;

const HOUR: f64 = 3600.0;
const WARM_S: f64 = 4.0 * HOUR;
const HORIZON_S: f64 = 12.0 * HOUR;
/// Pods of the last hour may not have started yet; their waits do not count.
const JUDGED_S: f64 = HORIZON_S - HOUR;
const DURATION_S: (f64, f64) = (60.0, 6.0 * HOUR);
/// Waiting pods are looked at this often, and so many of them at a time.
const TICK_S: f64 = 30.0;
const TRIES_PER_TICK: usize = 20;
/// How long a pod of one device waits before others are moved for it; one of several devices does not wait.
const PATIENCE_S: f64 = 60.0;
/// Work that each move loses.
const PAUSE_S: f64 = 60.0;

#[derive(Debug, Clone, Default)]
pub struct Outcome {
    pub pods: usize,
    /// In percent, over time; net of what moves lost.
    pub allocated: f64,
    pub net: f64,
    /// What a fleet without bounds would have had allocated.
    pub offered: f64,
    pub cpu: f64,
    pub wait_s: f64,
    pub wait_share_s: f64,
    pub wait_several_s: f64,
    pub never_started: usize,
    pub moves: usize,
    pub decisions_per_second: f64,
    /// Time and percent allocated.
    pub points: Vec<(f64, f64)>,
    pub fill: Vec<f64>,
}

struct Churn<'a> {
    pods: &'a [Pod],
    /// By arrival: which pod of the list, and when.
    arrivals: Vec<(usize, f64)>,
    started: Vec<Option<f64>>,
    waiting: Vec<usize>,
    /// Ends, soonest first, in milliseconds.
    ends: BinaryHeap<Reverse<(u64, usize)>>,
    fleet: Fleet,
    measure: Measure,
    used: u64,
    cpu: u64,
    moves: usize,
    lost: f64,
    decisions: usize,
}

impl Churn<'_> {
    fn shape(&self, pod: usize) -> &Shape {
        &self.pods[self.arrivals[pod].0].shape
    }

    fn start(&mut self, pod: usize, now: f64) {
        let (size, cpu) = (self.measure.of(self.shape(pod)), self.shape(pod).cpu_milli);
        self.used += size;
        self.cpu += cpu;
        self.started[pod] = Some(now);
        let runs = self.pods[self.arrivals[pod].0].duration.unwrap_or(0.0).clamp(DURATION_S.0, DURATION_S.1);
        self.ends.push(Reverse((((now + runs) * 1000.0) as u64, pod)));
    }

    fn arrive(&mut self, pod: usize, now: f64, moves_max: usize) {
        self.decisions += 1;
        let shape = self.shape(pod).clone();
        if self.fleet.place(pod, &shape) || shape.gpus > 1 && self.squeeze(pod, &shape, now, moves_max) {
            self.start(pod, now);
        } else {
            self.waiting.push(pod);
        }
    }

    fn squeeze(&mut self, pod: usize, shape: &Shape, now: f64, moves_max: usize) -> bool {
        let plan = (moves_max > 0).then(|| self.fleet.squeeze(pod, shape, moves_max)).flatten();
        if let Some(plan) = &plan
            && now > WARM_S
        {
            self.moves += plan.moves.len();
            let moved = |step: &crate::core::schedule::moves::Move| self.measure.of(&step.shape) as f64;
            self.lost += plan.moves.iter().map(moved).sum::<f64>() * PAUSE_S;
        }
        plan.is_some()
    }

    fn end(&mut self, pod: usize, now: f64) {
        let shape = self.shape(pod).clone();
        self.used -= self.measure.of(&shape);
        self.cpu -= shape.cpu_milli;
        let Some(room) = self.fleet.remove(pod, &shape) else { return };
        let waiting = std::mem::take(&mut self.waiting);
        for pod in waiting {
            let shape = self.shape(pod).clone();
            if self.fleet.place_in(pod, &shape, room) {
                self.decisions += 1;
                self.start(pod, now);
            } else {
                self.waiting.push(pod);
            }
        }
    }

    fn tick(&mut self, now: f64, moves_max: usize) {
        let waiting = std::mem::take(&mut self.waiting);
        let mut tried: Vec<Shape> = Vec::new();
        for pod in waiting {
            let shape = self.shape(pod).clone();
            let patience = if shape.gpus > 1 { 0.0 } else { PATIENCE_S };
            let due = now - self.arrivals[pod].1 >= patience;
            if due && tried.len() < TRIES_PER_TICK && !tried.contains(&shape) {
                if self.squeeze(pod, &shape, now, moves_max) {
                    self.start(pod, now);
                    continue;
                }
                tried.push(shape);
            }
            self.waiting.push(pod);
        }
    }
}

/// `load` is the demand over the fleet's capacity.
pub fn churn(
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
    let runs = |pod: &Pod| pod.duration.unwrap_or(0.0).clamp(DURATION_S.0, DURATION_S.1);
    let mean =
        pods.iter().map(|pod| measure.of(&pod.shape) as f64 * runs(pod)).sum::<f64>() / pods.len() as f64;
    let between = mean / (load * measure.capacity as f64);
    let mut arrivals = Vec::new();
    let mut at = random.pause(between);
    while at < HORIZON_S {
        arrivals.push((random.below(pods.len()), at));
        at += random.pause(between);
    }
    let mut rooms = rooms.to_vec();
    random.shuffle(&mut rooms);
    let capacity = measure.capacity.max(1) as f64;
    let mut churn = Churn {
        pods,
        started: vec![None; arrivals.len()],
        arrivals,
        waiting: Vec::new(),
        ends: BinaryHeap::new(),
        fleet: Fleet::new(policy, seed, &rooms, prices, true),
        measure,
        used: 0,
        cpu: 0,
        moves: 0,
        lost: 0.0,
        decisions: 0,
    };
    let (mut now, mut next, mut ticks) = (0.0_f64, 0, TICK_S);
    let (mut area, mut cpu) = (0.0, 0.0);
    let mut points = Vec::new();
    let watch = Stopwatch::start();
    loop {
        let arrives = churn.arrivals.get(next).map_or(f64::INFINITY, |(_, at)| *at);
        let ends = churn.ends.peek().map_or(f64::INFINITY, |Reverse((ms, _))| *ms as f64 / 1000.0);
        let then = arrives.min(ends).min(ticks).min(HORIZON_S);
        let counted = (then - now.max(WARM_S)).max(0.0);
        area += churn.used as f64 * counted;
        cpu += churn.cpu as f64 * counted;
        now = then;
        if now >= HORIZON_S {
            break;
        }
        if now == ticks {
            churn.tick(now, moves_max);
            points.push((now, churn.used as f64 / capacity * 100.0));
            ticks += TICK_S;
        } else if ends <= arrives {
            if let Some(Reverse((_, pod))) = churn.ends.pop() {
                churn.end(pod, now);
            }
        } else {
            churn.arrive(next, now, moves_max);
            next += 1;
        }
    }
    let seconds = watch.seconds();
    let span = (HORIZON_S - WARM_S) * capacity / 100.0;
    let judged = |pod: &usize| (WARM_S..JUDGED_S).contains(&churn.arrivals[*pod].1);
    let wait = |of: &dyn Fn(&Shape) -> bool| {
        let pods: Vec<usize> =
            (0..churn.arrivals.len()).filter(judged).filter(|p| of(churn.shape(*p))).collect();
        let waited = |pod: &usize| churn.started[*pod].unwrap_or(HORIZON_S) - churn.arrivals[*pod].1;
        pods.iter().map(waited).sum::<f64>() / pods.len().max(1) as f64
    };
    let mut offered = 0.0;
    for (i, at) in &churn.arrivals {
        let during = (at + runs(&pods[*i])).min(HORIZON_S) - at.max(WARM_S);
        offered += churn.measure.of(&pods[*i].shape) as f64 * during.max(0.0);
    }
    Outcome {
        pods: churn.arrivals.len(),
        offered: offered / span,
        allocated: area / span,
        net: (area - churn.lost) / span,
        cpu: cpu / ((HORIZON_S - WARM_S) * churn.measure.cpu.max(1) as f64 / 100.0),
        wait_s: wait(&|_| true),
        wait_share_s: wait(&|shape| shape.gpus == 1 && shape.gpu_milli < 1000),
        wait_several_s: wait(&|shape| shape.gpus > 1),
        never_started: (0..churn.arrivals.len())
            .filter(judged)
            .filter(|p| churn.started[*p].is_none())
            .count(),
        moves: churn.moves,
        decisions_per_second: churn.decisions as f64 / seconds.max(1e-9),
        fill: churn.fleet.fill(),
        points,
    }
}
