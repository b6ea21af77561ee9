//! Follows a job's output, live and from the depot, until the job has ended and everything was shown.
//!
//! Agents publish while somebody asks for it; what is lost on the way is asked for again, or comes from the depot.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use berth_protocol::codec;
use berth_protocol::ids::{Epoch, Generation, JobName, Namespace, PodName, RequestId};
use berth_protocol::limits::FOLLOW_MS;
use berth_protocol::log::LogMessage;
use berth_protocol::message::query::{LogSource, LogSources, Query};
use berth_protocol::message::user::{Answer, Command, JobCommand, Verdict};
use berth_protocol::topic::{JobTopic, Topic};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::connect::{Message, News, RESEND_MIN, Refused, Session, result};
use super::depot::Depot;
use super::get;
use super::interrupts::{Interrupts, interrupted};
use super::logs::Printer;
use super::order::{Line, Order};
use super::wait::{self, Seen};

/// Agents forget followers after `FOLLOW_MS`.
const RENEW: Duration = Duration::from_millis(FOLLOW_MS / 3);
/// A gap is asked about after the first, doubling to the second.
const GAP_MIN: Duration = Duration::from_millis(200);
const GAP_MAX: Duration = Duration::from_secs(5);
/// An epoch whose rest does not come holds back later ones this long.
const STUCK: Duration = Duration::from_secs(5);
/// After the job's end its records may take this long.
const TAIL: Duration = Duration::from_secs(20);
/// Pieces of a stored log that may wait to be shown.
const PIECES_MAX: usize = 4;
/// Without `-f`: a running pod that says nothing for this long has said what it had.
const QUIET: Duration = Duration::from_millis(500);

/// Whose output.
pub struct Target {
    pub namespace: Namespace,
    pub job: JobName,
    /// One pod of the job alone.
    pub pod: Option<PodName>,
    /// And of no earlier generation.
    pub generation: Generation,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// The job has ended.
    Ended,
    /// What is there now has been shown.
    Quiet,
}

pub struct Follow<'a> {
    session: &'a mut Session,
    target: Target,
    until: Until,
    printer: Printer,
    /// What stands before each line is known: of a job that was submitted here nothing.
    named: bool,
    order: Order,
    /// The job's last status of the generation that is followed.
    seen: Option<Seen>,
    told: Option<String>,
    asked: Option<(RequestId, Instant)>,
    ask_at: Instant,
    gap: Duration,
    /// The pages of the controller's list that have come, and what to ask for the next by.
    pages: Vec<LogSource>,
    next_page: Option<String>,
    /// The controller has listed the job's logs, and when.
    listed: Option<Instant>,
    /// Nothing more will come, says the controller.
    finished: bool,
    ended_at: Option<Instant>,
    /// The list is younger than the job's end.
    listed_after_end: bool,
    /// The last record came, or the last epoch was closed.
    moved_at: Instant,
    interrupts: Option<Interrupts>,
}

/// Left by a second Ctrl-C; the job is still being cancelled.
#[derive(Debug, thiserror::Error)]
#[error("left job {job}, which is being cancelled")]
pub struct Left {
    job: JobName,
}

impl<'a> Follow<'a> {
    pub fn new(session: &'a mut Session, target: Target, until: Until, printer: Printer) -> Self {
        let now = Instant::now();
        Self {
            named: target.generation.0 > 0,
            session,
            target,
            until,
            printer,
            order: Order::default(),
            seen: None,
            told: None,
            asked: None,
            ask_at: now,
            gap: GAP_MIN,
            pages: Vec::new(),
            next_page: None,
            listed: None,
            finished: false,
            ended_at: None,
            listed_after_end: false,
            moved_at: now,
            interrupts: None,
        }
    }

    /// A question for the logs is under way already.
    pub fn asked(mut self, id: RequestId) -> Self {
        self.asked = Some((id, Instant::now()));
        self
    }

