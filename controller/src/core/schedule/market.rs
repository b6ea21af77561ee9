//! When the prices of room are made anew, and from what: the shapes that were placed of late and those that wait, and
//! the rooms as they would be empty. Counts and compares; the sums are `prices`', made outside the controller's loop.

use std::sync::Arc;

use berth_protocol::units::{BootMs, Millis};

use super::super::timers::Timer;
use super::super::{Controller, Effect, Now};
use super::prices::{Demand, Prices};
use super::problem::{Room, Shape};

/// Placed pods that count in full; those before them count for half, a quarter, and so on.
const WINDOW: u64 = 4096;
/// Different shapes that are counted.
const SHAPES_MAX: usize = 1024;
/// Of those, the most frequent ones, which prices are made from.
const QUOTED_MAX: usize = 256;
/// Waiting jobs whose pods count, the longest waiting.
const WAITING_JOBS_MAX: usize = 4096;
/// The mix of shapes is looked at this often at most.
const LOOK_PAUSE: Millis = Millis(2_000);
/// Prices are made anew when so much of what pods ask for, or of the rooms, is another.
const CHANGED_PERCENT: u128 = 10;
/// Prices that were asked for and did not come within this time are asked for again.
const PATIENCE: Millis = Millis(60_000);

/// What prices are made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quote {
    demand: Demand,
    /// Empty.
    rooms: Arc<Vec<Room>>,
}

impl Quote {
    /// Some tenths of a second of work at most; a pure function of the quote.
    pub fn prices(&self) -> Prices {
        let rooms: Vec<Room> = self.rooms.iter().filter(|room| room.open).cloned().collect();
        // What no room could ever take needs no room kept for it.
        let fits = |shape: &Shape| rooms.iter().any(|room| room.fit(shape).is_some());
        let demand = self.demand.iter().filter(|(shape, _)| fits(shape));
        Prices::new(&demand.map(|(shape, count)| (shape.clone(), *count)).collect(), &rooms)
    }
}

/// What was asked for of late.
#[derive(Debug, Default)]
pub struct Market {
    placed: Demand,
    /// Of all of them.
    total: u64,
    /// A pod was placed, a job waits, or a room is another since the last look.
    stirred: bool,
    looked_at: Option<BootMs>,
    /// The mix from which the prices in use, or under way, were made.
    priced: Demand,
    /// Rooms that changed since then, empty as they are.
    rooms_changed: usize,
    /// Since when prices are under way.
    asked_at: Option<BootMs>,
}

impl Market {
    pub fn placed(&mut self, shape: &Shape) {
        *self.placed.entry(shape.clone()).or_default() += 1;
        self.total += 1;
        self.stirred = true;
        while self.total >= 2 * WINDOW || self.placed.len() > SHAPES_MAX {
            self.placed.values_mut().for_each(|count| *count /= 2);
            self.placed.retain(|_, count| *count > 0);
            self.total = self.placed.values().sum();
        }
    }

    pub fn stir(&mut self) {
        self.stirred = true;
    }

    pub fn room_changed(&mut self) {
        self.rooms_changed += 1;
        self.stirred = true;
    }

    /// The prices are there.
    pub fn settled(&mut self) {
        self.asked_at = None;
    }

    /// When the next look is due; none: nothing has changed.
    fn due(&self) -> Option<BootMs> {
        let rested = self.looked_at.map_or(BootMs(0), |at| at.plus(LOOK_PAUSE));
        let answered = self.asked_at.map_or(BootMs(0), |at| at.plus(PATIENCE));
        self.stirred.then_some(rested.max(answered))
    }

    /// Whether the mix and the rooms ask for new prices.
    fn look(&mut self, now: BootMs, mix: &Demand, rooms: usize) -> bool {
        (self.stirred, self.looked_at) = (false, Some(now));
        let devices = |shape: &Shape| shape.gpus as u64 * u64::from(shape.gpu_milli);
        let rooms_differ = self.rooms_changed as u128 * 100 > rooms as u128 * CHANGED_PERCENT;
        let wanted = mix.keys().any(|shape| shape.gpus > 0);
        let differs = wanted && rooms_differ
            || apart_percent(&self.priced, mix, |_| 1) > CHANGED_PERCENT
            || apart_percent(&self.priced, mix, devices) > CHANGED_PERCENT;
        if differs {
            (self.priced, self.rooms_changed, self.asked_at) = (mix.clone(), 0, Some(now));
        }
        differs
    }
}

/// How much of one mix is not in the other (their total variation), each pod weighing what `weight` says.
fn apart_percent(a: &Demand, b: &Demand, weight: impl Fn(&Shape) -> u64) -> u128 {
    let sum = |mix: &Demand| mix.iter().map(|(shape, n)| u128::from(n * weight(shape))).sum::<u128>();
    let (all_a, all_b) = (sum(a), sum(b));
    if all_a == 0 || all_b == 0 {
        return if all_a == all_b { 0 } else { 100 };
    }
    let part = |mix: &Demand, shape: &Shape| u128::from(mix.get(shape).copied().unwrap_or(0) * weight(shape));
    let apart: u128 = a
        .keys()
        .chain(b.keys().filter(|shape| !a.contains_key(shape)))
        .map(|shape| (part(a, shape) * all_b).abs_diff(part(b, shape) * all_a))
        .sum();
    apart * 50 / (all_a * all_b)
}

