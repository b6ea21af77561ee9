//! Pods' logs on their way out: to whoever follows them, and to the depot once the pod has ended.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_protocol::ids::Epoch;
use berth_protocol::limits::FOLLOW_MS;
use berth_protocol::log::Record;
use berth_protocol::topic::Topic;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, Take};
use tokio::time::Instant;

use crate::core::ledger::PodKey;
use crate::io::bus::Bus;
use crate::shim::log::{self, OwnedRecord, Reader, read_from};
use crate::task::file;

/// One reader of a pod's log, however many clients listen.
struct Follower {
    dir: PathBuf,
    topic: Topic,
    epoch: Epoch,
    /// Stays open: a log that grows is read once, not from its beginning at each line.
    reader: Reader,
    next_seq: u64,
    /// Lapses then, unless asked for again.
    until: Instant,
    /// Read, and refused by the broker's queue: it and the rest wait.
    waiting: Option<OwnedRecord>,
}

#[derive(Default)]
pub struct Followers {
    by_pod: BTreeMap<PodKey, Follower>,
}

impl Followers {
    /// Publishes the log of `key` from `from_seq` on, and with `follow` what comes for `FOLLOW_MS`.
    pub fn follow(&mut self, bus: &Bus, dir: &Path, key: &PodKey, topic: Topic, from_seq: u64, follow: bool) {
        let until = Instant::now() + Duration::from_millis(if follow { FOLLOW_MS } else { 0 });
        let follower = self.by_pod.entry(key.clone()).or_insert_with(|| {
            let dir = dir.join(file::LOG_DIR);
            let reader = read_from(&dir, from_seq);
            Follower { dir, topic, epoch: key.epoch, reader, next_seq: from_seq, until, waiting: None }
        });
        if from_seq < follower.next_seq {
            (follower.next_seq, follower.waiting) = (from_seq, None);
            follower.reader = read_from(&follower.dir, from_seq);
        }
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
        self.by_pod.values().any(|follower| follower.waiting.is_some())
    }

    /// Sends what waits, and forgets those whose time is over: returns the pods that nobody follows any more.
    pub fn catch_up(&mut self, bus: &Bus) -> Vec<PodKey> {
        for follower in self.by_pod.values_mut().filter(|follower| follower.waiting.is_some()) {
            follower.publish(bus);
        }
        let now = Instant::now();
        // Who still listens after an outage asks again.
        let sent = |follower: &Follower| follower.waiting.is_none() || !bus.is_up();
        let lapsed = |follower: &Follower| follower.until <= now && sent(follower);
        self.by_pod.extract_if(.., |_, follower| lapsed(follower)).map(|(key, _)| key).collect()
    }
}

impl Follower {
    fn publish(&mut self, bus: &Bus) {
        // A log that cannot be read now is asked for again, or comes from the depot.
        while let Some(record) = self.waiting.take().or_else(|| self.reader.next()?.ok()) {
            let OwnedRecord { seq, at, stream, ref container, ref bytes } = record;
            let message = Record { seq, at, stream, container: container.clone(), bytes }.message(self.epoch);
            if !bus.publish(&self.topic, &message) {
                self.waiting = Some(record);
                return;
            }
            self.next_seq = seq + 1;
        }
    }
}

/// The segments of a pod's log, oldest first: whole records, and on disk for good.
pub async fn segments(dir: &Path) -> io::Result<Vec<Take<File>>> {
    let dir = dir.join(file::LOG_DIR);
    let whole = tokio::task::spawn_blocking(move || {
        let whole = log::whole(&dir)?;
        log::sync(&dir)?;
        Ok(whole)
    });
    let whole = whole.await.unwrap_or_else(|failed| Err(io::Error::other(failed)))?;
    Ok(whole.into_iter().map(|(file, bytes)| File::from_std(file).take(bytes)).collect())
}
