//! Answers to what the CLI asks; changes nothing but who follows a log, and what nodes take.

use berth_protocol::codec::CodecError;
use berth_protocol::ids::{ClientId, Epoch, JobName, JobUid, Namespace, NodeId, PodName, RequestId};
use berth_protocol::job;
use berth_protocol::join::Role;
use berth_protocol::limits::{FOLLOW_MS, MESSAGE_BYTES_MAX, QUERY_PAGE_ROWS_MAX};
use berth_protocol::message::node::DepotAccess;
use berth_protocol::message::query::{
    AuditRow, ControllerVersion, JobDetail, LogPosition, LogSource, LogSources, OutputRow, Page, PodRow,
    Query, QueryError, QueryReply, QueryRequest,
};
use berth_protocol::message::user::NodeStatus;
use berth_protocol::tls::Party;
use berth_protocol::token::{self, Scope};
use berth_protocol::topic::Topic;
use berth_protocol::units::Millis;
use serde::Serialize;
use serde_json::Value;

use super::callers::{Author, Caller, Denied, Sight};
use super::cluster::{Job, PodState};
use super::{Controller, Effect, Now, fit};

/// A client's depot token.
const TOKEN_LIFE: Millis = Millis(600_000);
/// What a page's rows may take, so that the reply around them fits a message.
const ROWS_BYTES_MAX: usize = MESSAGE_BYTES_MAX - 2 * 1024;
/// What stands around a page's rows, a notice included.
const PAGE_FRAME_BYTES: usize = 1024;
/// What stands around the sources of logs: the depot's address and token.
const LOGS_FRAME_BYTES: usize = 4 * 1024;
/// What stands between a job's status and its file.
const DETAIL_FRAME_BYTES: usize = 16;

pub(super) type Answer = Result<Value, QueryError>;

pub(super) fn not_found(message: String) -> QueryError {
    QueryError { code: "NotFound".to_owned(), message }
}

pub(super) fn value<T: Serialize>(answer: &T) -> Answer {
    serde_json::to_value(answer)
        .map_err(|error| QueryError { code: "Unavailable".to_owned(), message: error.to_string() })
}

/// Rows, each with the word that asks for what comes after it, until a page is full.
pub(super) fn page<T: Serialize>(rows: impl Iterator<Item = (String, T)>) -> Answer {
    value(&filled(rows)?)
}

fn filled<T: Serialize>(rows: impl Iterator<Item = (String, T)>) -> Result<Page<Value>, QueryError> {
    let (mut kept, mut bytes, mut last, mut next) = (Vec::new(), PAGE_FRAME_BYTES, None, None);
    for (key, row) in rows {
        let row = value(&row)?;
        let size = row.to_string().len() + 1;
        if kept.len() == QUERY_PAGE_ROWS_MAX || (bytes + size > ROWS_BYTES_MAX && !kept.is_empty()) {
            next = last;
            break;
        }
        bytes += size;
        kept.push(row);
        last = Some(key);
    }
    Ok(Page { rows: kept, next, notice: None })
}

/// What an answer to the question may tell, where it may be asked at all.
fn sight(caller: &Caller, query: &Query) -> Result<Sight, Denied> {
    match query {
        Query::Jobs { namespace, .. }
        | Query::Pods { namespace, .. }
        | Query::Checkpoints { namespace, .. }
        | Query::Checkpoint { namespace, .. } => caller.sight(namespace.as_ref()),
        Query::Job { namespace, .. }
        | Query::Explain { namespace, .. }
        | Query::Logs { namespace, .. }
        | Query::Outputs { namespace, .. }
        | Query::Depot { namespace } => caller.sight(Some(namespace)),
        Query::Audit { namespace: Some(namespace), .. } => {
            caller.may(namespace, Role::Admin)?;
            caller.sight(Some(namespace))
        }
        Query::Audit { namespace: None, .. }
        | Query::Cordon { .. }
        | Query::Uncordon { .. }
        | Query::Drain { .. }
        | Query::NodeLost { .. }
        | Query::Defrag { .. } => caller.may_all().map(|()| Sight::All),
        Query::Nodes { .. } | Query::Node { .. } | Query::Version => Ok(Sight::All),
    }
}

/// Does it more than tell?
fn acts(query: &Query) -> bool {
    matches!(
        query,
        Query::Cordon { .. }
            | Query::Uncordon { .. }
            | Query::Drain { .. }
            | Query::NodeLost { .. }
            | Query::Defrag { execute: true, .. }
    )
}

