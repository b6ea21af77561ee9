//! What nodes say of themselves, made fit to compute with: absurd inventories clamped, and what runs there outside
//! berth counted as used, so slowly that placement does not flap.

use std::collections::BTreeSet;

use berth_protocol::limits::{
    CPU_MILLI_MAX, GPUS_PER_NODE_MAX, LABEL_BYTES_MAX, LABELS_PER_NODE_MAX, MEMORY_BYTES_MAX,
};
use berth_protocol::resources::{Inventory, Usage};
use berth_protocol::units::{BootMs, Bytes, MilliCpu, Millis};

use super::problem::Room;

/// Less than this part of a node is noise.
const STEP_PARTS: u64 = 20;
/// Counted less only after it was less for this long.
const FALLS_AFTER: Millis = Millis(60_000);
/// A device that nobody of ours is on and whose memory is taken beyond this is somebody's.
const DEVICE_MEMORY_MIN: u64 = 1 << 30;

/// Makes an inventory one that can be; whether it was.
pub fn clamp(has: &mut Inventory) -> bool {
    let before = (has.gpus.len(), has.labels.len(), has.taints.len(), has.cpu, has.memory, has.disk);
    has.cpu = has.cpu.min(MilliCpu(CPU_MILLI_MAX));
    has.memory = has.memory.min(Bytes(MEMORY_BYTES_MAX));
    has.disk = has.disk.min(Bytes(MEMORY_BYTES_MAX));
    let mut seen = BTreeSet::new();
    has.gpus.retain(|gpu| seen.insert(gpu.uuid.clone()));
    has.gpus.truncate(GPUS_PER_NODE_MAX);
    let mut sane = true;
    for gpu in &mut has.gpus {
        sane &= gpu.memory.0 <= MEMORY_BYTES_MAX;
        gpu.memory = gpu.memory.min(Bytes(MEMORY_BYTES_MAX));
    }
    has.labels.retain(|key, value| key.len() <= LABEL_BYTES_MAX && value.len() <= LABEL_BYTES_MAX);
    while has.labels.len() > LABELS_PER_NODE_MAX {
        has.labels.pop_last();
    }
    while has.taints.len() > LABELS_PER_NODE_MAX {
        has.taints.pop_last();
    }
    sane && before == (has.gpus.len(), has.labels.len(), has.taints.len(), has.cpu, has.memory, has.disk)
}

/// One amount that others use, as it is counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Level {
    counted: u64,
    /// Since when it was less than counted, and the most it was since.
    less: Option<(BootMs, u64)>,
}

impl Level {
    /// Rises at once, falls once it was less for a while; steps of a part of the whole. Whether the count changed.
    fn hear(&mut self, now: BootMs, amount: u64, whole: u64) -> bool {
        let step = (whole / STEP_PARTS).max(1);
        let amount = if amount < step { 0 } else { amount.min(whole).div_ceil(step) * step };
        if amount >= self.counted {
            self.less = None;
            return std::mem::replace(&mut self.counted, amount) != amount;
        }
        let (since, most) = self.less.unwrap_or((now, amount));
        let most = most.max(amount);
        self.less = Some((since, most));
        if now.since(since) < FALLS_AFTER {
            return false;
        }
        (self.counted, self.less) = (most, None);
        true
    }
}

/// What others use of one node.
#[derive(Debug, Clone, Default)]
pub struct Outside {
    cpu: Level,
    memory: Level,
    /// By device, in the inventory's order: taken by others, and since when it is not.
    devices: Vec<Level>,
}

impl Outside {
    /// Takes a heartbeat's usage in; `ours` says which devices pods are on. Whether what is counted changed.
    pub fn hear(&mut self, now: BootMs, has: &Inventory, usage: &Usage, ours: &BTreeSet<String>) -> bool {
        let mut changed = self.cpu.hear(now, usage.outside.cpu.0, has.cpu.0);
        changed |= self.memory.hear(now, usage.outside.memory.0, has.memory.0);
        self.devices.resize(has.gpus.len(), Level::default());
        for (level, gpu) in self.devices.iter_mut().zip(&has.gpus) {
            let used = usage.gpus.iter().find(|used| used.uuid == gpu.uuid);
            let taken = used.is_some_and(|used| used.memory.0 > DEVICE_MEMORY_MIN) && !ours.contains(&gpu.uuid);
            // Once a pod of ours is on it, who uses what of it is not known.
            if !ours.contains(&gpu.uuid) {
                changed |= level.hear(now, u64::from(taken) * 1000, 1000);
            }
        }
        changed
    }

    /// What others use is not free.
    pub fn take(&self, room: &mut Room) {
        room.cpu_milli = room.cpu_milli.saturating_sub(self.cpu.counted);
        room.memory_bytes = room.memory_bytes.saturating_sub(self.memory.counted);
        for (device, level) in room.devices.iter_mut().zip(&self.devices) {
            if level.counted > 0 {
                device.milli = 0;
            }
        }
    }

    /// Cores and memory, for words; none: nothing counts.
    pub fn words(&self) -> Option<String> {
        let devices = self.devices.iter().filter(|level| level.counted > 0).count();
        let mut parts = Vec::new();
        if self.cpu.counted > 0 {
            parts.push(format!("{} cores", MilliCpu(self.cpu.counted)));
        }
        if self.memory.counted > 0 {
            parts.push(format!("{} of memory", Bytes(self.memory.counted >> 20 << 20)));
        }
        if devices > 0 {
            parts.push(format!("{devices} GPUs"));
        }
        (!parts.is_empty()).then(|| format!("others on this machine use {}", parts.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_at_once_and_falls_slowly() {
        let mut level = Level::default();
        let mut hear = |secs: u64, amount: u64| {
            let changed = level.hear(BootMs(secs * 1000), amount, 8000);
            (changed, level.counted)
        };
        assert_eq!(hear(0, 100), (false, 0), "noise");
        assert_eq!(hear(10, 3900), (true, 4000));
        assert_eq!(hear(20, 3700), (false, 4000), "a step less");
        for secs in 30..80 {
            assert_eq!(hear(secs, if secs % 7 == 0 { 1900 } else { 100 }), (false, 4000), "{secs}");
        }
        assert_eq!(hear(81, 0), (true, 4000).min((true, 3800)), "to the most it was meanwhile");
        assert_eq!(hear(82, 7999), (true, 8000), "up at once");
        assert_eq!(hear(83, 1 << 60), (false, 8000), "no more than there is");
    }
}
