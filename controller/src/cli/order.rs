//! Puts log records in order: each pod's epochs one behind the other, each record once. Pure.
//!
//! Records come live, doubled and with gaps, or from the depot; what an epoch holds in all is known once it has
//! ended. A record is released when everything before it was.

use std::collections::BTreeMap;

use berth_protocol::ids::{ContainerName, Epoch, PodName};
use berth_protocol::log::Stream;
use berth_protocol::message::query::LogPosition;
use berth_protocol::units::Timestamp;

/// Records that wait for one before them; more are refused, to be asked for again.
const WAITING_BYTES_MAX: usize = 16 << 20;

/// Epochs whose position goes into one question.
const POSITIONS_MAX: usize = 256;

/// A record on its way to the terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub pod: PodName,
    pub epoch: Epoch,
    pub seq: u64,
    /// When it was written, or (live) when it came.
    pub at: Timestamp,
    pub container: ContainerName,
    pub stream: Stream,
    pub bytes: Vec<u8>,
}

#[derive(Debug, Default)]
pub struct Order {
    pods: BTreeMap<PodName, Pod>,
    waiting_bytes: usize,
}

#[derive(Debug, Default)]
struct Pod {
    /// Epochs up to this one are of no interest.
    floor: u64,
    /// Up to this epoch the list of epochs is known to be whole.
    listed: u64,
    epochs: BTreeMap<u64, EpochLog>,
}

#[derive(Debug)]
struct EpochLog {
    /// The record to release next.
    next: u64,
    total: Option<u64>,
    /// Its rest will not come.
    abandoned: bool,
    waiting: BTreeMap<u64, Line>,
}

impl Default for EpochLog {
    fn default() -> Self {
        Self { next: 1, total: None, abandoned: false, waiting: BTreeMap::new() }
    }
}

impl EpochLog {
    fn closed(&self) -> bool {
        self.abandoned || self.total.is_some_and(|total| self.next > total)
    }
}

impl Pod {
    /// The first epoch that may still release records.
    fn current(&self) -> Option<(u64, &EpochLog)> {
        let (epoch, log) = self.epochs.iter().find(|(_, log)| !log.closed())?;
        self.reachable(*epoch).then_some((*epoch, log))
    }

    /// No epoch that we have not heard of can come before this one.
    fn reachable(&self, epoch: u64) -> bool {
        epoch <= self.listed || epoch == self.floor + 1
    }
}

impl Order {
    fn epoch(&mut self, pod: &PodName, epoch: Epoch) -> Option<&mut EpochLog> {
        let pod = self.pods.entry(pod.clone()).or_default();
        (epoch.0 > pod.floor).then(|| pod.epochs.entry(epoch.0).or_default())
    }

    /// Leaves out what `pod` said up to and with `epoch`: it belongs to an earlier generation of the job.
    pub fn skip_through(&mut self, pod: &PodName, epoch: Epoch) {
        self.pods.entry(pod.clone()).or_default().floor = epoch.0;
    }

    /// These are the epochs of `pod`, with the number of records of those that have ended.
    pub fn list(&mut self, pod: &PodName, epochs: &[(Epoch, Option<u64>)]) {
        for (epoch, total) in epochs {
            if let (Some(log), Some(total)) = (self.epoch(pod, *epoch), total) {
                log.total = Some(*total);
            }
            let pod = self.pods.entry(pod.clone()).or_default();
            pod.listed = pod.listed.max(epoch.0);
        }
    }

    /// What is known of one epoch's end, without knowing of the others.
    pub fn ended(&mut self, pod: &PodName, epoch: Epoch, total: u64) {
        if let Some(log) = self.epoch(pod, epoch) {
            log.total = Some(total);
        }
    }

    /// Takes a record in; `false` where there is no room for it now.
    pub fn insert(&mut self, line: Line) -> bool {
        let full = self.waiting_bytes + line.bytes.len() > WAITING_BYTES_MAX;
        let Some(log) = self.epoch(&line.pod, line.epoch) else { return true };
        if line.seq < log.next || log.abandoned || log.waiting.contains_key(&line.seq) {
            return true;
        }
        // The very next one only passes through.
        if full && line.seq != log.next {
            return false;
        }
        let bytes = line.bytes.len();
        log.waiting.insert(line.seq, line);
        self.waiting_bytes += bytes;
        true
    }

    /// Everything that may be shown now, in order.
    pub fn ready(&mut self) -> Vec<Line> {
        let mut lines = Vec::new();
        for pod in self.pods.values_mut() {
            // A later epoch, which went on from a checkpoint, says this again.
            for log in pod.epochs.values_mut().filter(|log| log.total.is_some()) {
                while let Some(last) = log.waiting.last_entry().filter(|last| Some(*last.key()) > log.total) {
                    self.waiting_bytes -= last.remove().bytes.len();
                }
            }
            while let Some((epoch, _)) = pod.current() {
                let Some(log) = pod.epochs.get_mut(&epoch) else { break };
                let before = log.next;
                while !log.closed()
                    && let Some(line) = log.waiting.remove(&log.next)
                {
                    self.waiting_bytes -= line.bytes.len();
                    log.next += 1;
                    lines.push(line);
                }
                if log.next == before || !log.closed() {
                    break;
                }
            }
        }
        lines
    }