    /// Ctrl-C cancels the job.
    pub fn cancel_on_interrupt(mut self) -> anyhow::Result<Self> {
        let (int, term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        self.interrupts = Some(Interrupts { int, term, cancel: None, answered: false });
        Ok(self)
    }

    pub fn question(namespace: &Namespace, job: &JobName, until: Until) -> Query {
        let follow = until == Until::Ended;
        Query::Logs { namespace: namespace.clone(), job: job.clone(), follow, from: Vec::new(), after: None }
    }

    /// The same again, without what was read already.
    fn question_anew(&self) -> Query {
        let mut question = Self::question(&self.target.namespace, &self.target.job, self.until);
        if let Query::Logs { from, after, .. } = &mut question {
            *from = self.order.positions();
            *after = self.next_page.clone();
        }
        question
    }

    /// Returns the last status that was seen, if any was.
    pub async fn run(mut self) -> anyhow::Result<Option<Seen>> {
        loop {
            self.tick()?;
            if self.done() {
                self.printer.finish()?;
                return Ok(self.seen);
            }
            let wake = self.wake();
            tokio::select! {
                biased;
                () = interrupted(&mut self.interrupts) => self.interrupt()?,
                news = self.session.next() => self.hear(news?).await?,
                () = sleep_until(wake) => {}
            }
            self.show()?;
        }
    }

    fn ended(&self) -> bool {
        self.finished || self.seen.as_ref().is_some_and(|seen| seen.status.phase.is_final())
    }

    fn done(&self) -> bool {
        if self.ended() && self.order.complete() {
            return self.listed_after_end || self.settled();
        }
        let Some(listed) = self.listed.filter(|_| self.until == Until::Quiet) else { return false };
        let open = self.order.open();
        let quiet = self.moved_at.max(listed).elapsed() >= QUIET;
        open.is_empty() || quiet && open.iter().all(|(pod, epoch)| !self.order.has_total(pod, *epoch))
    }

    /// The last status alone tells that there is nothing beyond what was shown.
    fn settled(&self) -> bool {
        let Some(Seen { status, .. }) = &self.seen else { return false };
        let mut wanted = status.pods.iter().filter(|pod| self.wants(&pod.pod));
        !wait::is_partial(status)
            && wanted.all(|pod| match pod.log_records {
                Some(_) => self.order.is_known_through(&pod.pod, pod.epoch),
                None => pod.node.is_none() && pod.started_at.is_none() && pod.epoch.0 <= 1,
            })
    }

    fn wants(&self, pod: &PodName) -> bool {
        pod.job == self.target.job && self.target.pod.as_ref().is_none_or(|wanted| wanted == pod)
    }

    fn wake(&self) -> Instant {
        if self.session.is_down() {
            // News of its return come before.
            return Instant::now() + RENEW;
        }
        let mut wake = match &self.asked {
            Some((_, at)) => *at + RESEND_MIN,
            None => self.ask_at,
        };
        if let Some(ended) = self.ended_at {
            wake = wake.min(ended + TAIL);
        }
        if let (Until::Quiet, Some(listed)) = (self.until, self.listed) {
            wake = wake.min(self.moved_at.max(listed) + QUIET);
        }
        if let Some(Interrupts { cancel: Some((_, at)), answered: false, .. }) = &self.interrupts {
            wake = wake.min(*at);
        }
        wake
    }

    /// What is due by time alone.
    fn tick(&mut self) -> anyhow::Result<()> {
        // There is nobody to ask, and nothing can come that would be late.
        if self.session.is_down() {
            return Ok(());
        }
        let now = Instant::now();
        self.cancel_again(now)?;
        if self.ended() && self.ended_at.is_none() {
            self.ended_at = Some(now);
            if !(self.finished || self.order.complete() && self.settled()) {
                self.ask_at = now;
                self.gap = GAP_MIN;
            }
        }
        if self.order.blocked() && self.asked.is_none() {
            self.ask_at = self.ask_at.min(now + self.gap);
        }
        let lapsed = self.asked.as_ref().is_some_and(|(_, at)| now >= *at + RESEND_MIN);
        if lapsed || self.asked.is_none() && now >= self.ask_at {
            let id = self.session.ask(&self.question_anew())?;
            self.asked = Some((id, now));
        }
        if self.moved_at.elapsed() >= STUCK && self.listed.is_some() {
            for (pod, epoch) in self.order.in_the_way() {
                self.give_up(&pod, epoch, true)?;
            }
        }
        let over = self.ended_at.is_some_and(|at| now >= at + TAIL);
        let stale = self.until == Until::Quiet && self.listed.is_some() && self.moved_at.elapsed() >= TAIL;
        if over || stale {
            self.listed_after_end = true;
            for (pod, epoch) in self.order.open() {
                self.give_up(&pod, epoch, true)?;
            }
        }
        Ok(())
    }

    async fn hear(&mut self, news: News) -> anyhow::Result<()> {
        match news {
            News::Message(message) => self.hear_message(&message),
            News::Reply(reply) if self.asked.as_ref().is_some_and(|(id, _)| *id == reply.id) => {
                self.asked = None;
                match result(reply) {
                    Ok(value) => {
                        let list = serde_json::from_value(value).context("the list of logs is unreadable")?;
                        self.list(list).await
                    }
                    // The question can overtake the job that it is about.
                    Err(e) if self.seen_or_submitted() && e.is::<Refused>() => {
                        self.ask_again();
                        Ok(())
                    }
                    Err(e) => Err(e),
                }
            }
            News::Reply(_) => Ok(()),
            News::Reconnected => {
                // Whatever is still to come has its whole time again.
                (self.ask_at, self.moved_at) = (Instant::now(), Instant::now());
                self.ended_at = self.ended_at.map(|_| Instant::now());
                self.asked = None;
                self.pages.clear();
                self.next_page = None;
                Ok(())
            }
        }
    }

    fn seen_or_submitted(&self) -> bool {
        self.target.generation.0 > 0 || self.seen.is_some()
    }

    fn hear_message(&mut self, Message { topic, payload, retained }: &Message) -> anyhow::Result<()> {
        match topic {
            Topic::Logs { namespace, pod } if *namespace == self.target.namespace && self.wants(pod) => {
                // What is retained on a log topic nobody of ours has put there.
                if let Ok(message) = codec::decode::<LogMessage>(topic, payload)
                    && !retained
                {
                    let LogMessage { epoch, container, stream, seq, at, text } = message;
                    let (at, bytes) = (at.unwrap_or_else(get::now), text.into_bytes());
                    let line = Line { pod: pod.clone(), epoch, seq, at, container, stream, bytes };
                    self.order.insert(line);
                    self.moved_at = Instant::now();
                }
            }
            Topic::Job { namespace, job, kind }
                if *namespace == self.target.namespace && *job == self.target.job =>
            {
                match kind {
                    JobTopic::Status => self.hear_status(Seen::from_message(topic, payload)),
                    JobTopic::Answer => self.hear_answer(codec::decode(topic, payload).ok()),
                    _ => {}
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn hear_status(&mut self, seen: Option<Seen>) {
        let Some(seen) = seen else { return };
        let status = &seen.status;
        if !seen.is_about(self.target.generation) {
            // What the pods of an earlier generation said is not asked for.
            for pod in &status.pods {
                self.order.skip_through(&pod.pod, pod.epoch);
            }
            return;
        }
        for pod in
            status.pods.iter().filter(|pod| self.target.pod.as_ref().is_none_or(|wanted| *wanted == pod.pod))
        {
            if let Some(records) = pod.log_records {
                self.order.ended(&pod.pod, pod.epoch, records);
            }
        }
        if self.until == Until::Ended {
            wait::tell_why(status, &mut self.told);
        }
        self.seen = Some(seen);
    }

    fn hear_answer(&mut self, answer: Option<Answer>) {
        let Some(interrupts) = &mut self.interrupts else { return };
        let (Some(answer), Some((command, _))) = (answer, &interrupts.cancel) else { return };
        if answer.id == command.id {
            interrupts.answered = true;
            if let Verdict::Rejected { rejected } = answer.verdict {
                eprintln!("berth: cannot cancel job {}: {}", self.target.job, rejected.message);
            }
        }
    }

    /// The controller's list of the job's logs.
    async fn list(&mut self, sources: LogSources) -> anyhow::Result<()> {
        let LogSources { sources, finished, many, containers, depot, next } = sources;
        let wanted: Vec<LogSource> = sources.into_iter().filter(|source| self.wants(&source.pod)).collect();
        self.pages.extend(wanted);
        self.next_page = next;
        if self.next_page.is_some() {
            self.ask_at = Instant::now();
            return Ok(());
        }
        let sources = std::mem::take(&mut self.pages);
        self.printer.names |= many && self.target.pod.is_none();
        self.printer.containers |= containers;
        self.named = true;
        let mut epochs: BTreeMap<&PodName, Vec<(Epoch, Option<u64>)>> = BTreeMap::new();
        for source in &sources {
            epochs.entry(&source.pod).or_default().push((source.epoch, source.records));
        }
        for (pod, epochs) in epochs {
            self.order.list(pod, &epochs);
        }
        self.show()?;
        let depot = Depot::new(depot, &self.session.settings)?;
        for source in &sources {
            let Some(path) = source.stored.as_ref().filter(|_| self.order.is_open(&source.pod, source.epoch))
            else {
                continue;
            };
            if let Err(error) = self.fetch(&depot, source, path).await {
                // Whoever reads our output has gone: then there is nothing to go on for.
                if error.chain().any(|cause| cause.is::<Unshown>()) {
                    return Err(error);
                }
                eprintln!("berth: cannot fetch the log of {}: {error:#}", source.pod);
            }
        }
        if finished {
            let exists = |pod: &PodName, epoch: Epoch| {
                sources.iter().any(|source| {
                    (&source.pod, source.epoch) == (pod, epoch)
                        && (source.records.is_some() || source.stored.is_some())
                })
            };
            // Its log went with its node, or was never written: nobody has more of it.
            for (pod, epoch) in self.order.open().into_iter().filter(|(pod, epoch)| !exists(pod, *epoch)) {
                self.give_up(&pod, epoch, false)?;
            }
        }
        self.finished |= finished;
        self.listed_after_end |= self.ended();
        self.listed = Some(Instant::now());
        self.ask_again();
        Ok(())
    }

    /// Sets the time of the next question: soon where records are missing.
    fn ask_again(&mut self) {
        let missing = self.order.blocked() || self.ended() || self.listed.is_none();
        let pause = if missing { self.gap } else { RENEW };
        self.gap = if missing { (self.gap * 2).min(GAP_MAX) } else { GAP_MIN };
        self.ask_at = Instant::now() + pause;
    }

    /// Takes a whole stored log in. It is read beside the runtime's thread, which keeps the session alive meanwhile.
    async fn fetch(&mut self, depot: &Depot, source: &LogSource, path: &str) -> anyhow::Result<()> {
        let (to, mut pieces) = mpsc::channel(PIECES_MAX);
        let (depot, from, path) = (depot.clone(), source.clone(), path.to_owned());
        let reading = tokio::task::spawn_blocking(move || depot.read_log(&path, &from, &to));
        while let Some(lines) = pieces.recv().await {
            for line in lines {
                self.order.insert(line);
            }
            self.show()?;
        }
        let last = reading.await??;
        if !self.order.has_total(&source.pod, source.epoch) {
            self.order.ended(&source.pod, source.epoch, last);
        }
        Ok(())
    }

    fn show(&mut self) -> anyhow::Result<()> {
        // Somebody else may be following, whose lines come before the list.
        if !self.named {
            return Ok(());
        }
        let lines = self.order.ready();
        if !lines.is_empty() {
            self.moved_at = Instant::now();
            self.gap = GAP_MIN;
        }
        self.printer.print(&lines).map_err(|error| anyhow::Error::new(error).context(Unshown))
    }

    /// Goes on without what is missing of an epoch.
    fn give_up(&mut self, pod: &PodName, epoch: Epoch, say: bool) -> anyhow::Result<()> {
        let (missing, rest) = self.order.abandon(pod, epoch);
        self.printer.print(&rest).map_err(|error| anyhow::Error::new(error).context(Unshown))?;
        if say {
            let what = missing.map_or("the rest".to_owned(), |missing| format!("{missing} records"));
            eprintln!("berth: {what} of the log of {pod} (epoch {epoch}) cannot be had; going on without");
        }
        self.moved_at = Instant::now();
        Ok(())
    }

    fn interrupt(&mut self) -> anyhow::Result<()> {
        let Target { namespace, job, .. } = &self.target;
        let id = self.session.request_id()?;
        let Some(interrupts) = &mut self.interrupts else { return Ok(()) };
        if interrupts.cancel.is_some() {
            return Err(Left { job: job.clone() }.into());
        }
        eprintln!("berth: cancelling job {namespace}/{job}, with its grace; Ctrl-C again leaves it");
        let command = JobCommand { id: Some(id), command: Command::Cancel, node: None, checkpoint: None };
        interrupts.cancel = Some((command, Instant::now()));
        Ok(())
    }

    /// Sends the cancel command until it is answered.
    fn cancel_again(&mut self, now: Instant) -> anyhow::Result<()> {
        let Some(Interrupts { cancel: Some((command, at)), answered: false, .. }) = &mut self.interrupts
        else {
            return Ok(());
        };
        if now < *at {
            return Ok(());
        }
        *at = now + RESEND_MIN;
        let topic = Topic::job(&self.target.namespace, &self.target.job, JobTopic::Command);
        let payload = codec::encode(&topic, command)?;
        self.session.publish(&topic, payload)
    }
}

/// Our own output cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the output")]
struct Unshown;
