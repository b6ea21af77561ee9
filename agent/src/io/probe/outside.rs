//! What the machine's other programs use, so that no pod is promised it: a build, a desktop's game, another cluster's
//! work. Told in steps and as the most of the last minute, for each step is news to the controller.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;

use berth_protocol::resources::Gpu;
use berth_protocol::units::{Bytes, MilliCpu};

use super::super::usage::{PodUsage, pod_usage};

/// Control groups of all pods of this machine, whichever agent's.
const PODS: &str = "berth";
/// Processor time yields: who builds for half a minute takes no core away, who plays for an evening does.
const CPU_MEAN_S: f64 = 300.0;
const CPU_STEP: u64 = 500;
const MEMORY_STEP: u64 = 256 * Bytes::MIB;
/// A desktop holds some of its GPU at all times: less than an eighth is nobody's loss.
const GPU_PARTS: u64 = 8;
/// The last minute, in spans of ten seconds: heartbeats come sooner where something waits.
const SPANS: usize = 6;
const SPAN_S: f64 = 10.0;

/// The most of each of the last spans.
#[derive(Debug, Default)]
struct Peak(VecDeque<u64>);

impl Peak {
    fn of(&mut self, value: u64, new_span: bool) -> u64 {
        match self.0.front_mut() {
            Some(newest) if !new_span => *newest = value.max(*newest),
            _ => {
                self.0.truncate(SPANS - 1);
                self.0.push_front(value);
            }
        }
        self.0.iter().copied().max().unwrap_or(value)
    }
}

#[derive(Debug, Default)]
pub struct Outside {
    /// Of the newest span so far, and whether it began at this sample.
    span_s: f64,
    new_span: bool,
    /// Of all pods, at the last sample.
    pods_cpu_usec: Option<u64>,
    cpu_mean: f64,
    cpu: Peak,
    memory: Peak,
    gpus: BTreeMap<String, Peak>,
}

impl Outside {
    /// What others use now; `cpu` and `memory` are of the whole machine, the former as a mean of `seconds`.
    pub fn take(&mut self, seconds: f64, cpu: MilliCpu, memory: Bytes) -> (MilliCpu, Bytes) {
        self.less(pod_usage(Path::new(PODS)).unwrap_or_default(), seconds, cpu, memory)
    }

    /// `memory` is what the machine could not make available: of the pods' that is what no file backs.
    fn less(&mut self, pods: PodUsage, seconds: f64, cpu: MilliCpu, memory: Bytes) -> (MilliCpu, Bytes) {
        self.span_s += seconds;
        self.new_span = self.span_s >= SPAN_S;
        if self.new_span {
            self.span_s = 0.0;
        }
        let before = self.pods_cpu_usec.replace(pods.cpu_usec);
        if let Some(before) = before.filter(|_| seconds > 0.0) {
            let pods = pods.cpu_usec.saturating_sub(before) as f64 / 1000.0 / seconds;
            let theirs = (cpu.0 as f64 - pods).max(0.0);
            let weight = 1.0 - (-seconds / CPU_MEAN_S).exp();
            self.cpu_mean += (theirs - self.cpu_mean) * weight;
        }
        let cpu = self.cpu.of(self.cpu_mean as u64 / CPU_STEP * CPU_STEP, self.new_span);
        let memory = memory.0.saturating_sub(pods.anonymous.0).next_multiple_of(MEMORY_STEP);
        (MilliCpu(cpu), Bytes(self.memory.of(memory, self.new_span)))
    }

    /// Puts into steps what others hold of the device; after `take`, of the same sample.
    pub fn settle(&mut self, gpu: &mut Gpu) {
        let step = (gpu.memory.0 / GPU_PARTS).max(1);
        let theirs = gpu.outside.0 / step * step;
        let peak = self.gpus.entry(gpu.uuid.clone()).or_default();
        gpu.outside = Bytes(peak.of(theirs, self.new_span));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn pods(cpu_usec: u64, memory: u64) -> PodUsage {
        PodUsage { cpu_usec, anonymous: Bytes(memory), ..PodUsage::default() }
    }

    #[test]
    fn memory_is_taken_at_once_and_given_back_after_a_minute() {
        let mut outside = Outside::default();
        let mut at = |used: u64| outside.less(pods(0, GIB), 10.0, MilliCpu(0), Bytes(used)).1.0;
        assert_eq!(at(3 * GIB), 2 * GIB, "what pods use is not others'");
        assert_eq!(at(3 * GIB + 1), 2 * GIB + MEMORY_STEP);
        assert_eq!(at(GIB / 2), 2 * GIB + MEMORY_STEP);
        let after: Vec<u64> = (0..5).map(|_| at(GIB / 2)).collect();
        assert_eq!((after[3], after[4]), (2 * GIB + MEMORY_STEP, 0));
        // A minute is one however often it is looked.
        let mut outside = Outside::default();
        let mut at = |used: u64| outside.less(pods(0, 0), 2.0, MilliCpu(0), Bytes(used)).1.0;
        assert_eq!(at(GIB), GIB);
        let after: Vec<u64> = (0..40).map(|_| at(0)).collect();
        assert_eq!((after[23], after[34]), (GIB, 0));
    }

    #[test]
    fn a_build_takes_no_core_and_an_evening_does() {
        let mut outside = Outside::default();
        let mut used = 0;
        let mut hold = |outside: &mut Outside, seconds: u64, all: u64, pods_milli: u64| {
            let mut told = 0;
            for _ in 0..seconds / 10 {
                used += pods_milli * 10_000;
                told = outside.less(pods(used, 0), 10.0, MilliCpu(all), Bytes(0)).0.0;
            }
            told
        };
        assert_eq!(hold(&mut outside, 60, 4_000, 4_000), 0, "the pods' own");
        assert_eq!(hold(&mut outside, 30, 2_000, 0), 0);
        assert_eq!(hold(&mut outside, 3_600, 2_100, 0), 2_000);
        assert_eq!(hold(&mut outside, 3_600, 0, 0), 0);
    }

    #[test]
    fn a_desktop_is_nobodys_loss_and_a_game_is() {
        let mut outside = Outside::default();
        let mut gpu = Gpu {
            uuid: "g".to_owned(),
            vendor: berth_protocol::resources::GpuVendor::Nvidia,
            model: "m".to_owned(),
            memory: Bytes(16 * GIB),
            pci: None,
            unhealthy: None,
            mig: false,
            outside: Bytes(GIB),
        };
        outside.settle(&mut gpu);
        assert_eq!((gpu.outside, gpu.milli()), (Bytes::ZERO, 1000));
        gpu.outside = Bytes(7 * GIB);
        outside.settle(&mut gpu);
        assert_eq!((gpu.outside, gpu.milli()), (Bytes(6 * GIB), 625));
    }
}
