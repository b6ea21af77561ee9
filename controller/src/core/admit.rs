//! Whether a submit or a command is taken, and the answer to it. What follows is `lifecycle`'s.

use berth_protocol::ids::{Digest, Generation, JobName, JobUid, Namespace, RequestId};
use berth_protocol::job::{self, JobSpec};
use berth_protocol::join::Role;
use berth_protocol::limits::{JOB_FILE_BYTES_MAX, REJECTED_STATUS_MS, SPEC_BYTES_MAX};
use berth_protocol::message::user::{
    Answer, Command, FieldError, JobCommand, JobPhase, JobStatus, Rejection, Verdict,
};
use berth_protocol::rule::{Rule, kept};
use berth_protocol::topic::{JobTopic, Topic};
use berth_protocol::units::Millis;

use super::callers::{Author, Caller, Denied};
use super::cluster::{Job, JobFile, JobRun};
use super::schedule::rulebook;
use super::{Controller, Effect, Now, records};

/// Rejected statuses out at once; beyond, a rejection is only answered.
const REJECTED_MAX: usize = 1024;

pub(super) fn rejection(code: &str, message: impl Into<String>) -> Rejection {
    Rejection { code: code.to_owned(), message: message.into(), errors: Vec::new() }
}

fn invalid(errors: Vec<FieldError>) -> Rejection {
    let message = match &errors[..] {
        [one] if one.field.is_empty() => one.message.clone(),
        [one] => format!("{}: {}", one.field, one.message),
        many => format!("the job file has {} errors", many.len()),
    };
    Rejection { code: "InvalidJob".to_owned(), message, errors }
}

/// The id of a request that says none.
fn signature(by: Option<&Author>) -> Option<RequestId> {
    Some(by?.signed.as_ref()?.id.clone())
}

impl Controller {
    pub(super) fn submit(
        &mut self,
        now: Now,
        by: Option<&Author>,
        (namespace, name): (&Namespace, &JobName),
        payload: &[u8],
    ) {
        let on = format!("job {namespace}/{name}");
        let verdict = match self.director(now, by, namespace) {
            Err(denied) => self.deny(now, by, ("submit", on), &denied),
            Ok(caller) => match self.admit(now, by, (namespace, name), payload) {
                Ok((generation, news)) => {
                    if news {
                        self.audit(now, &caller.actor, "submit", on);
                    }
                    Verdict::accepted(generation)
                }
                Err(rejected) => {
                    self.refuse("job-rejected");
                    self.publish_rejected(now, namespace, name, &rejected);
                    self.audit_refused(now, &caller.actor, "submit", on, rejected.message.clone());
                    Verdict::Rejected { rejected }
                }
            },
        };
        self.answer(namespace, name, None, payload, verdict);
    }

    /// Who it is, where they may say what becomes of the namespace's jobs.
    fn director(&self, now: Now, by: Option<&Author>, namespace: &Namespace) -> Result<Caller, Denied> {
        let caller = self.caller(now, by)?;
        caller.may(namespace, Role::Submit).map(|()| caller)
    }

    fn deny(
        &mut self,
        now: Now,
        by: Option<&Author>,
        (what, on): (&str, String),
        denied: &Denied,
    ) -> Verdict {
        self.denied(now, by, what, on, denied);
        Verdict::Rejected { rejected: rejection(denied.code(), denied.to_string()) }
    }