/// The most frequent shapes; of equally frequent ones the larger.
fn most_frequent(mix: Demand) -> Demand {
    if mix.len() <= QUOTED_MAX {
        return mix;
    }
    let mut all: Vec<(u64, Shape)> = mix.into_iter().map(|(shape, count)| (count, shape)).collect();
    all.sort_by(|a, b| b.cmp(a));
    all.truncate(QUOTED_MAX);
    all.into_iter().map(|(count, shape)| (shape, count)).collect()
}

impl Controller {
    /// After a start what runs stands for what was placed of late.
    pub(in crate::core) fn recall_shapes(&mut self) {
        for job in self.cluster.jobs.values().filter(|job| !job.placed().is_empty()) {
            let shape = self.scheduler.shape(&job.file.spec.pod.resources());
            job.placed().iter().take(WINDOW as usize).for_each(|_| self.scheduler.market.placed(&shape));
        }
    }

    /// Asks for new prices where what pods ask for has changed.
    pub(in crate::core) fn look_at_prices(&mut self, now: Now) {
        let Some(due) = self.scheduler.market.due() else { return };
        if due > now.boot {
            self.timers.arm(Timer::Prices, due);
            return;
        }
        let mut mix = self.scheduler.market.placed.clone();
        for (_, uid) in self.scheduler.queue.oldest(WAITING_JOBS_MAX) {
            let Some(job) = self.cluster.jobs.get(uid) else { continue };
            if let Some(class) = job.class.and_then(|id| self.scheduler.classes.get(id)) {
                let pods = job.ready().take(WINDOW as usize).count();
                *mix.entry(class.shape.clone()).or_default() += pods as u64;
            }
        }
        let rooms = self.scheduler.empty.clone();
        if self.scheduler.market.look(now.boot, &mix, rooms.len()) {
            self.effect(Effect::Price(Quote { demand: most_frequent(mix), rooms }));
        }
    }

    /// New prices: scores follow; whoever has a seat keeps it.
    pub(in crate::core) fn priced(&mut self, prices: Prices) {
        self.scheduler.market.settled();
        if self.scheduler.engine.adopt(prices) {
            self.counters.prices += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(milli: u32) -> Shape {
        Shape { cpu_milli: 1000, gpus: 1, gpu_milli: milli, ..Shape::default() }
    }

    #[test]
    fn a_mix_is_apart_by_pods_and_by_devices() {
        let mix = |counts: &[(u32, u64)]| counts.iter().map(|(milli, n)| (share(*milli), *n)).collect();
        let (a, b): (Demand, Demand) =
            (mix(&[(100, 90), (1000, 10)]), mix(&[(100, 900), (500, 20), (1000, 80)]));
        assert_eq!(apart_percent(&a, &a, |_| 1), 0);
        assert_eq!(apart_percent(&a, &b, |_| 1), 2);
        assert_eq!(apart_percent(&a, &Demand::new(), |_| 1), 100);
        assert_eq!(apart_percent(&Demand::new(), &Demand::new(), |_| 1), 0);
        // 9,000 and 10,000 against 90,000, 10,000 and 80,000 thousandths.
        assert_eq!(apart_percent(&a, &b, |shape| u64::from(shape.gpu_milli)), 8);
    }

    #[test]
    fn what_was_placed_long_ago_is_forgotten_and_the_count_is_bounded() {
        let mut market = Market::default();
        (0..3 * WINDOW).for_each(|_| market.placed(&share(100)));
        (0..2 * WINDOW).for_each(|_| market.placed(&share(200)));
        assert!(market.placed[&share(100)] < market.placed[&share(200)] / 2);
        (0..5000).for_each(|cpu| market.placed(&Shape { cpu_milli: cpu, ..Shape::default() }));
        assert!(market.placed.len() <= SHAPES_MAX && market.total < 2 * WINDOW);
        assert_eq!(market.total, market.placed.values().sum::<u64>());
    }

    #[test]
    fn prices_are_asked_for_when_the_mix_has_changed_and_not_again() {
        let mut market = Market::default();
        assert_eq!(market.due(), None, "nothing has happened");
        market.placed(&share(100));
        let mix = market.placed.clone();
        assert!(market.look(BootMs(5_000), &mix, 10));
        assert_eq!(market.due(), None);
        market.settled();
        market.placed(&share(100));
        assert_eq!(market.due(), Some(BootMs(7_000)));
        let mix = market.placed.clone();
        assert!(!market.look(BootMs(7_000), &mix, 10), "more of the same");
        market.room_changed();
        assert!(!market.look(BootMs(9_000), &mix, 10), "one room of ten");
        market.room_changed();
        assert!(market.look(BootMs(11_000), &mix, 10));
        market.stir();
        assert_eq!(market.due(), Some(BootMs(71_000)), "while prices are under way nobody asks for others");
    }
}