/// As the audit log says it.
fn about(query: &Query) -> (&'static str, String) {
    let of = |namespace: &Option<Namespace>| match namespace {
        Some(namespace) => format!("namespace {namespace}"),
        None => "all namespaces".to_owned(),
    };
    match query {
        Query::Jobs { namespace, .. }
        | Query::Pods { namespace, .. }
        | Query::Checkpoints { namespace, .. }
        | Query::Checkpoint { namespace, .. } => ("view", of(namespace)),
        Query::Audit { namespace, .. } => ("audit", of(namespace)),
        Query::Depot { namespace } => ("view", of(&Some(namespace.clone()))),
        Query::Job { namespace, job }
        | Query::Explain { namespace, job }
        | Query::Logs { namespace, job, .. }
        | Query::Outputs { namespace, job, .. } => ("view", format!("job {namespace}/{job}")),
        Query::Cordon { node } => ("cordon", format!("node {node}")),
        Query::Uncordon { node } => ("uncordon", format!("node {node}")),
        Query::Drain { node, .. } => ("drain", format!("node {node}")),
        Query::NodeLost { node, powered_off: false } => ("give up", format!("node {node}")),
        Query::NodeLost { node, powered_off: true } => ("give up as powered off", format!("node {node}")),
        Query::Node { node } => ("view", format!("node {node}")),
        Query::Defrag { .. } => ("defrag", "all nodes".to_owned()),
        Query::Nodes { .. } | Query::Version => ("view", "the cluster".to_owned()),
    }
}

/// What of the audit log somebody wants to read, and may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditQuestion {
    topic: Topic,
    id: RequestId,
    sight: Sight,
    /// The key that the last page ended with.
    pub before: Option<String>,
}

impl AuditQuestion {
    /// The reply, of entries in the order of their keys from the latest on; `whole`: there are no more.
    pub fn reply(self, entries: Vec<(String, Vec<u8>)>, whole: bool) -> (Topic, Vec<u8>) {
        let last = entries.last().map(|(key, _)| key.clone()).filter(|_| !whole);
        let read = |(key, value): (String, Vec<u8>)| Some((key, serde_json::from_slice(&value).ok()?));
        let rows = entries.into_iter().filter_map(read).filter(|(_, row)| self.tells(row));
        let answer = page(rows).map(|mut page| {
            if let (Some(last), Value::Object(page)) = (last, &mut page) {
                page.entry("next").or_insert(Value::String(last));
            }
            page
        });
        let (result, error) = match answer {
            Ok(result) => (Some(result), None),
            Err(error) => (None, Some(error)),
        };
        let reply = QueryReply { id: self.id, result, error };
        (self.topic, serde_json::to_vec(&reply).unwrap_or_default())
    }

    fn tells(&self, row: &AuditRow) -> bool {
        let of = |rest: &str| Namespace::parse(rest.split('/').next().unwrap_or(rest)).ok();
        let what = ["job ", "secret ", "namespace "].into_iter().find_map(|what| row.on.strip_prefix(what));
        let namespace = what.and_then(of);
        self.sight == Sight::All || namespace.is_some_and(|namespace| self.sight.covers(&namespace))
    }
}

impl Controller {
    pub(super) fn query(&mut self, now: Now, by: Option<&Author>, client: &ClientId, request: QueryRequest) {
        let topic = Topic::QueryReply { client: client.clone() };
        let (what, on) = about(&request.query);
        let allowed = self.caller(now, by).and_then(|caller| {
            let sight = sight(&caller, &request.query)?;
            Ok((caller, sight))
        });
        let answer = match allowed {
            Err(denied) => {
                self.denied(now, by, what, on, &denied);
                Err(QueryError { code: denied.code().to_owned(), message: denied.to_string() })
            }
            Ok((caller, sight)) => {
                if let Query::Audit { after, .. } = request.query {
                    let question = AuditQuestion { topic, id: request.id, sight, before: after };
                    return self.effect(Effect::ReadAudit(Box::new(question)));
                }
                let acts = acts(&request.query);
                let answer = self.ask_query(now, &caller, &sight, request.query);
                match &answer {
                    Ok(_) if acts => self.audit(now, &caller.actor, what, on),
                    Err(error) if acts => {
                        self.audit_refused(now, &caller.actor, what, on, error.message.clone());
                    }
                    _ => {}
                }
                answer
            }
        };
        let (result, error) = match answer {
            Ok(result) => (Some(result), None),
            Err(error) => (None, Some(error)),
        };
        let reply = QueryReply { id: request.id, result, error };
        if reply.result.as_ref().is_some_and(|result| result.to_string().len() > ROWS_BYTES_MAX) {
            let message = "the answer is longer than a message may be: ask for it in pages".to_owned();
            let error = Some(QueryError { code: "Unavailable".to_owned(), message });
            return self.publish(topic, &QueryReply { result: None, error, ..reply }, false);
        }
        self.publish(topic, &reply, false);
    }

