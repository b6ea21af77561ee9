//! Pods that are saved by order: on the spot, to go on elsewhere, to be set back, or as the beginning of another job.
//! What could not end well is refused before anything is stopped.

use berth_protocol::checkpoint::{INSTEAD, Needs};
use berth_protocol::ids::{Digest, Epoch, JobName, JobUid, Namespace, NodeId, PodId};
use berth_protocol::job::{CheckpointMode, JobSpec};
use berth_protocol::message::user::Rejection;
use berth_protocol::pod::{Goal, PodPhase};
use berth_protocol::resources::Inventory;

use super::admit::rejection;
use super::checkpoints::{Checkpoint, Leaving};
use super::cluster::{Pod, PodState};
use super::{Controller, Now};

/// Why a pod cannot be saved on such a node, in words.
pub(super) fn unsavable(spec: &JobSpec, node: &Inventory) -> Option<String> {
    let policy = &spec.pod.checkpoint;
    match policy.mode {
        CheckpointMode::None => Some("its file says `checkpoint: {mode: none}`".to_owned()),
        _ if policy.asks() => None,
        CheckpointMode::Cooperative => {
            Some("its file names neither `checkpoint.signal` nor `checkpoint.ready` to ask it by".to_owned())
        }
        CheckpointMode::Auto | CheckpointMode::Criu if node.criu.is_none() => {
            Some(format!("node {} has no CRIU that works", node.hostname))
        }
        CheckpointMode::Auto | CheckpointMode::Criu => {
            match spec.pod.resources().gpu.map_or(0, |gpu| gpu.count) {
                0 => None,
                1 if node.saves_gpus => None,
                1 => Some(format!(
                    "the driver of node {} cannot save the memory of GPUs (`berth-agent doctor` says why there); {INSTEAD}",
                    node.hostname
                )),
                many => Some(format!(
                    "it has {many} GPUs, and memory that GPUs give each other access to cannot be saved; {INSTEAD}"
                )),
            }
        }
    }
}

/// What a checkpoint taken on `node` will need.
pub(super) fn foreseen(spec: &JobSpec, node: &Inventory, gpus: &[String]) -> Needs {
    // Should it not answer and CRIU be used all the same, placement holds the target against what was taken.
    if spec.pod.checkpoint.asks() {
        return Needs { arch: node.arch.clone(), ..Needs::default() };
    }
    let models = node.gpus.iter().filter(|gpu| gpus.contains(&gpu.uuid)).map(|gpu| gpu.model.clone());
    let gpus: Vec<String> = models.collect();
    Needs {
        arch: node.arch.clone(),
        cpu_features: node.cpu_features.clone(),
        kernel: Some(node.kernel.clone()),
        criu: node.criu.clone(),
        gpu_driver: node.gpu_driver.clone().filter(|_| !gpus.is_empty()),
        gpus,
    }
}

impl Controller {
    /// The one way in which a pod leaves its node by order: saved and stopped; where it cannot be saved it is stopped alone, and goes on from its last
    /// checkpoint.
    pub(super) fn vacate(&mut self, id: &PodId, why: Leaving) {
        let Some(job) = self.cluster.jobs.get_mut(&id.uid) else { return };
        let current = job.file.generation;
        let Some(pod) = job.pod(id.index) else { return };
        let PodState::Placed(placed) = &pod.state else { return };
        if placed.goal == Goal::Stop {
            return;
        }
        // Whatever else it would leave for: a suspended job's pods go nowhere.
        let why = if job.run.suspended { Leaving::Suspend } else { why };
        let runs = matches!(placed.phase, PodPhase::Running | PodPhase::Checkpointing | PodPhase::Paused);
        let savable = self
            .cluster
            .nodes
            .get(&placed.node)
            .is_some_and(|node| unsavable(&job.file.spec, &node.record.inventory).is_none());
        // What has not begun has nothing to save.
        let saves = runs && savable && pod.generation == current;
        let already = placed.goal == Goal::Vacate && saves;
        let node = placed.node.clone();
        if let Some(assignment) = job.assignment_mut(id.index) {
            assignment.goal = if saves { Goal::Vacate } else { Goal::Stop };
            assignment.leaving = Some(why);
        }
        self.dirty.desired.insert(node);
        self.dirty.pods.insert(id.clone());
        self.dirty.status.insert(id.uid.clone());
        if saves && !already {
            // One that is under way was asked of a pod that runs on: its work after it would be lost.
            if let Some(assignment) =
                self.cluster.jobs.get_mut(&id.uid).and_then(|j| j.assignment_mut(id.index))
            {
                assignment.asked += 1;
            }
        }
    }

