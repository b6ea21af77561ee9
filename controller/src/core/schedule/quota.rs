//! What each namespace has, may have and should have: quotas, and shares by dominant resource (Ghodsi et al., Dominant
//! Resource Fairness, NSDI 2011). Sums only; who is served is `queue`'s.

use std::collections::BTreeMap;

use berth_protocol::ids::Namespace;
use berth_protocol::resources::Resources;
use berth_protocol::units::{Bytes, MilliCpu};

use super::super::cluster::Charge;
use super::problem::Room;

/// What a namespace is given by the controller's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowance {
    /// Its part beside the others'.
    pub weight: u32,
    pub cpu: Option<MilliCpu>,
    pub memory: Option<Bytes>,
    pub gpu_milli: Option<u64>,
    pub pods: Option<u64>,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { weight: 1, cpu: None, memory: None, gpu_milli: None, pods: None }
    }
}

/// Amounts of everything that is shared out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum {
    pub cpu: u64,
    pub memory: u64,
    pub gpu_milli: u64,
    pub pods: u64,
}

impl Sum {
    pub fn of_pods(wants: &Resources, pods: usize) -> Self {
        let gpu = wants.gpu.as_ref().map_or(0, |gpu| u64::from(gpu.count) * u64::from(gpu.milli));
        let n = pods as u64;
        Self {
            cpu: wants.cpu.0.saturating_mul(n),
            memory: wants.memory.0.saturating_mul(n),
            gpu_milli: gpu.saturating_mul(n),
            pods: n,
        }
    }

    pub(in crate::core) fn of_charge(charge: &Charge) -> Self {
        let gpu_milli = charge.gpus.iter().map(|share| u64::from(share.milli)).sum();
        Self { cpu: charge.cpu.0, memory: charge.memory.0, gpu_milli, pods: 1 }
    }

    pub fn of_room(room: &Room) -> Self {
        let gpu_milli =
            room.devices.iter().filter(|device| device.usable).map(|device| u64::from(device.milli)).sum();
        Self { cpu: room.cpu_milli, memory: room.memory_bytes, gpu_milli, pods: 0 }
    }

    fn each(self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            cpu: f(self.cpu, other.cpu),
            memory: f(self.memory, other.memory),
            gpu_milli: f(self.gpu_milli, other.gpu_milli),
            pods: f(self.pods, other.pods),
        }
    }

    pub fn plus(self, other: Self) -> Self {
        self.each(other, u64::saturating_add)
    }

    pub fn minus(self, other: Self) -> Self {
        self.each(other, u64::saturating_sub)
    }
}

