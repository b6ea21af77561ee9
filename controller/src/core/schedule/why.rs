//! Why a job's pods are where they are, or have no node, and what would change that: in words for people, and the same
//! as data. Reads everything, decides nothing.

use std::collections::BTreeMap;

use berth_protocol::ids::{JobUid, NodeId, PodId, PodName};
use berth_protocol::job::PodTemplate;
use berth_protocol::limits::QUERY_PAGE_ROWS_MAX;
use berth_protocol::message::query::{Explanation, Freeing, NodeVerdict, PodSeat, ReasonCount};

use super::super::Controller;
use super::super::cluster::{Job, Liveness, Verdict};
use super::explain::{self, Reason};
use super::hold::Kind;
use super::problem::Zoning;
use super::quota::Sum;

/// Pods and nodes that a line names before it only counts them.
const NAMED_MAX: usize = 4;

impl Controller {
    /// Why the job's waiting pods have no node: a word, and a line.
    pub(in crate::core) fn why_waiting(&mut self, uid: &JobUid) -> (String, String) {
        let unschedulable = "Unschedulable".to_owned();
        let job = self.cluster.jobs.get(uid);
        if let Some(missing) = job.and_then(|job| self.missing_secret(&job.file.spec)) {
            return ("SecretMissing".to_owned(), missing.to_string());
        }
        if let Some(over) = self.over_quota_words(uid) {
            return ("QuotaExceeded".to_owned(), over);
        }
        if let Some(held) = self.hold_words(uid) {
            return (unschedulable, held);
        }
        let summary = self.against(uid);
        let Some(job) = self.cluster.jobs.get(uid) else { return (unschedulable, summary) };
        let spec = &job.file.spec;
        let fits = !summary.starts_with("0 of") && !summary.starts_with("there are no");
        let more = match () {
            () if !fits => None,
            () if spec.gang => {
                let pods = job.ready().count();
                Some(format!("as a gang its {pods} waiting pods start together or not at all"))
            }
            () if spec.placement.anti_affinity.is_some() => {
                Some("antiAffinity keeps its pods apart".to_owned())
            }
            () => None,
        };
        (unschedulable, more.map_or(summary.clone(), |more| format!("{summary}; {more}")))
    }

    /// What stands against one more pod, counted over the nodes; found out once for all jobs that ask for the same.
    fn against(&mut self, uid: &JobUid) -> String {
        self.survey(uid);
        let version = self.scheduler.version;
        let Some(id) = self.cluster.jobs.get(uid).and_then(|job| job.class) else {
            return "its conditions are not understood by this version of the controller: submit it anew"
                .to_owned();
        };
        if let Some((at, why)) = self.scheduler.classes.get(id).and_then(|class| class.why.as_ref())
            && *at == version
            && !self.scheduler.holds.is_any()
        {
            return why.clone();
        }
        let verdicts = self.verdicts_with_needs(uid);
        let why =
            explain::summary(verdicts.len(), verdicts.iter().filter_map(|(_, reasons)| reasons.first()));
        if let Some(class) = self.scheduler.classes.get_mut(id) {
            class.why = Some((version, why.clone()));
        }
        why
    }

    fn over_quota_words(&self, uid: &JobUid) -> Option<String> {
        let job = self.cluster.jobs.get(uid)?;
        let class = self.scheduler.classes.get(job.class?)?;
        let pods = if job.file.spec.gang { job.ready().count() } else { 1 };
        self.scheduler.ledger.over_quota(&job.file.spec.namespace, Sum::of_pods(class.wants(), pods))
    }

    /// Where room is held for the job, and who has to go first.
    fn hold_words(&self, uid: &JobUid) -> Option<String> {
        let hold = self.scheduler.holds.get(uid)?;
        let nodes: Vec<&str> = hold.rooms.keys().map(|room| self.scheduler.nodes[*room].as_str()).collect();
        let pods: Vec<String> =
            hold.rooms.values().flat_map(|held| &held.waits_for).map(|pod| self.pod_words(pod)).collect();
        let (nodes, one) = (list(&nodes), pods.len() == 1);
        let who = if pods.is_empty() { String::new() } else { list(&pods) };
        Some(match hold.kind {
            Kind::Preemption if who.is_empty() => format!("room on {nodes} is held for it"),
            Kind::Preemption if one => format!("{who} makes way for it on {nodes}"),
            Kind::Preemption => format!("{who} make way for it on {nodes}"),
            Kind::Move => format!("room on {nodes} is held for it while others move"),
            Kind::Head | Kind::Overdue if who.is_empty() => format!("room on {nodes} is held for it"),
            Kind::Head | Kind::Overdue => {
                format!(
                    "room on {nodes} is held for it until {who} {}",
                    if one { "has ended" } else { "have ended" }
                )
            }
        })
    }

    fn pod_words(&self, pod: &PodId) -> String {
        self.cluster.jobs.get(&pod.uid).map_or_else(
            || pod.to_string(),
            |job| format!("{}/{}", job.file.spec.namespace, job.file.spec.name.pod(pod.index)),
        )
    }