    /// The command `checkpoint`.
    pub(super) fn command_checkpoint(&mut self, uid: &JobUid) -> Result<(), Rejection> {
        let Some(job) = self.cluster.jobs.get(uid) else { return Ok(()) };
        let running: Vec<u32> = job
            .placed()
            .iter()
            .filter(|i| {
                job.assignment(**i)
                    .is_some_and(|a| matches!(a.phase, PodPhase::Running | PodPhase::Checkpointing))
                    && !job.is_saved_to_leave(**i)
            })
            .copied()
            .collect();
        if running.is_empty() {
            return Err(rejection("NotRunning", "no pod of the job runs: there is nothing to save"));
        }
        for index in &running {
            if let Some(why) = self.cannot_save(uid, *index) {
                return Err(rejection("CannotCheckpoint", why));
            }
        }
        for index in running {
            self.ask_checkpoint(&uid.pod(index));
        }
        Ok(())
    }

    fn cannot_save(&self, uid: &JobUid, index: u32) -> Option<String> {
        let job = self.cluster.jobs.get(uid)?;
        let node = self.cluster.nodes.get(&job.assignment(index)?.node)?;
        let why = unsavable(&job.file.spec, &node.record.inventory)?;
        Some(format!("pod {} cannot be checkpointed: {why}", job.file.spec.name.pod(index)))
    }

    /// The command `migrate`: refused before anything is stopped, where it could not end well.
    pub(super) fn command_migrate(
        &mut self,
        now: Now,
        uid: &JobUid,
        to: Option<NodeId>,
    ) -> Result<(), Rejection> {
        let Some(to) = to else {
            return Err(rejection("InvalidCommand", "migrate wants a `node` to go to"));
        };
        self.survey(uid);
        let Some(target) = self.cluster.nodes.get(&to) else {
            return Err(rejection("NoSuchNode", format!("there is no node {to}")));
        };
        let Some(job) = self.cluster.jobs.get(uid) else { return Ok(()) };
        let mut movers = Vec::new();
        let mut against: Vec<String> = self.verdict_on(uid, &to);
        for index in job.placed() {
            let Some(assignment) = job.assignment(*index) else { continue };
            if assignment.node == to || assignment.goal == Goal::Stop {
                continue;
            }
            if let Some(why) = self.cannot_save(uid, *index) {
                return Err(rejection("CannotCheckpoint", why));
            }
            let Some(source) = self.cluster.nodes.get(&assignment.node) else { continue };
            let gpus: Vec<String> = assignment.charge.gpus.iter().map(|share| share.uuid.clone()).collect();
            let needs = foreseen(&job.file.spec, &source.record.inventory, &gpus);
            for lack in needs.lacking(&target.record.inventory) {
                if !against.contains(&lack) {
                    against.push(lack);
                }
            }
            movers.push(*index);
        }
        if movers.is_empty() {
            let there = job.placed().iter().any(|i| job.assignment(*i).is_some_and(|a| a.node == to));
            return if there {
                Ok(())
            } else {
                Err(rejection("NotRunning", "no pod of the job runs: there is nothing to move"))
            };
        }
        if !against.is_empty() {
            let text = format!("the job cannot go on at node {to}: {}", against.join("; "));
            return Err(rejection("Unfit", text));
        }
        for index in movers {
            self.send_away(now, &uid.pod(index), Leaving::Migrate { to: to.clone() });
        }
        Ok(())
    }