/// A resource, its quota, what is used and what it would come to, and how amounts of it are written.
type Row = (&'static str, Option<u64>, u64, u64, fn(u64) -> String);

/// The whole of a share, in the unit that shares are compared in.
const WHOLE: u128 = 1 << 40;

/// Every namespace's use of the cluster.
#[derive(Debug, Default)]
pub struct Ledger {
    pub allowances: BTreeMap<Namespace, Allowance>,
    used: BTreeMap<Namespace, Sum>,
    /// All that open rooms have when empty.
    capacity: Sum,
}

impl Ledger {
    pub fn new(allowances: BTreeMap<Namespace, Allowance>) -> Self {
        Self { allowances, ..Self::default() }
    }

    pub fn allowance(&self, namespace: &Namespace) -> Allowance {
        self.allowances.get(namespace).cloned().unwrap_or_default()
    }

    pub fn used(&self, namespace: &Namespace) -> Sum {
        self.used.get(namespace).copied().unwrap_or_default()
    }

    pub fn take(&mut self, namespace: &Namespace, amount: Sum) {
        let used = self.used.entry(namespace.clone()).or_default();
        *used = used.plus(amount);
    }

    pub fn give_back(&mut self, namespace: &Namespace, amount: Sum) {
        let Some(used) = self.used.get_mut(namespace) else { return };
        *used = used.minus(amount);
        if *used == Sum::default() {
            self.used.remove(namespace);
        }
    }

    /// A room's size has changed.
    pub fn resize(&mut self, from: Sum, to: Sum) {
        self.capacity = self.capacity.minus(from).plus(to);
    }

    /// The largest part that the namespace has of any resource, by its weight.
    pub fn share(&self, namespace: &Namespace) -> u128 {
        let used = self.used(namespace);
        let part = |used: u64, of: u64| u128::from(used) * WHOLE / u128::from(of.max(1));
        let largest = part(used.cpu, self.capacity.cpu)
            .max(part(used.memory, self.capacity.memory))
            .max(part(used.gpu_milli, self.capacity.gpu_milli));
        let weight = self.allowances.get(namespace).map_or(1, |allowance| allowance.weight);
        largest / u128::from(weight.max(1))
    }

    /// What of the quota stands against `more`, in words; none: nothing.
    pub fn over_quota(&self, namespace: &Namespace, more: Sum) -> Option<String> {
        let allowance = self.allowances.get(namespace)?;
        let used = self.used(namespace);
        let sum = used.plus(more);
        let rows: [Row; 4] = [
            ("cores", allowance.cpu.map(|cpu| cpu.0), used.cpu, sum.cpu, |milli| MilliCpu(milli).to_string()),
            ("memory", allowance.memory.map(|memory| memory.0), used.memory, sum.memory, |n| {
                Bytes(n).to_string()
            }),
            ("GPUs", allowance.gpu_milli, used.gpu_milli, sum.gpu_milli, |milli| MilliCpu(milli).to_string()),
            ("pods", allowance.pods, used.pods, sum.pods, |n| n.to_string()),
        ];
        rows.into_iter().find_map(|(what, most, used, sum, show)| {
            let most = most.filter(|most| sum > *most)?;
            Some(format!(
                "the quota of namespace {namespace} is {} {what}, {} are in use and this asks for {} more",
                show(most),
                show(used),
                show(sum - used)
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(cpu: u64, memory: u64, gpu_milli: u64) -> Sum {
        Sum { cpu, memory, gpu_milli, pods: 1 }
    }

    fn ns(name: &str) -> Namespace {
        Namespace::parse(name).unwrap()
    }

    #[test]
    fn the_dominant_resource_counts_by_weight() {
        let mut ledger = Ledger::default();
        ledger.resize(Sum::default(), sum(9_000, 18, 0));
        // The paper's example: 3 tasks of (1, 4) against 2 of (3, 1) are two thirds each.
        for _ in 0..3 {
            ledger.take(&ns("a"), sum(1_000, 4, 0));
        }
        for _ in 0..2 {
            ledger.take(&ns("b"), sum(3_000, 1, 0));
        }
        assert_eq!(ledger.share(&ns("a")), ledger.share(&ns("b")));
        assert_eq!(ledger.share(&ns("a")), WHOLE * 2 / 3);
        ledger.allowances.insert(ns("b"), Allowance { weight: 2, ..Allowance::default() });
        assert_eq!(ledger.share(&ns("b")), WHOLE / 3);
        ledger.give_back(&ns("a"), sum(3_000, 12, 0));
        assert_eq!(ledger.share(&ns("c")), 0);
    }

    #[test]
    fn quotas_say_what_they_are_and_what_is_used() {
        let mut ledger = Ledger::default();
        let allowance = Allowance { cpu: Some(MilliCpu(4_000)), pods: Some(3), ..Allowance::default() };
        ledger.allowances.insert(ns("a"), allowance);
        assert_eq!(ledger.over_quota(&ns("b"), sum(1 << 40, 0, 0)), None);
        assert_eq!(ledger.over_quota(&ns("a"), sum(4_000, 0, 0)), None);
        ledger.take(&ns("a"), sum(2_500, 0, 0));
        assert_eq!(
            ledger.over_quota(&ns("a"), sum(2_000, 0, 0)).unwrap(),
            "the quota of namespace a is 4 cores, 2500m are in use and this asks for 2 more"
        );
        ledger.take(&ns("a"), Sum { pods: 2, ..Sum::default() });
        assert!(ledger.over_quota(&ns("a"), sum(1, 0, 0)).unwrap().contains("is 3 pods"));
    }
}
