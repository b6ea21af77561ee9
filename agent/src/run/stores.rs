//! What leaves the node for the depot: logs, outputs, checkpoints, each in a task of its own that ends with an event;
//! and word of what the image store holds.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_protocol::checkpoint::{CheckpointKind, Needs};
use berth_protocol::chunk::{GrantFor, GrantRequest};
use berth_protocol::ids::{Digest, Run};
use berth_protocol::image::Images;
use berth_protocol::message::node::DepotAccess;
use berth_protocol::units::Bytes;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{Mutex, watch};

use super::Agency;
use crate::core::Event;
use crate::core::checkpoints::NotStored;
use crate::core::ledger::{PodKey, is_own};
use crate::io::checkpoint::{self, Order, Said, Store};
use crate::io::depot::DepotError;
use crate::io::prepare::CHECKPOINTS_KEPT_DIR;
use crate::io::{depot, logs, outputs};
use crate::task::{Saved, file};

/// A log goes into the depot with each checkpoint, and whole at the end: the later one must also come later.
#[derive(Default)]
pub(super) struct LogTurns([Arc<Mutex<()>>; 16]);

impl LogTurns {
    fn of(&self, key: &PodKey) -> Arc<Mutex<()>> {
        self.0[key.pod.index as usize % self.0.len()].clone()
    }
}

async fn put_log(
    turn: Arc<Mutex<()>>,
    access: Option<&DepotAccess>,
    key: &PodKey,
    dir: &Path,
) -> Result<(), DepotError> {
    let _turn = turn.lock().await;
    let access = access.ok_or(DepotError::NoAccess)?;
    // The next one sent takes the place of this one: it must hold all of it, even after a power cut.
    let wrong = |source| DepotError::File { path: dir.join(file::LOG_DIR).display().to_string(), source };
    let segments = logs::segments(dir).await.map_err(wrong)?;
    depot::put_log(access, &key.pod, key.epoch, segments).await
}

/// Makes a checkpoint one that the pod can go on from should the machine end before the depot is in reach, and lets the
/// ones before it go.
async fn seal(key: &PodKey, order: &Store) {
    match checkpoint::run(&Order::Store(Box::new(order.clone())), |_, _| {}).await {
        Said::Sealed => {
            let all = order.dir.parent().map(checkpoint::own_ones).unwrap_or_default();
            let older: Vec<PathBuf> = all.into_iter().filter(|dir| *dir != order.dir).collect();
            let remove = move || older.iter().for_each(|older| drop(fs::remove_dir_all(older)));
            let _ = tokio::task::spawn_blocking(remove).await;
        }
        Said::Failed { why, .. } => {
            tracing::warn!("pod {key}: its checkpoint would not outlast a restart of this machine: {why}");
        }
        _ => {}
    }
}

/// Tells the core of the images that come and go, as long as there is a store.
pub(super) async fn tell_images(mut held: watch::Receiver<Images>, events: UnboundedSender<Event>) {
    while held.changed().await.is_ok() {
        let images = held.borrow_and_update().clone();
        let _ = events.send(Event::Images(images));
    }
}

impl Agency {
    pub(super) fn store_log(&self, key: PodKey) {
        let (events, access, turn) = (self.events.clone(), self.depot.clone(), self.log_turns.of(&key));
        let dir = self.shims.pod_dir(&key);
        tokio::spawn(async move {
            let stored = put_log(turn, access.as_ref(), &key, &dir).await;
            if let Err(error) = &stored {
                tracing::debug!("log of pod {key} is not in the depot yet: {error}");
            }
            let _ = events.send(Event::LogStored { key, stored: stored.is_ok() });
        });
    }

    pub(super) fn store_outputs(&self, key: PodKey) {
        let (events, access) = (self.events.clone(), self.depot.clone());
        let dir = self.shims.pod_dir(&key);
        tokio::spawn(async move {
            let result = outputs::store(access.as_ref(), &dir).await;
            if let Err(NotStored { why, retriable }) = &result {
                let more = if *retriable { "; trying again" } else { "" };
                tracing::warn!("no outputs of pod {key}: {why}{more}");
            }
            let _ = events.send(Event::OutputsStored { key, result });
        });
    }

    pub(super) fn checkpoints_kept(&self) -> PathBuf {
        self.config.data_dir.join(CHECKPOINTS_KEPT_DIR)
    }

