//! Pods' logs on their way out: to whoever follows them, and to the depot once the pod has ended.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_protocol::ids::Epoch;
use berth_protocol::limits::FOLLOW_MS;
use berth_protocol::log::Record;
use berth_protocol::topic::Topic;
use tokio::time::Instant;

use crate::core::ledger::PodKey;
use crate::io::bus::Bus;
use crate::shim::log::{OwnedRecord, read_from};
use crate::task::file;

/// One reader of a pod's log, however many clients listen.
struct Follower {
    dir: PathBuf,
    topic: Topic,
    epoch: Epoch,
    next_seq: u64,
    /// Lapses then, unless asked for again.
    until: Instant,
    /// The broker's queue was full: the rest waits.
    behind: bool,
}

#[derive(Default)]
pub struct Followers {
    by_pod: BTreeMap<PodKey, Follower>,
}

impl Followers {
    /// Publishes the log of `key` from `from_seq` on, and with `follow` what comes for `FOLLOW_MS`.
    pub fn follow(&mut self, bus: &Bus, dir: &Path, key: &PodKey, topic: Topic, from_seq: u64, follow: bool) {
        let until = Instant::now() + Duration::from_millis(if follow { FOLLOW_MS } else { 0 });
        let follower = self.by_pod.entry(key.clone()).or_insert_with(|| Follower {
            dir: dir.join(file::LOG_DIR),
            topic,
            epoch: key.epoch,
            next_seq: from_seq,
            until,
            behind: false,
        });
        follower.next_seq = follower.next_seq.min(from_seq);
        follower.until = follower.until.max(until);
        follower.publish(bus);
    }

    pub fn wants(&self, key: &PodKey) -> bool {
        self.by_pod.contains_key(key)
    }

    /// The log has grown, or its pod has ended.
    pub fn grown(&mut self, bus: &Bus, key: &PodKey) {
        if let Some(follower) = self.by_pod.get_mut(key) {
            follower.publish(bus);
        }
    }

    /// Some records still wait for room in the broker's queue.
    pub fn behind(&self) -> bool {
        self.by_pod.values().any(|follower| follower.behind)
    }

    /// Sends what waits, and forgets those whose time is over.
    pub fn catch_up(&mut self, bus: &Bus) {
        for follower in self.by_pod.values_mut().filter(|follower| follower.behind) {
            follower.publish(bus);
        }
        let now = Instant::now();
        self.by_pod.retain(|_, follower| follower.behind || follower.until > now);
    }
}

impl Follower {
    fn publish(&mut self, bus: &Bus) {
        self.behind = false;
        let records = read_from(&self.dir, self.next_seq);
        // A log that cannot be read now is asked for again, or comes from the depot.
        for record in records.map_while(Result::ok) {
            let OwnedRecord { seq, at, stream, container, bytes } = record;
            let message = Record { seq, at, stream, container, bytes: &bytes }.message(self.epoch);
            if !bus.publish(&self.topic, &message) {
                self.behind = true;
                return;
            }
            self.next_seq = seq + 1;
        }
    }
}

/// The segments of a pod's log, oldest first.
pub async fn segments(dir: &Path) -> Vec<tokio::fs::File> {
    let mut files = Vec::new();
    for path in crate::shim::log::segment_paths(&dir.join(file::LOG_DIR)) {
        files.extend(tokio::fs::File::open(path).await);
    }
    files
}