    /// For every node every reason against one more pod of the job.
    pub(in crate::core) fn verdicts(&self, uid: &JobUid) -> Vec<(usize, Vec<Reason>)> {
        let Some(job) = self.cluster.jobs.get(uid) else { return Vec::new() };
        let shape = self.scheduler.shape(&job.file.spec.pod.resources());
        let class = job.class.and_then(|id| self.scheduler.classes.get(id));
        let book = class.and_then(|class| self.scheduler.books.get(class.book()));
        let zoned = self.scheduler.zoned(job);
        let verdict = |room: usize| {
            let node = self.cluster.nodes.get(&self.scheduler.nodes[room]);
            let closed = node.and_then(|node| match (node.liveness, node.record.cordoned) {
                (Liveness::Lost, _) => Some("offline"),
                (Liveness::Silent, _) => Some("silent"),
                (Liveness::Online, true) => Some("cordoned"),
                (Liveness::Online, false) if !node.record.strays.is_empty() => Some("still ending pods"),
                (Liveness::Online, false) => None,
            });
            let refusals = book.map_or(&[][..], |book| book.refusals(room));
            let free = &self.scheduler.rooms()[room];
            let gpus = node.map(|node| &node.record.inventory.gpus[..]).unwrap_or_default();
            let taken = gpus.iter().filter(|gpu| gpu.outside.0 > 0).count();
            let mut reasons = explain::reasons(free, &shape, refusals, closed, taken, &job.file.spec);
            let own =
                book.filter(|book| book.zoning == Zoning::Apart).and_then(|book| book.sites().get(room));
            if own.is_some_and(|site| zoned.contains_key(&site.zone)) {
                reasons.push(explain::apart());
            }
            if reasons.is_empty()
                && let Some((holder, _)) =
                    self.scheduler.holds.holder(room).filter(|(holder, _)| *holder != uid)
                && self.scheduler.holds.reduced(room, free).fit(&shape).is_none()
            {
                let holder = self.cluster.jobs.get(holder).map(|job| &job.file.spec);
                reasons.push(explain::held(holder.map(|spec| format!("{}/{}", spec.namespace, spec.name))));
            }
            (room, reasons)
        };
        (0..self.scheduler.rooms().len()).map(verdict).collect()
    }

    /// All of it, for `berth explain`.
    pub(in crate::core) fn explanation(&mut self, uid: &JobUid) -> Option<Explanation> {
        self.survey(uid);
        let (reason, words) = self.why_waiting(uid);
        let verdicts = self.verdicts_with_needs(uid);
        let fit = verdicts.iter().filter(|(_, reasons)| reasons.is_empty()).count();
        let mut counts: BTreeMap<String, u32> = BTreeMap::new();
        for (_, reasons) in &verdicts {
            for reason in reasons {
                *counts.entry(reason.counted()).or_default() += 1;
            }
        }
        let mut counts: Vec<ReasonCount> =
            counts.into_iter().map(|(reason, nodes)| ReasonCount { reason, nodes }).collect();
        counts.sort_by(|a, b| b.nodes.cmp(&a.nodes).then_with(|| a.reason.cmp(&b.reason)));
        let ready = self.cluster.jobs.get(uid)?.ready().count();
        let freeing = if ready > 0 { self.freeing(uid) } else { None };
        let job = self.cluster.jobs.get(uid)?;
        let name = &job.file.spec.name;
        let pods_on = |node: &NodeId| -> Vec<PodName> {
            let here = |i: &&u32| job.assignment(**i).is_some_and(|assignment| assignment.node == *node);
            job.placed().iter().filter(here).take(QUERY_PAGE_ROWS_MAX).map(|i| name.pod(*i)).collect()
        };
        let nearest = verdicts
            .iter()
            .filter(|(_, reasons)| !reasons.is_empty())
            .min_by_key(|(room, reasons)| (reasons.len(), reasons[0].distance(), *room));
        let row = |(room, reasons): &(usize, Vec<Reason>)| {
            self.verdict_row(&job.file.spec.pod, *room, reasons, &pods_on)
        };
        let nearest = nearest.map(row);
        let nodes = verdicts.iter().take(QUERY_PAGE_ROWS_MAX).map(row).collect();
        let ledger = &self.scheduler.ledger;
        let order = self.scheduler.queue.in_order(|namespace| ledger.share(namespace));
        let ahead = order.iter().position(|other| *other == uid).unwrap_or(0);
        let summary = match ready {
            0 if job.is_finished() => {
                job.run.verdict.as_ref().map_or_else(|| "it has ended".to_owned(), ended)
            }
            0 if job.run.suspended => "it is suspended: `berth resume` lets it go on".to_owned(),
            0 if !job.waiting().is_empty() => "it waits before its next start after a failure".to_owned(),
            0 => format!("no pod waits; one more would fit {fit} of {} nodes", verdicts.len()),
            _ => words,
        };
        let held =
            self.scheduler.holds.rooms_of(uid).map(|room| self.scheduler.nodes[room].clone()).collect();
        Some(Explanation {
            namespace: job.file.spec.namespace.clone(),
            job: name.clone(),
            summary,
            reason: (ready > 0).then_some(reason),
            waiting: u32::try_from(job.waiting().len()).unwrap_or(u32::MAX),
            ahead: u32::try_from(if ready > 0 { ahead } else { 0 }).unwrap_or(u32::MAX),
            counts,
            nearest: if fit == 0 { nearest } else { None },
            freeing,
            held,
            seats: self.seats(job),
            nodes,
        })
    }