    /// At which generation the job is then; true: by this very file.
    fn admit(
        &mut self,
        now: Now,
        by: Option<&Author>,
        (namespace, name): (&Namespace, &JobName),
        payload: &[u8],
    ) -> Result<(Generation, bool), Rejection> {
        if payload.len() > JOB_FILE_BYTES_MAX {
            let text = format!(
                "the job file is {} bytes long, at most {JOB_FILE_BYTES_MAX} are allowed",
                payload.len()
            );
            return Err(rejection("TooLarge", text));
        }
        let parsed = job::parse(payload, Some((namespace, name))).map_err(invalid)?;
        let known = self.cluster.names.get(&(namespace.clone(), name.clone())).cloned();
        let job = known.as_ref().and_then(|uid| self.cluster.jobs.get(uid)).filter(|job| !job.run.expired);
        let (now_at, same) = job
            .map_or((Generation(0), false), |job| (job.file.generation, job.file.written == parsed.written));
        let id = parsed.id.or_else(|| signature(by));
        let seen = id.as_ref().filter(|id| self.cluster.requests.contains(id));
        if same {
            let new = id.filter(|id| !self.cluster.requests.contains(id));
            new.into_iter().for_each(|id| self.remember_request(now, id, by));
            return Ok((now_at, false));
        }
        // A file that was overtaken comes like one that is meant to bring the old one back: what tells them apart is
        // what the sender says of it.
        if let Some(id) = seen {
            let text = format!(
                "a file with id {id} was taken before, and job {name} is another one since, at generation {now_at}: a \
                 changed file, and one that is to come back, need another id"
            );
            return Err(rejection("Overtaken", text));
        }
        if let Some(replaces) = parsed.replaces.filter(|replaces| *replaces != now_at) {
            let text = format!(
                "the file is to follow generation {replaces} of job {name}, which is at generation {now_at}: look at \
                 what it is now, and submit again"
            );
            return Err(rejection("Overtaken", text));
        }
        let bad = rulebook::check(&parsed.spec.placement);
        if !bad.is_empty() {
            let file = String::from_utf8_lossy(payload);
            let error = |bad: rulebook::BadCondition| {
                let place = job::place(payload, &bad.field);
                bad.in_file(&file, place)
            };
            return Err(invalid(bad.into_iter().map(error).collect()));
        }
        let template = records::template_json(&parsed.spec.pod);
        if template.len() > SPEC_BYTES_MAX {
            let text = format!(
                "the pod is {} bytes long with every default filled in, at most {SPEC_BYTES_MAX} are allowed",
                template.len()
            );
            return Err(rejection("TooLarge", text));
        }
        self.forget_rejection(namespace, name, false);
        id.into_iter().for_each(|id| self.remember_request(now, id, by));
        let digest = Digest::of(&template);
        let generation = match known {
            Some(uid) => self.replace_job(now, &uid, parsed.spec, parsed.written, digest),
            None => self.create_job(now, parsed.spec, parsed.written, digest),
        };
        Ok((generation, true))
    }

    fn create_job(&mut self, now: Now, spec: JobSpec, written: Digest, template: Digest) -> Generation {
        let uid = self.new_job(now, spec, written, template);
        self.reconcile(now, &uid);
        Generation(1)
    }

    /// A job that has no pods yet: they come with `reconcile`.
    pub(super) fn new_job(&mut self, now: Now, spec: JobSpec, written: Digest, template: Digest) -> JobUid {
        let uid = self.draw_uid();
        let generation = Generation(1);
        let file = JobFile { spec, written, generation, seq: self.next_seq, submitted_at: now.wall };
        self.next_seq += 1;
        let run = JobRun { suspended: file.spec.suspend, ..JobRun::default() };
        self.name_blob(file.spec.pod.workspace.as_ref().map(|workspace| workspace.digest), None);
        self.cluster.names.insert((file.spec.namespace.clone(), file.spec.name.clone()), uid.clone());
        self.cluster.jobs.insert(uid.clone(), Job::new(file, run, template));
        self.dirty.jobs.insert(uid.clone());
        self.dirty.runs.insert(uid.clone());
        uid
    }

    fn draw_uid(&mut self) -> JobUid {
        const DIGITS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
        loop {
            let bits = self.draw();
            let text: String = (0..12)
                .map(|i| char::from(DIGITS[usize::try_from(bits >> (5 * i) & 31).unwrap_or(0)]))
                .collect();
            if let Ok(uid) = JobUid::parse(&text)
                && !self.cluster.jobs.contains_key(&uid)
            {
                return uid;
            }
        }
    }

    pub(super) fn command(
        &mut self,
        now: Now,
        by: Option<&Author>,
        (namespace, name): (&Namespace, &JobName),
        payload: &[u8],
    ) {
        let topic = Topic::job(namespace, name, JobTopic::Command);
        let (id, verdict) = match self.read::<JobCommand>(&topic, payload) {
            Ok(command) => (command.id.clone(), self.command_by(now, by, (namespace, name), command)),
            Err(error) => {
                self.refuse(error.kind());
                (None, Verdict::Rejected { rejected: rejection("InvalidCommand", error.to_string()) })
            }
        };
        self.answer(namespace, name, id, payload, verdict);
    }

    fn command_by(
        &mut self,
        now: Now,
        by: Option<&Author>,
        (namespace, name): (&Namespace, &JobName),
        command: JobCommand,
    ) -> Verdict {
        let (what, on) = (command.command.verb(), format!("job {namespace}/{name}"));
        let caller = match self.director(now, by, namespace) {
            Ok(caller) => caller,
            Err(denied) => return self.deny(now, by, (what, on), &denied),
        };
        let command = JobCommand { id: command.id.or_else(|| signature(by)), ..command };
        let seen = command.id.as_ref().is_some_and(|id| self.cluster.requests.contains(id));
        match self.obey(now, by, (namespace, name), command) {
            Ok(generation) => {
                if !seen {
                    self.audit(now, &caller.actor, what, on);
                }
                Verdict::accepted(generation)
            }
            Err(rejected) => {
                self.audit_refused(now, &caller.actor, what, on, rejected.message.clone());
                Verdict::Rejected { rejected }
            }
        }
    }

