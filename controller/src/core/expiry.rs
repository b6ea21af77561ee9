//! What is forgotten, and what of the depot goes with it: finished jobs, logs and outputs that nothing lists.

use berth_protocol::ids::{Digest, Epoch, JobUid, PodId};
use berth_protocol::limits::HUMAN_MESSAGE_BYTES_MAX;
use berth_protocol::topic::{JobTopic, Topic};
use berth_protocol::units::Millis;

use super::cluster::{EpochLog, Output, Pod};
use super::timers::Timer;
use super::{Controller, Effect, Now, fit};

/// Between clearing an expired job's status and forgetting the job.
pub(super) const EXPIRY: Millis = Millis(10_000);

impl Controller {
    /// Clears the finished job's status, and later forgets the job: a crash in between does it again.
    pub(super) fn expire(&mut self, now: Now, uid: &JobUid) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        let name = (job.file.spec.namespace.clone(), job.file.spec.name.clone());
        // A restored job may have taken the name meanwhile, and the status with it.
        let owns_name = self.cluster.names.get(&name) == Some(uid);
        if owns_name {
            let topic = Topic::job(&name.0, &name.1, JobTopic::Status);
            self.dirty.step.effects.push(Effect::Publish { topic, payload: Vec::new(), retain: true });
        }
        if !job.run.expired {
            job.run.expired = true;
            self.dirty.runs.insert(uid.clone());
            self.timers.arm(Timer::Job(uid.clone()), now.boot.plus(EXPIRY));
            return;
        }
        self.recount(uid, None);
        let Some(job) = self.cluster.jobs.remove(uid) else { return };
        if owns_name {
            self.cluster.names.remove(&name);
        }
        for (index, pod) in job.pods() {
            self.delete_blobs(uid.pod(*index), pod);
            self.dirty.pods.insert(uid.pod(*index));
        }
        self.name_blob(None, job.file.spec.pod.workspace.as_ref().map(|workspace| workspace.digest));
        self.dirty.jobs.insert(uid.clone());
        self.dirty.runs.insert(uid.clone());
    }

    pub(super) fn delete_blobs(&mut self, id: PodId, pod: &Pod) {
        for log in &pod.logs {
            self.delete_log(id.clone(), log);
        }
        self.name_blob(None, pod.output.as_ref().map(|output| output.digest));
        self.let_go(pod.saved.checkpoints.clone());
    }

    /// A pod or a job names `new` where it named `old`: a blob that nobody names any more goes.
    pub(super) fn name_blob(&mut self, new: Option<Digest>, old: Option<Digest>) {
        // The new one first: they may be the same.
        if let Some(new) = new {
            self.cluster.named_blobs.add(new);
        }
        if let Some(old) = old
            && self.cluster.named_blobs.remove(&old)
        {
            self.effect(Effect::DeleteBlob(old));
        }
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
        let new = output.digest;
        let old = match job.filter(|_| current) {
            Some(job) => {
                self.dirty.pods.insert(id.clone());
                let old = job.change(id.index, |pod| pod.output.replace(output)).flatten();
                old.map(|old| old.digest)
            }
            // Nobody wants them.
            None => Some(new),
        };
        self.name_blob(Some(new), old);
    }

    /// Outputs of an epoch are not in the depot, and will not be.
    pub(super) fn outputs_missing(&mut self, id: &PodId, epoch: Epoch, mut why: String) {
        fit::shorten(&mut why, HUMAN_MESSAGE_BYTES_MAX);
        let Some(job) = self.cluster.jobs.get_mut(&id.uid) else { return };
        if job.pod(id.index).is_some_and(|pod| pod.epoch == epoch) {
            job.change(id.index, |pod| pod.no_outputs = Some(why));
            self.dirty.pods.insert(id.clone());
            self.dirty.status.insert(id.uid.clone());
        }
    }
}