    /// The command `restore`: a new job of that name, or the job's own pod set back.
    pub(super) fn command_restore(
        &mut self,
        now: Now,
        (namespace, name): (&Namespace, &JobName),
        known: Option<JobUid>,
        checkpoint: Option<Digest>,
        node: Option<NodeId>,
    ) -> Result<JobUid, Rejection> {
        let Some(id) = checkpoint else {
            return Err(rejection("InvalidCommand", "restore wants a `checkpoint`"));
        };
        let found = self.cluster.checkpoints.get(&id).filter(|found| found.spec.namespace == *namespace);
        let Some(found) = found.cloned() else {
            return Err(rejection(
                "NoSuchCheckpoint",
                format!("there is no checkpoint {id} in namespace {namespace}"),
            ));
        };
        if let Some(node) = &node {
            let lacks = match self.cluster.nodes.contains_key(node) {
                true => self.unfit_for(&id, node),
                false => return Err(rejection("NoSuchNode", format!("there is no node {node}"))),
            };
            if !lacks.is_empty() {
                return Err(rejection("Unfit", format!("node {node} cannot start it: {}", lacks.join("; "))));
            }
        }
        match known {
            None => Ok(self.fork(now, name, &found, id, node)),
            Some(uid) if uid == found.uid => {
                let ended = self.cluster.jobs.get(&uid).is_none_or(|job| job.run.verdict.is_some());
                if ended {
                    let text = format!("job {name} has ended: restore the checkpoint under another name");
                    return Err(rejection("JobFinished", text));
                }
                self.set_back(now, &uid, found.index, id, node);
                Ok(uid)
            }
            Some(_) => {
                let text = format!("there is a job {name} already, and the checkpoint is not of it");
                Err(rejection("NameTaken", text))
            }
        }
    }

    /// A job of its own, that begins with the checkpoint.
    fn fork(
        &mut self,
        now: Now,
        name: &JobName,
        found: &Checkpoint,
        id: Digest,
        node: Option<NodeId>,
    ) -> JobUid {
        let mut spec = found.spec.clone();
        spec.name = name.clone();
        spec.pod.job = name.clone();
        (spec.parallelism, spec.completions, spec.suspend, spec.gang) = (1, 1, false, false);
        let template = super::records::template_digest(&spec.pod);
        let written = Digest::of(format!("restored {id}").as_bytes());
        self.forget_rejection(&spec.namespace.clone(), name, false);
        let uid = self.new_job(now, spec, written, template);
        if let Some(job) = self.cluster.jobs.get_mut(&uid) {
            job.put(0, Pod::waiting(job.file.generation, Epoch(0)));
        }
        self.change_saved(&uid.pod(0), |saved| {
            saved.checkpoints.push(id);
            saved.send_to(node);
        });
        self.reconcile(now, &uid);
        uid
    }

    /// Stops a pod, to go on from an earlier checkpoint of its.
    fn set_back(&mut self, now: Now, uid: &JobUid, index: u32, id: Digest, node: Option<NodeId>) {
        self.change_saved(&uid.pod(index), |saved| {
            saved.checkpoints.retain(|other| *other != id);
            saved.checkpoints.insert(0, id);
            saved.unusable.remove(&id);
            saved.forget_failures();
            saved.send_to(node);
        });
        let assignment = self.cluster.jobs.get_mut(uid).and_then(|job| job.assignment_mut(index));
        if let Some(assignment) = assignment {
            (assignment.goal, assignment.leaving) = (Goal::Stop, Some(Leaving::Restore));
            self.dirty.desired.insert(assignment.node.clone());
        }
        self.dirty.status.insert(uid.clone());
        self.reconcile(now, uid);
    }

    pub(super) fn suspend(&mut self, now: Now, uid: &JobUid, suspended: bool) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        if job.run.suspended != suspended {
            job.run.suspended = suspended;
            self.dirty.runs.insert(uid.clone());
            self.dirty.status.insert(uid.clone());
            self.reconcile(now, uid);
        }
    }

    /// Has the pods saved and stopped: resumed, they go on from there.
    pub(super) fn suspend_pods(&mut self, uid: &JobUid) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        self.scheduler.dequeue(uid, job);
        for index in job.placed().clone() {
            self.vacate(&uid.pod(index), Leaving::Suspend);
        }
    }
}