    fn obey(
        &mut self,
        now: Now,
        by: Option<&Author>,
        (namespace, name): (&Namespace, &JobName),
        command: JobCommand,
    ) -> Result<Generation, Rejection> {
        let uid = self.cluster.names.get(&(namespace.clone(), name.clone())).cloned();
        let job = uid.as_ref().and_then(|uid| self.cluster.jobs.get(uid)).filter(|job| !job.run.expired);
        if command.command == Command::Restore {
            let known = uid.clone().filter(|_| job.is_some());
            let seen = command.id.as_ref().is_some_and(|id| self.cluster.requests.contains(id));
            let restored = match known.clone().filter(|_| seen) {
                Some(uid) => uid,
                None => {
                    self.command_restore(now, (namespace, name), known, command.checkpoint, command.node)?
                }
            };
            if let Some(id) = command.id.filter(|_| !seen) {
                self.remember_request(now, id, by);
            }
            return Ok(self.cluster.jobs.get(&restored).map_or(Generation(0), |job| job.file.generation));
        }
        let (Some(uid), Some(job)) = (uid.clone(), job) else {
            return Err(rejection("NoSuchJob", format!("there is no job {name} in namespace {namespace}")));
        };
        let seen = command.id.as_ref().is_some_and(|id| self.cluster.requests.contains(id));
        if seen && kept(Rule::CommandsOnce) {
            return Ok(job.file.generation);
        }
        let over = job.run.verdict.as_ref().map(|verdict| verdict.phase);
        if let Some(phase) = over
            && command.command != Command::Restart
        {
            let text = format!("job {name} has ended already: {phase:?}");
            return Err(rejection("JobFinished", text));
        }
        match command.command {
            Command::Cancel => self.cancel(now, &uid),
            Command::Suspend => self.suspend(now, &uid, true),
            Command::Resume => self.suspend(now, &uid, false),
            Command::Restart => self.restart(now, &uid),
            Command::Checkpoint => self.command_checkpoint(&uid)?,
            Command::Migrate => self.command_migrate(now, &uid, command.node)?,
            // Above: its job need not be there.
            Command::Restore => {}
        }
        if let Some(id) = command.id {
            self.remember_request(now, id, by);
        }
        Ok(self.cluster.jobs.get(&uid).map_or(Generation(0), |job| job.file.generation))
    }

    fn answer(
        &mut self,
        namespace: &Namespace,
        name: &JobName,
        id: Option<RequestId>,
        payload: &[u8],
        verdict: Verdict,
    ) {
        let topic = Topic::job(namespace, name, JobTopic::Answer);
        self.publish(topic, &Answer::new(id, payload, verdict), false);
    }

    /// `status` says `Rejected` only where no accepted job of that name is, and for an hour.
    fn publish_rejected(&mut self, now: Now, namespace: &Namespace, name: &JobName, rejected: &Rejection) {
        let key = (namespace.clone(), name.clone());
        let full = self.cluster.rejected.len() >= REJECTED_MAX && !self.cluster.rejected.contains_key(&key);
        if full || self.cluster.names.contains_key(&key) {
            return;
        }
        let until = now.wall.plus(Millis(REJECTED_STATUS_MS));
        self.dirty.step.writes.push(records::write(records::rejected(namespace, name), &until));
        self.cluster.rejected.insert(key, until);
        let status = JobStatus {
            namespace: namespace.clone(),
            job: name.clone(),
            uid: None,
            generation: Generation(0),
            phase: JobPhase::Rejected,
            reason: Some(rejected.code.clone()),
            message: Some(rejected.message.clone()),
            pods: Vec::new(),
            pod_counts: std::collections::BTreeMap::new(),
            failures: 0,
            evictions: 0,
            migrations: 0,
            checkpoint: None,
            submitted_at: now.wall,
            started_at: None,
            finished_at: Some(now.wall),
        };
        self.publish(Topic::job(namespace, name, JobTopic::Status), &status, true);
    }

    /// `clear`: no other status takes its place.
    pub(super) fn forget_rejection(&mut self, namespace: &Namespace, name: &JobName, clear: bool) {
        if self.cluster.rejected.remove(&(namespace.clone(), name.clone())).is_none() {
            return;
        }
        self.dirty.step.writes.push(super::Write { key: records::rejected(namespace, name), value: None });
        if clear {
            let topic = Topic::job(namespace, name, JobTopic::Status);
            self.effect(Effect::Publish { topic, payload: Vec::new(), retain: true });
        }
    }
}