    /// Records wait behind a gap or behind an epoch of which we know too little.
    pub fn blocked(&self) -> bool {
        self.pods.values().any(|pod| pod.epochs.values().any(|log| !log.waiting.is_empty()))
    }

    /// Everything that is known to exist has been released, and nothing is of unknown length.
    pub fn complete(&self) -> bool {
        self.pods.values().all(|pod| pod.epochs.values().all(EpochLog::closed))
    }

    /// Epochs with records to come or of unknown length.
    pub fn open(&self) -> Vec<(PodName, Epoch)> {
        let open = |pod: &Pod| -> Vec<u64> {
            pod.epochs.iter().filter(|(_, log)| !log.closed()).map(|(epoch, _)| *epoch).collect()
        };
        self.pods
            .iter()
            .flat_map(|(name, pod)| open(pod).into_iter().map(|epoch| (name.clone(), Epoch(epoch))))
            .collect()
    }

    /// What was read of epochs with more to come; of so many that a question can hold them.
    pub fn positions(&self) -> Vec<LogPosition> {
        let mut positions = Vec::new();
        for (name, pod) in &self.pods {
            for (epoch, log) in pod.epochs.iter().filter(|(_, log)| !log.closed() && log.next > 1) {
                positions.push(LogPosition { pod: name.clone(), epoch: Epoch(*epoch), seq: log.next });
            }
        }
        // The rest is sent again from its first record, and recognised.
        positions.truncate(POSITIONS_MAX);
        positions
    }

    /// Records of `epoch` are still to come.
    pub fn is_open(&self, pod: &PodName, epoch: Epoch) -> bool {
        self.pods.get(pod).and_then(|pod| pod.epochs.get(&epoch.0)).is_some_and(|log| !log.closed())
    }

    /// No epoch of the pod up to this one is unheard of.
    pub fn is_known_through(&self, pod: &PodName, epoch: Epoch) -> bool {
        self.pods.get(pod).is_some_and(|pod| epoch.0 <= pod.floor || pod.reachable(epoch.0))
    }

    /// The length of `epoch` is known.
    pub fn has_total(&self, pod: &PodName, epoch: Epoch) -> bool {
        self.pods.get(pod).and_then(|pod| pod.epochs.get(&epoch.0)).is_some_and(|log| log.total.is_some())
    }

    /// The epochs that hold back records of a later one.
    pub fn in_the_way(&self) -> Vec<(PodName, Epoch)> {
        let later =
            |pod: &Pod, epoch: u64| pod.epochs.range(epoch + 1..).any(|(_, log)| !log.waiting.is_empty());
        self.pods
            .iter()
            .filter_map(|(name, pod)| {
                let (epoch, _) = pod.current()?;
                later(pod, epoch).then(|| (name.clone(), Epoch(epoch)))
            })
            .collect()
    }

