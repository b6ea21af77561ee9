//! What pods need, brought here: for those that are to start, and ahead of those that are to come. Each in a task of its
//! own that ends with an event.

use std::collections::BTreeMap;

use berth_protocol::ids::Digest;
use berth_protocol::job::PodTemplate;
use futures_util::FutureExt;
use tokio::task::JoinHandle;

use super::Agency;
use crate::core::Event;
use crate::core::ledger::PodKey;

/// Work under way, by pod.
#[derive(Default)]
pub(super) struct Tasks(BTreeMap<PodKey, JoinHandle<()>>);

impl Tasks {
    fn insert(&mut self, key: PodKey, task: JoinHandle<()>) {
        self.0.retain(|_, task| !task.is_finished());
        self.0.insert(key, task);
    }

    pub(super) fn cancel(&mut self, key: &PodKey) {
        if let Some(task) = self.0.remove(key) {
            task.abort();
        }
    }
}

impl Agency {
    /// Begins to prepare a pod, and returns the result where nothing has to be waited for.
    pub(super) fn prepare(
        &mut self,
        key: PodKey,
        template: Box<PodTemplate>,
        from: Option<Digest>,
        kept: bool,
    ) -> Option<Event> {
        let (preparer, events, depot) = (self.preparer.clone(), self.events.clone(), self.depot.clone());
        let (name, dir) = (key.clone(), self.shims.pod_dir(&key));
        let mut work = Box::pin(async move {
            let mut result = preparer.prepare(&name, &template, depot.as_ref(), &events).await;
            if let Ok(prepared) = &mut result {
                prepared.restore = kept && preparer.resume(&name, &template, &dir).await;
                if let Some(from) = from.filter(|_| !prepared.restore) {
                    prepared.restore = true;
                    let brought = preparer.bring(&name, from, &template, &dir, depot.as_ref()).await;
                    result = brought.and(result);
                }
            }
            Event::Prepared { key: name, result }
        });
        if let Some(event) = work.as_mut().now_or_never() {
            return Some(event);
        }
        let events = self.events.clone();
        let task = tokio::spawn(async move { drop(events.send(work.await)) });
        self.preparing.insert(key, task);
        None
    }

    /// Begins to bring what a pod will need that still runs elsewhere.
    pub(super) fn stage(&mut self, key: PodKey, template: Box<PodTemplate>, from: Option<Digest>) {
        let (preparer, events, depot) = (self.preparer.clone(), self.events.clone(), self.depot.clone());
        let name = key.clone();
        let task = tokio::spawn(async move {
            let staged = preparer.stage(&name, from, &template, depot.as_ref(), &events).await;
            let result = staged.map_err(|unready| unready.message);
            let _ = events.send(Event::Staged { key: name, from, result });
        });
        self.staging.insert(key, task);
    }
}