    fn node_after(&self, there: bool, node: &NodeId) -> Answer {
        let status = self.node_status(node).filter(|_| there);
        value(&status.ok_or_else(|| not_found(format!("there is no node {node}")))?)
    }

    /// A question that cannot be read is answered too, where its id can.
    pub(super) fn query_unread(&mut self, client: &ClientId, payload: &[u8], error: &CodecError) {
        #[derive(serde::Deserialize)]
        struct Asked {
            id: RequestId,
        }
        if payload.len() > MESSAGE_BYTES_MAX {
            return;
        }
        if let Ok(Asked { id }) = serde_json::from_slice(payload) {
            let error = Some(QueryError { code: "Malformed".to_owned(), message: error.to_string() });
            let reply = QueryReply { id, result: None, error };
            self.publish(Topic::QueryReply { client: client.clone() }, &reply, false);
        }
    }

    fn find(&self, namespace: &Namespace, name: &JobName) -> Result<JobUid, QueryError> {
        let uid = self.cluster.names.get(&(namespace.clone(), name.clone()));
        let live = uid.filter(|uid| self.cluster.jobs.get(uid).is_some_and(|job| !job.run.expired));
        live.cloned().ok_or_else(|| not_found(format!("there is no job {name} in namespace {namespace}")))
    }

    fn job_at(&self, namespace: &Namespace, name: &JobName) -> Result<(JobUid, &Job), QueryError> {
        let uid = self.find(namespace, name)?;
        let job = self.cluster.jobs.get(&uid);
        job.map(|job| (uid.clone(), job)).ok_or_else(|| not_found(format!("there is no job {name}")))
    }

    fn ask_query(&mut self, now: Now, caller: &Caller, sight: &Sight, query: Query) -> Answer {
        match query {
            Query::Jobs { after, .. } => self.jobs_page(sight, after.as_deref()),
            Query::Job { namespace, job } => {
                let uid = self.find(&namespace, &job)?;
                let mut status =
                    self.job_status(&uid).ok_or_else(|| not_found(format!("there is no job {job}")))?;
                let (_, job) = self.job_at(&namespace, &job)?;
                let spec = job::render(&job.file.spec);
                let rest = spec.to_string().len() + DETAIL_FRAME_BYTES;
                fit::status(&mut status, ROWS_BYTES_MAX.saturating_sub(rest));
                value(&JobDetail { status, spec })
            }
            Query::Pods { job, after, .. } => self.pods_page(sight, job.as_ref(), after.as_deref()),
            Query::Nodes { after } => {
                let nodes =
                    self.cluster.nodes.keys().filter(|id| after.as_deref().is_none_or(|a| id.as_str() > a));
                let nodes = filled(nodes.filter_map(|id| Some((id.to_string(), self.node_status(id)?))))?;
                value(&Page { notice: self.key_ending(now), ..nodes })
            }
            Query::Node { node } => {
                let has = self.cluster.nodes.get(&node).map(|node| &node.record.inventory);
                let status = self.node_status(&node).zip(has);
                let status = status.map(|(status, has)| {
                    let (images, policy) = (has.images.clone(), has.policy.clone());
                    NodeStatus { images, policy, ..status }
                });
                value(&status.ok_or_else(|| not_found(format!("there is no node {node}")))?)
            }
            Query::Explain { namespace, job } => self.explain(caller, &namespace, &job),
            Query::Logs { namespace, job, follow, from, after } => {
                let depot = self.depot(now, caller, namespace.clone());
                self.logs(now, depot, (&namespace, &job), follow, &from, after.as_deref())
            }
            Query::Outputs { namespace, job, after } => self.outputs_page(&namespace, &job, after.as_deref()),
            Query::Depot { namespace } => value(&self.depot(now, caller, namespace)),
            Query::Checkpoints { job, after, .. } => {
                self.checkpoints_page(sight, job.as_ref(), after.as_deref())
            }
            Query::Checkpoint { id, .. } => self.checkpoint_detail(now, caller, sight, &id),
            // Read where it is kept.
            Query::Audit { .. } => value(&()),
            Query::Cordon { node } => {
                let there = self.cordon(now, &node, true);
                self.node_after(there, &node)
            }
            Query::Uncordon { node } => {
                let there = self.cordon(now, &node, false);
                self.node_after(there, &node)
            }
            Query::Drain { node, deadline } => {
                let there = self.drain(now, &node, deadline);
                self.node_after(there, &node)
            }
            Query::NodeLost { node, powered_off } => {
                self.give_up(now, &node, powered_off)?;
                self.node_after(true, &node)
            }
            Query::Defrag { moves, execute } => self.defrag(now, usize::from(moves), execute),
            Query::Version => value(&ControllerVersion {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                cluster: self.config.cluster.to_string(),
            }),
        }
    }

