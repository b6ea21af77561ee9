//! How good a seat is: a score from 1 to 101 for a pod of some shape in a room, the devices it would get there, and the
//! policies that judge it. Pure arithmetic.

use super::prices::{FINE, Prices};
use super::problem::Shape;

/// The weights of "bid", for every fleet the same.
const SLIVER: i64 = 8;
const SCARCITY_PERMILLE: i64 = 500;
const SPARED_CPU_PERMILLE: i64 = 100;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Policy {
    /// The gradient of fragments, less what slivers and scarce models cost.
    #[default]
    Bid,
    /// The gradient of fragments alone (Weng et al., Beware of Fragmentation, USENIX ATC 2023).
    Fgd,
    /// Least left over, CPU and devices alike.
    BestFit,
    /// Free amounts that point where the pod's do (Grandl et al., Multi-Resource Packing, SIGCOMM 2014).
    DotProduct,
    /// The first that fits.
    FirstFit,
    /// Any that fits.
    Random,
}

/// What a room has free, in the form that scores are computed from.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cell {
    pub cpu_milli: u64,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    /// Fragments now, in fine units.
    pub fragments: i64,
    /// Best value of what its devices have left, in thousandths of a device.
    pub value: i64,
    /// Of the log of changes.
    pub stamp: u64,
    pub room: u32,
    /// 0 where the room is closed.
    pub slots: u16,
    /// Free thousandths of all devices.
    pub devices_milli: u32,
    pub whole: u8,
    pub model: u16,
    /// Thousandths of devices per core of the empty room.
    pub devices_per_core: u32,
}

const GRADIENT_MAX: i64 = 8_000;

/// `⌊100 σ(d/1000)⌋ + 1` for each gradient d.
#[derive(Debug, Clone)]
pub struct Sigmoid(Vec<u8>);

impl Default for Sigmoid {
    fn default() -> Self {
        let reached: Vec<i64> = (1..100)
            .map(|score| {
                let odds = f64::from(score) / f64::from(100 - score);
                (1000.0 * odds.ln()).round() as i64
            })
            .collect();
        let level = |d| reached.partition_point(|least| *least <= d) as u8 + 1;
        Self((-GRADIENT_MAX..=GRADIENT_MAX).map(level).collect())
    }
}

impl Sigmoid {
    #[inline]
    fn of(&self, fine: i64) -> u8 {
        let d = (fine >> FINE).clamp(-GRADIENT_MAX, GRADIENT_MAX);
        self.0[(d + GRADIENT_MAX) as usize]
    }
}

/// What of a shape is the same for every room.
#[derive(Debug, Clone)]
pub struct Class {
    pub shape: Shape,
    pub worth: i64,
}

/// A seat's score, and the device of a pod that shares one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    pub score: u8,
    pub device: usize,
}

/// Fragments of a room: the expected thousandths of its devices that the next pod cannot use, in fine units.
pub fn fragments(prices: &Prices, cell: &Cell, remainders: &[u16]) -> i64 {
    let view = prices.of(usize::from(cell.model), prices.cpu_rank(cell.cpu_milli));
    let usable: i64 = remainders.iter().map(|r| view.usable(usize::from(*r))).sum();
    (i64::from(cell.devices_milli) << FINE) - usable - view.together(usize::from(cell.whole))
}

/// Best value of what a room's devices have left, for pods that its free CPU can bear.
pub fn value(prices: &Prices, cell: &Cell, remainders: &[u16]) -> i64 {
    let view = prices.of(usize::from(cell.model), prices.cpu_rank(cell.cpu_milli));
    remainders.iter().map(|r| view.value(usize::from(*r))).sum()
}