    pub(super) fn store_checkpoint(&self, key: PodKey, run: Run, spec: Digest, saved: Saved) {
        let Some(template) = self.core.ledger().specs.get(&spec).cloned() else { return };
        let (events, depot) = (self.events.clone(), self.depot.clone());
        let level = saved.level;
        let (pod_dir, turn) = (self.shims.pod_dir(&key), self.log_turns.of(&key));
        let dir = self.checkpoint_dir(&key, level);
        let (images, inventory) = (self.preparer.image_digests(&template), self.probe.inventory());
        let arch = inventory.arch.clone();
        let model = |uuid: &String| Some(inventory.gpus.iter().find(|gpu| gpu.uuid == *uuid)?.model.clone());
        let needs = match saved.kind {
            CheckpointKind::Criu => Needs {
                arch,
                cpu_features: inventory.cpu_features.clone(),
                kernel: Some(inventory.kernel.clone()),
                criu: inventory.criu.clone(),
                gpus: saved.devices.iter().flat_map(|devices| &devices.uuids).filter_map(model).collect(),
                // Its libraries are bound into the containers by names that tell its version.
                gpu_driver: inventory.gpu_driver.clone().filter(|_| template.resources().gpu.is_some()),
            },
            // A program that begins anew finds out what it runs on.
            CheckpointKind::Cooperative => Needs { arch, ..Needs::default() },
        };
        let mut versions = BTreeMap::from([
            ("agent".to_owned(), inventory.agent_version.clone()),
            ("kernel".to_owned(), inventory.kernel.clone()),
        ]);
        versions.extend(inventory.criu.clone().map(|version| ("criu".to_owned(), version)));
        versions.extend(needs.gpu_driver.clone().map(|version| ("gpuDriver".to_owned(), version)));
        let (node, rate) = (self.config.node.clone(), self.config.checkpoint_rate.0);
        let (pod, epoch) = (key.pod.clone(), key.epoch);
        let order = Store {
            access: None,
            dir,
            cache: self.checkpoints_kept(),
            saved,
            node,
            pod,
            epoch,
            run,
            spec,
            template,
            images,
            needs,
            versions,
            rate,
        };
        tokio::spawn(async move {
            // No controller may be there for long, and the machine may end meanwhile.
            if is_own(level) {
                seal(&key, &order).await;
            }
            let progress = |done, total| {
                let (done, total) = (Bytes(done), Bytes(total));
                let _ = events.send(Event::Storing { key: key.clone(), done, total });
            };
            let request = GrantRequest { pod: key.pod.clone(), epoch: key.epoch, what: GrantFor::Save };
            // First what the pod has said until then: should the node be lost, nothing else has it.
            let granted = match put_log(turn, depot.as_ref(), &key, &pod_dir).await {
                Ok(()) => depot::grant(depot.as_ref(), &request).await,
                Err(error) => Err(error),
            };
            let said = match granted {
                Err(error) => {
                    seal(&key, &order).await;
                    Said::Failed { why: error.to_string(), retriable: true }
                }
                Ok(access) => {
                    let order = Order::Store(Box::new(Store { access: Some(access), ..order }));
                    checkpoint::run(&order, progress).await
                }
            };
            let _ = events.send(Event::CheckpointStored { key, level, result: said.into() });
        });
    }

    pub(super) fn keep_checkpoint(&self, key: &PodKey, level: u64, id: &Digest) {
        let dir = self.checkpoint_dir(key, level);
        let cache = self.checkpoints_kept();
        match checkpoint::keep(&dir, id, &key.pod, &cache) {
            // Not on the agent's only thread: the pod may stand still for what it does next. Those that were not sent are
            // older than this; one to come is not listed yet.
            Ok(()) => {
                let older = dir.parent().map(checkpoint::own_ones).unwrap_or_default();
                drop(tokio::task::spawn_blocking(move || {
                    older.iter().for_each(|older| drop(fs::remove_dir_all(older)));
                    checkpoint::keep_newest(&cache);
                }));
            }
            Err(error) => {
                tracing::warn!("the checkpoint of pod {key} is in the depot, and not kept here: {error}");
            }
        }
    }

    fn checkpoint_dir(&self, key: &PodKey, level: u64) -> PathBuf {
        self.shims.pod_dir(key).join(file::CHECKPOINTS_DIR).join(level.to_string())
    }
}
