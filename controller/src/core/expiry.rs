//! What is forgotten, and what of the depot goes with it: finished jobs, logs and outputs that nothing lists.

use berth_protocol::ids::{Epoch, JobUid, PodId};
use berth_protocol::topic::{JobTopic, Topic};
use berth_protocol::units::Millis;

use super::cluster::{EpochLog, Output, Pod};
use super::timers::Timer;
use super::{Controller, Effect, Now};

/// Between clearing an expired job's status and forgetting the job.
pub(super) const EXPIRY: Millis = Millis(10_000);

impl Controller {
    /// Clears the finished job's status, and later forgets the job: a crash in between does it again.
    pub(super) fn expire(&mut self, now: Now, uid: &JobUid) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        let (namespace, name) = (job.file.spec.namespace.clone(), job.file.spec.name.clone());
        let topic = Topic::job(&namespace, &name, JobTopic::Status);
        self.dirty.step.effects.push(Effect::Publish { topic, payload: Vec::new(), retain: true });
        if !job.run.expired {
            job.run.expired = true;
            self.dirty.runs.insert(uid.clone());
            self.timers.arm(Timer::Job(uid.clone()), now.boot.plus(EXPIRY));
            return;
        }
        self.recount(uid, None);
        let Some(job) = self.cluster.jobs.remove(uid) else { return };
        self.cluster.names.remove(&(namespace, name));
        for (index, pod) in job.pods() {
            self.delete_blobs(uid.pod(*index), pod);
            self.dirty.pods.insert(uid.pod(*index));
        }
        if let Some(workspace) = &job.file.spec.pod.workspace
            && !self.cluster.jobs.values().any(|other| {
                other.file.spec.pod.workspace.as_ref().is_some_and(|w| w.digest == workspace.digest)
            })
        {
            self.effect(Effect::DeleteBlob(workspace.digest));
        }
        self.dirty.jobs.insert(uid.clone());
        self.dirty.runs.insert(uid.clone());
    }

    pub(super) fn delete_blobs(&mut self, id: PodId, pod: &Pod) {
        for log in &pod.logs {
            self.delete_log(id.clone(), log);
        }
        if let Some(output) = &pod.output {
            self.effect(Effect::DeleteBlob(output.digest));
        }
        self.let_go(pod.saved.checkpoints.clone());
    }

    /// A log that is not in the depot yet is deleted when it comes: nothing lists it then.
    pub(super) fn delete_log(&mut self, pod: PodId, log: &EpochLog) {
        if log.stored || log.kept > 0 {
            self.effect(Effect::DeleteLog { pod, epoch: log.epoch });
        }
    }

    /// A log of an epoch is in the depot.
    pub(super) fn log_stored(&mut self, id: &PodId, epoch: Epoch) {
        let log = self.cluster.jobs.get_mut(&id.uid).and_then(|job| job.log_mut(id.index, epoch));
        match log {
            Some(log) => {
                log.stored = true;
                self.dirty.pods.insert(id.clone());
            }
            None => self.effect(Effect::DeleteLog { pod: id.clone(), epoch }),
        }
    }

    /// Outputs of an epoch are in the depot.
    pub(super) fn output_stored(&mut self, id: &PodId, output: Output) {
        let job = self.cluster.jobs.get_mut(&id.uid);
        let current =
            job.as_ref().and_then(|job| job.pod(id.index)).is_some_and(|pod| pod.epoch == output.epoch);
        match job.filter(|_| current) {
            Some(job) => {
                job.change(id.index, |pod| pod.output = Some(output));
                self.dirty.pods.insert(id.clone());
            }
            None => self.effect(Effect::DeleteBlob(output.digest)),
        }
    }
}