impl Policy {
    /// Scores a seat in a room that has CPU, memory, disk and a slot for it; `fitting` are the devices that would do.
    pub fn judge(
        self,
        prices: &Prices,
        sigmoid: &Sigmoid,
        class: &Class,
        cell: &Cell,
        remainders: &[u16],
        fitting: u64,
    ) -> Verdict {
        let least = || {
            let devices = (0..remainders.len()).filter(|i| fitting >> i & 1 == 1);
            devices.min_by_key(|i| (remainders[*i], *i)).unwrap_or(0)
        };
        match self {
            Self::FirstFit | Self::Random => Verdict { score: 1, device: least() },
            Self::BestFit => {
                let left = u64::from(cell.devices_milli)
                    - class.shape.gpus as u64 * u64::from(class.shape.gpu_milli);
                let cpu = cell.cpu_milli - class.shape.cpu_milli;
                // The artefact's own yardstick: 128 cores and 8 devices.
                let full = 100_i64 - (50 * cpu / 128_000 + 50 * left / 8_000) as i64;
                Verdict { score: full.clamp(0, 100) as u8 + 1, device: least() }
            }
            Self::DotProduct => {
                // Fractions of the same yardstick, in thousandths; the artefact takes the smallest product.
                let cpu = cell.cpu_milli * class.shape.cpu_milli / (128 * 128_000);
                let taken = class.shape.gpus as u64 * u64::from(class.shape.gpu_milli);
                let devices = u64::from(cell.devices_milli) * taken / (8 * 8_000);
                let apart = 100_i64 - ((cpu + devices) / 20) as i64;
                Verdict { score: apart.clamp(0, 100) as u8 + 1, device: least() }
            }
            Self::Fgd | Self::Bid => {
                let (gradient, device) = self.gradient(prices, class, cell, remainders, fitting);
                Verdict { score: sigmoid.of(gradient), device }
            }
        }
    }

    fn gradient(
        self,
        prices: &Prices,
        class: &Class,
        cell: &Cell,
        remainders: &[u16],
        fitting: u64,
    ) -> (i64, usize) {
        let shape = &class.shape;
        let model = usize::from(cell.model);
        let rank = prices.cpu_rank(cell.cpu_milli - shape.cpu_milli);
        let (view, whole) = (prices.of(model, rank), usize::from(cell.whole));
        let usable: i64 = remainders.iter().map(|r| view.usable(usize::from(*r))).sum();
        let taken = shape.gpus as i64 * i64::from(shape.gpu_milli);
        let left = (i64::from(cell.devices_milli) - taken) << FINE;
        // What is lost whichever device the pod gets; what it may lose besides is negative from here on.
        let mut gain = cell.fragments - left;
        let bid = self == Self::Bid && !remainders.is_empty();
        let value: i64 = if bid { remainders.iter().map(|r| view.value(usize::from(*r))).sum() } else { 0 };
        if bid {
            let scarce = prices.scarcity(model) * taken * SCARCITY_PERMILLE / 1_000;
            let spared = match shape.gpus {
                0 => shape.cpu_milli as i64 * i64::from(cell.devices_per_core) * SPARED_CPU_PERMILLE / 1_000,
                _ => 0,
            };
            gain -= ((scarce + spared) << FINE) / 1_000;
            gain += (SLIVER * (value + class.worth - cell.value)) << FINE;
        }
        if shape.gpus == 0 {
            return (gain + usable + view.together(whole), 0);
        }
        let milli = shape.gpu_milli as usize;
        if milli == 1000 {
            let n = shape.gpus as i64;
            if bid {
                gain -= (SLIVER * n * view.value(1000)) << FINE;
            }
            return (gain + usable - n * view.usable(1000) + view.together(whole - shape.gpus), 0);
        }
        let mut best = (i64::MIN, 0);
        let mut seen = 0;
        for (device, remainder) in remainders.iter().enumerate() {
            let r = usize::from(*remainder);
            // Equal remainders follow one another often; trying one twice only costs time.
            if fitting >> device & 1 == 0 || r == seen {
                continue;
            }
            seen = r;
            let mut gain = gain + usable - view.usable(r) + view.usable(r - milli);
            gain += view.together(whole - usize::from(r == 1000));
            if bid {
                gain -= (SLIVER * (view.value(r) - view.value(r - milli))) << FINE;
            }
            if gain > best.0 {
                best = (gain, device);
            }
        }
        best
    }
}