    /// Goes on without the rest of `epoch`; returns how many records are missing, where that is known. What lies
    /// behind a gap is still released, in order.
    pub fn abandon(&mut self, pod: &PodName, epoch: Epoch) -> (Option<u64>, Vec<Line>) {
        let Some(log) = self.epoch(pod, epoch) else { return (None, Vec::new()) };
        let lines: Vec<Line> = std::mem::take(&mut log.waiting).into_values().collect();
        let missing = log.total.map(|total| (total + 1).saturating_sub(log.next + lines.len() as u64));
        log.abandoned = true;
        self.waiting_bytes -= lines.iter().map(|line| line.bytes.len()).sum::<usize>();
        (missing, lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pod(index: u32) -> PodName {
        PodName::parse(&format!("j-{index}")).unwrap()
    }

    fn line(index: u32, epoch: u64, seq: u64) -> Line {
        Line {
            pod: pod(index),
            epoch: Epoch(epoch),
            seq,
            at: Timestamp(0),
            container: ContainerName::parse("main").unwrap(),
            stream: Stream::Stdout,
            bytes: format!("{index}.{epoch}.{seq}\n").into_bytes(),
        }
    }

    fn shown(lines: Vec<Line>) -> Vec<(u32, u64, u64)> {
        lines.into_iter().map(|l| (l.pod.index, l.epoch.0, l.seq)).collect()
    }

    #[test]
    fn the_first_epoch_needs_no_list_and_a_later_one_does() {
        let mut order = Order::default();
        assert!(order.insert(line(0, 1, 1)));
        assert_eq!(shown(order.ready()), [(0, 1, 1)]);
        order.insert(line(1, 3, 1));
        assert_eq!(shown(order.ready()), []);
        assert!(order.blocked());
        // An epoch that said nothing does not hold back the next.
        order.list(&pod(1), &[(Epoch(2), Some(0)), (Epoch(3), None)]);
        assert_eq!(shown(order.ready()), [(1, 3, 1)]);
    }

    #[test]
    fn what_came_before_this_generation_is_left_out() {
        let mut order = Order::default();
        order.skip_through(&pod(0), Epoch(4));
        order.insert(line(0, 4, 1));
        order.insert(line(0, 5, 1));
        order.ended(&pod(0), Epoch(5), 1);
        assert_eq!(shown(order.ready()), [(0, 5, 1)]);
        assert!(order.complete());
    }

    #[test]
    fn what_a_later_epoch_says_again_is_shown_once() {
        let mut order = Order::default();
        // Restored from a checkpoint at the second record, and once more from the same.
        order.list(&pod(0), &[(Epoch(1), Some(2)), (Epoch(2), Some(0)), (Epoch(3), Some(1))]);
        for (epoch, seq) in [(1, 1), (1, 3), (2, 1), (1, 2), (3, 1)] {
            assert!(order.insert(line(0, epoch, seq)));
        }
        assert_eq!(shown(order.ready()), [(0, 1, 1), (0, 1, 2), (0, 3, 1)]);
        assert!(order.complete() && !order.blocked());
    }

    #[test]
    fn a_lost_rest_is_given_up() {
        let mut order = Order::default();
        order.list(&pod(0), &[(Epoch(1), None), (Epoch(2), None)]);
        for (epoch, seq) in [(1, 1), (1, 3), (2, 1)] {
            order.insert(line(0, epoch, seq));
        }
        assert_eq!(shown(order.ready()), [(0, 1, 1)]);
        assert_eq!(order.in_the_way(), [(pod(0), Epoch(1))]);
        let (missing, rest) = order.abandon(&pod(0), Epoch(1));
        assert_eq!((missing, shown(rest)), (None, vec![(0, 1, 3)]));
        assert_eq!(shown(order.ready()), [(0, 2, 1)]);
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut order = Order::default();
        let mut big = line(0, 1, 2);
        big.bytes = vec![b'x'; WAITING_BYTES_MAX];
        assert!(order.insert(big));
        assert!(!order.insert(line(0, 1, 3)));
        assert!(order.insert(line(0, 1, 1)));
        assert_eq!(shown(order.ready()), [(0, 1, 1), (0, 1, 2)]);
        assert!(order.insert(line(0, 1, 3)));
    }

    proptest! {
        /// Whatever the order, doubled and re-sent in pieces: each record once, epochs and numbers ascending.
        #[test]
        fn each_record_once_and_in_order(
            totals in proptest::collection::vec(proptest::collection::vec(0..6u64, 1..4), 1..4),
            moves in proptest::collection::vec((any::<u32>(), any::<u32>()), 0..60),
            again in proptest::collection::vec(any::<u32>(), 0..20),
            list_at in 0..40usize,
        ) {
            let mut want = Vec::new();
            for (index, epochs) in totals.iter().enumerate() {
                for (epoch, total) in epochs.iter().enumerate() {
                    want.extend((1..=*total).map(|seq| (index as u32, epoch as u64 + 1, seq)));
                }
            }
            let mut sent = want.clone();
            if !sent.is_empty() {
                for at in &again {
                    sent.push(want[*at as usize % want.len()]);
                }
                let len = sent.len();
                for (a, b) in &moves {
                    sent.swap(*a as usize % len, *b as usize % len);
                }
            }
            let mut order = Order::default();
            let mut got = Vec::new();
            let list = |order: &mut Order| {
                for (index, epochs) in totals.iter().enumerate() {
                    let epochs: Vec<_> =
                        epochs.iter().enumerate().map(|(e, t)| (Epoch(e as u64 + 1), Some(*t))).collect();
                    order.list(&pod(index as u32), &epochs);
                }
            };
            for (at, (index, epoch, seq)) in sent.into_iter().enumerate() {
                if at == list_at {
                    list(&mut order);
                }
                prop_assert!(order.insert(line(index, epoch, seq)));
                got.extend(shown(order.ready()));
            }
            list(&mut order);
            got.extend(shown(order.ready()));
            prop_assert!(order.complete());
            prop_assert!(!order.blocked());
            // Pods interleave as they come; within a pod the order is total.
            for index in 0..totals.len() as u32 {
                let of = |all: &[(u32, u64, u64)]| -> Vec<_> {
                    all.iter().copied().filter(|(i, ..)| *i == index).collect()
                };
                prop_assert_eq!(of(&got), of(&want));
            }
            prop_assert_eq!(got.len(), want.len());
        }
    }
}