    pub(super) fn depot(&self, now: Now, caller: &Caller, namespace: Namespace) -> DepotAccess {
        let expires = now.wall.plus(TOKEN_LIFE);
        let scope = match caller.may(&namespace, Role::Submit) {
            Ok(()) => Scope::Namespace(namespace),
            Err(_) => Scope::View(namespace),
        };
        let token = token::mint(&self.config.secret, &scope, expires);
        DepotAccess {
            url: self.config.depot_url.clone(),
            token,
            expires,
            tls: self.identity_of(Party::Controller),
            peer: None,
        }
    }

    /// Jobs behind `after`, which is `namespace/job`.
    fn names_after(&self, sight: &Sight, after: Option<&str>) -> Vec<(String, JobUid)> {
        let after = after.and_then(|text| text.split_once('/')).and_then(|(namespace, job)| {
            Some((Namespace::parse(namespace).ok()?, JobName::parse(job).ok()?))
        });
        let wanted =
            |name: &(Namespace, JobName)| sight.covers(&name.0) && after.as_ref().is_none_or(|a| name > a);
        let live = |uid: &JobUid| self.cluster.jobs.get(uid).is_some_and(|job| !job.run.expired);
        let names = self.cluster.names.iter().filter(|(name, uid)| wanted(name) && live(uid));
        names.map(|((namespace, job), uid)| (format!("{namespace}/{job}"), uid.clone())).collect()
    }

    fn jobs_page(&mut self, sight: &Sight, after: Option<&str>) -> Answer {
        let names = self.names_after(sight, after);
        page(names.into_iter().filter_map(|(key, uid)| {
            let mut status = self.job_status(&uid)?;
            fit::status(&mut status, ROWS_BYTES_MAX);
            Some((key, status))
        }))
    }

    /// Pods in the order of their jobs' names; `after` is `namespace/job/index`.
    fn pods_page(&self, sight: &Sight, name: Option<&JobName>, after: Option<&str>) -> Answer {
        let after = after.and_then(|text| text.rsplit_once('/'));
        let after = after.and_then(|(job, index)| Some((job, index.parse::<u32>().ok()?)));
        let rows = self
            .cluster
            .names
            .iter()
            .filter(|(key, _)| sight.covers(&key.0) && name.is_none_or(|name| key.1 == *name));
        let from = after.and_then(|(job, index)| {
            let (namespace, job) = job.split_once('/')?;
            Some((Namespace::parse(namespace).ok()?, JobName::parse(job).ok()?, index))
        });
        let rows =
            rows.filter_map(|(key, uid)| Some((key, self.cluster.jobs.get(uid).filter(|j| !j.run.expired)?)));
        let rows = rows.flat_map(|(key, job)| job.pods().keys().map(move |index| (key, job, *index)));
        let rows = rows.filter(|(key, _, index)| {
            from.as_ref()
                .is_none_or(|(namespace, job, last)| (&key.0, &key.1, index) > (namespace, job, last))
        });
        page(rows.filter_map(|((namespace, name), job, index)| {
            let status = self.pod_status(job, index)?;
            let row = PodRow { namespace: namespace.clone(), job: name.clone(), status };
            Some((format!("{namespace}/{name}/{index}"), row))
        }))
    }

    /// What a job's pods have left in the depot; `after` is a pod's name.
    fn outputs_page(&self, namespace: &Namespace, name: &JobName, after: Option<&str>) -> Answer {
        let (_, job) = self.job_at(namespace, name)?;
        let after = after.and_then(|text| PodName::parse(text).ok()).map(|pod| pod.index);
        let pods = job.pods().iter().filter(|(index, _)| after.is_none_or(|after| **index > after));
        page(pods.filter_map(|(index, pod)| {
            let output = pod.output.as_ref()?;
            let row = OutputRow {
                pod: name.pod(*index),
                epoch: output.epoch,
                digest: output.digest,
                bytes: output.bytes,
                path: format!("/v1/blobs/{}", output.digest.hex()),
                at: output.at,
            };
            Some((row.pod.to_string(), row))
        }))
    }