    fn verdict_row(
        &self,
        pod: &PodTemplate,
        room: usize,
        reasons: &[Reason],
        pods_on: &dyn Fn(&NodeId) -> Vec<PodName>,
    ) -> NodeVerdict {
        let node = self.scheduler.nodes[room].clone();
        let pods = pods_on(&node);
        let reasons: Vec<String> = reasons.iter().map(|reason| reason.text.clone()).collect();
        let has_image = self.scheduler.has_images(pod, &node);
        NodeVerdict { node, fits: reasons.is_empty(), reasons, pods, has_image }
    }

    /// The least that would have to end for the next pod to start, whatever the priorities.
    fn freeing(&self, uid: &JobUid) -> Option<Freeing> {
        let rooms = self.rooms_for(uid, |_, _, _| true, |_, _| 1)?;
        let nodes: Vec<NodeId> = rooms.keys().map(|room| self.scheduler.nodes[*room].clone()).collect();
        let pods: Vec<&PodId> = rooms.values().flat_map(|held| &held.waits_for).collect();
        let charges = pods.iter().filter_map(|pod| {
            Some(Sum::of_charge(&self.cluster.jobs.get(&pod.uid)?.assignment(pod.index)?.charge))
        });
        let sum = charges.fold(Sum::default(), Sum::plus);
        let pods: Vec<String> = pods.into_iter().map(|pod| self.pod_words(pod)).collect();
        if pods.is_empty() {
            return None;
        }
        Some(Freeing {
            nodes,
            pods,
            cpu_milli: berth_protocol::units::MilliCpu(sum.cpu),
            memory_bytes: berth_protocol::units::Bytes(sum.memory),
            gpu_milli: sum.gpu_milli,
        })
    }

    /// Where the job's pods are, and what spoke for it.
    fn seats(&self, job: &Job) -> Vec<PodSeat> {
        let class = job.class.and_then(|id| self.scheduler.classes.get(id));
        let book = class.and_then(|class| self.scheduler.books.get(class.book()));
        let best = book.and_then(|book| book.sites().iter().map(|site| site.bonus).max()).unwrap_or(0);
        let homes = self.homes(job);
        let zoned = self.scheduler.zoned(job);
        let seat = |index: &u32| {
            let assignment = job.assignment(*index)?;
            let room = self.scheduler.room(&assignment.node)?;
            let site = book.and_then(|book| book.sites().get(room).copied()).unwrap_or_default();
            let mut why = Vec::new();
            if homes.contains(&room) {
                why.push("its named volumes are there".to_owned());
            }
            if let Some(book) = book.filter(|book| book.has_preferences()) {
                let _ = book;
                why.push(format!("its preferences weigh {} there, at most {best} anywhere", site.bonus));
            }
            match book.map(|book| book.zoning) {
                Some(Zoning::Spread) => {
                    let here = zoned.get(&site.zone).copied().unwrap_or(0);
                    let zones = zoned.len();
                    why.push(format!(
                        "spread: {here} of {} pods in this of {zones} zones",
                        job.placed().len()
                    ));
                }
                Some(Zoning::Apart) => why.push("kept apart from the job's other pods".to_owned()),
                _ => {}
            }
            why.push("of the nodes that fit equally well by that, the one it fragments least".to_owned());
            if assignment.had_images {
                why.push("the node had the image already".to_owned());
            }
            Some(PodSeat { pod: job.file.spec.name.pod(*index), node: assignment.node.clone(), why })
        };
        job.placed().iter().take(QUERY_PAGE_ROWS_MAX).filter_map(seat).collect()
    }
}

/// `it has ended: Failed, ImageNotFound: there is no such image`
fn ended(verdict: &Verdict) -> String {
    let reason = verdict.reason.as_ref().map(|reason| format!(", {reason}")).unwrap_or_default();
    let message = verdict.message.as_ref().map(|message| format!(": {message}")).unwrap_or_default();
    format!("it has ended: {:?}{reason}{message}", verdict.phase)
}

/// `a, b and 3 more`
fn list<T: AsRef<str>>(items: &[T]) -> String {
    let named: Vec<&str> = items.iter().take(NAMED_MAX).map(AsRef::as_ref).collect();
    match (items.len(), &named[..]) {
        (n, _) if n > NAMED_MAX => format!("{} and {} more", named.join(", "), n - NAMED_MAX),
        (_, [rest @ .., last]) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => named.join(""),
    }
}