    fn explain(&mut self, caller: &Caller, namespace: &Namespace, name: &JobName) -> Answer {
        let uid = self.find(namespace, name)?;
        let explained = self.explanation(&uid);
        let mut explained = explained.ok_or_else(|| not_found(format!("there is no job {name}")))?;
        if let Some(freeing) = &mut explained.freeing {
            // What others run is not told by name.
            let theirs = |pod: &String| {
                let namespace =
                    pod.split_once('/').and_then(|(namespace, _)| Namespace::parse(namespace).ok());
                namespace.is_some_and(|namespace| caller.may(&namespace, Role::View).is_ok())
            };
            freeing.pods.retain(theirs);
        }
        // The reply is one message: on a large fleet the first nodes stand for the rest.
        while serde_json::to_vec(&explained).is_ok_and(|bytes| bytes.len() > ROWS_BYTES_MAX)
            && (!explained.nodes.is_empty() || !explained.seats.is_empty())
        {
            explained.nodes.truncate(explained.nodes.len() / 2);
            explained.seats.truncate(explained.seats.len() / 2);
        }
        value(&explained)
    }

    fn logs(
        &mut self,
        now: Now,
        depot: DepotAccess,
        (namespace, name): (&Namespace, &JobName),
        follow: bool,
        from: &[LogPosition],
        after: Option<&str>,
    ) -> Answer {
        let after = after.and_then(|text| text.split_once('/'));
        let after = after.and_then(|(index, epoch)| Some((index.parse().ok()?, Epoch(epoch.parse().ok()?))));
        let uid = self.find(namespace, name)?;
        let Some(job) = self.cluster.jobs.get_mut(&uid) else {
            return Err(not_found(format!("there is no job {name}")));
        };
        if follow {
            job.followed_until = Some(now.boot.plus(Millis(FOLLOW_MS)));
        }
        let logs = job.pods().iter().flat_map(|(index, pod)| {
            let placed = matches!(pod.state, PodState::Placed(_)).then_some(pod.epoch);
            pod.logs.iter().map(move |log| (*index, log, placed == Some(log.epoch)))
        });
        let logs: Vec<_> = logs.map(|(index, log, live)| (index, log.clone(), live)).collect();
        let finished = job.is_finished()
            && logs.iter().all(|(_, log, _)| log.stored || log.records.is_none() || log.cut.is_some());
        let many = job.file.spec.completions > 1;
        let containers = job.file.spec.pod.containers.len() > 1;
        let (mut sources, mut bytes, mut last, mut next) = (Vec::new(), 0, None, None);
        for (index, log, live) in logs {
            // What is cut off a later epoch says again.
            let kept = log.cut.is_some_and(|cut| cut <= log.kept);
            let at = (index, log.epoch);
            if after.is_some_and(|after| at <= after) {
                continue;
            }
            let source = LogSource {
                pod: name.pod(index),
                epoch: log.epoch,
                records: log.cut.map_or(log.records, |cut| Some(log.records.map_or(cut, |all| all.min(cut)))),
                stored: (log.stored || kept).then(|| format!("/v1/logs/{uid}/{index}/{}", log.epoch)),
                node: log.node.clone(),
            };
            bytes += value(&source)?.to_string().len() + 1;
            if let Some((index, epoch)) = last
                && bytes > ROWS_BYTES_MAX - LOGS_FRAME_BYTES
            {
                next = Some(format!("{index}/{epoch}"));
                break;
            }
            last = Some(at);
            if let Some(node) = log.node.as_ref().filter(|_| !log.stored && !kept) {
                let read = |at: &&LogPosition| at.pod.index == index && at.epoch == log.epoch;
                let seq = from.iter().find(read).map_or(1, |at| at.seq);
                self.request_log(node, uid.pod(index), log.epoch, seq, follow && live);
            }
            sources.push(source);
        }
        value(&LogSources { sources, finished, many, containers, depot, next })
    }

    /// A pod placed while its job's logs are followed is asked for its log as soon as its node is told of it.
    pub(super) fn follow_placed(&mut self, now: Now, uid: &JobUid, index: u32) {
        let Some(job) = self.cluster.jobs.get(uid) else { return };
        if job.followed_until.is_none_or(|until| until < now.boot) {
            return;
        }
        let (Some(assignment), Some(pod)) = (job.assignment(index), job.pod(index)) else { return };
        self.dirty.follow.push((assignment.node.clone(), uid.pod(index), pod.epoch));
    }
}
