//! `wait`: until a job has ended, and which exit code that is.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use berth_protocol::codec;
use berth_protocol::ids::{Generation, JobName, Namespace};
use berth_protocol::message::query::{PodRow, Query};
use berth_protocol::message::user::{JobPhase, JobStatus, PodStatus};
use berth_protocol::topic::{JobTopic, Topic, filter};
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout_at};

use super::command::{Format, Wait};
use super::config::Settings;
use super::connect::{ASK_AGAIN_MIN, News, NoAnswer, Session};
use super::{exit, print_value, render};

/// A status is asked for this often, in case the one that mattered was lost on its way.
const REFRESH: Duration = Duration::from_secs(15);

/// A status as it came and as it reads.
#[derive(Debug, Clone)]
pub struct Seen {
    pub value: Value,
    pub status: JobStatus,
}

impl Seen {
    /// From a query's `JobDetail`: the status without the file.
    pub fn from_detail(mut value: Value) -> anyhow::Result<Self> {
        if let Some(fields) = value.as_object_mut() {
            fields.remove("spec");
        }
        let status =
            serde_json::from_value(value.clone()).context("the controller's status cannot be read")?;
        Ok(Self { value, status })
    }

    /// From a payload on `topic`; `None` for a status that was cleared or is not one.
    pub fn from_message(topic: &Topic, payload: &[u8]) -> Option<Self> {
        let value = codec::decode(topic, payload).ok()?;
        Self::from_detail(value).ok()
    }

    /// Speaks of the job from `generation` on, and not of a file that was refused.
    pub fn is_about(&self, generation: Generation) -> bool {
        self.status.generation >= generation && self.status.phase != JobPhase::Rejected
    }
}

pub async fn wait(settings: &Settings, args: Wait) -> anyhow::Result<u8> {
    let namespace = &settings.namespace;
    let [_, status, _] = filter::job(&settings.cluster, namespace, &args.job);
    let deadline = args.timeout.map(|timeout| Instant::now() + timeout);
    let mut session = Session::open(settings, vec![status]).await?;
    let ended = async {
        let seen = until_final(&mut session, namespace, &args.job, Generation(0)).await?;
        let code = exit_code(&mut session, &seen.status).await?;
        anyhow::Ok((seen, code))
    };
    let (seen, code) = match deadline {
        None => ended.await?,
        Some(deadline) => match timeout_at(deadline, ended).await {
            Ok(ended) => ended?,
            Err(_) => {
                eprintln!("berth: job {namespace}/{} has not ended in time", args.job);
                session.close().await;
                return Ok(exit::TIMEOUT);
            }
        },
    };
    report(settings, &seen)?;
    session.close().await;
    Ok(code)
}

/// Where nobody has answered: `None`, after a pause. The job goes on whoever is away, so that it is asked again for as
/// long as the user waits.
async fn answered<T>(answer: anyhow::Result<T>, told: &mut bool) -> anyhow::Result<Option<T>> {
    match answer {
        Err(error) if error.is::<NoAnswer>() => {
            if !std::mem::replace(told, true) {
                eprintln!("berth: {error} Asking again until there is one");
            }
            sleep(ASK_AGAIN_MIN).await;
            Ok(None)
        }
        answer => answer.map(Some),
    }
}

/// Waits for the end of the job's `generation` or a later one.
pub async fn until_final(
    session: &mut Session,
    namespace: &Namespace,
    job: &JobName,
    generation: Generation,
) -> anyhow::Result<Seen> {
    let query = Query::Job { namespace: namespace.clone(), job: job.clone() };
    let topic = Topic::job(namespace, job, JobTopic::Status);
    let (mut told, mut unanswered) = (None, false);
    loop {
        let answer = session.query(query.clone()).await;
        let Some(detail) = answered(answer, &mut unanswered).await? else { continue };
        unanswered = false;
        let mut seen = Seen::from_detail(detail)?;
        let until = Instant::now() + REFRESH;
        loop {
            if seen.status.phase.is_final() && seen.status.generation >= generation {
                return Ok(seen);
            }
            tell_why(&seen.status, &mut told);
            let Ok(news) = timeout_at(until, session.next()).await else { break };
            match news? {
                News::Message(message) if message.topic == topic => {
                    let newer =
                        Seen::from_message(&topic, &message.payload).filter(|new| new.is_about(generation));
                    // Old news that waited in line must not undo what the query said.
                    seen = newer.filter(|_| !message.retained).unwrap_or(seen);
                }
                News::Reconnected => break,
                _ => {}
            }
        }
    }
}

/// Says on stderr why the job is not running, once for each reason.
pub fn tell_why(status: &JobStatus, told: &mut Option<String>) {
    let waits = matches!(status.phase, JobPhase::Pending | JobPhase::Suspended);
    let Some(why) = why(status).filter(|_| waits) else { return };
    if told.as_ref() != Some(&why) {
        eprintln!("berth: job {}/{} is {}: {why}", status.namespace, status.job, render::word(&status.phase));
        *told = Some(why);
    }
}

/// `reason: message`, as far as there is either.
pub fn why(status: &JobStatus) -> Option<String> {
    render::reason_and_message(status.reason.as_deref(), status.message.as_deref())
}

/// The exit code of a job that has ended; asks for its pods where the status does not list them all.
pub async fn exit_code(session: &mut Session, status: &JobStatus) -> anyhow::Result<u8> {
    let pods: Vec<PodStatus> = if status.phase == JobPhase::Failed && is_partial(status) {
        let (namespace, job) = (Some(status.namespace.clone()), Some(status.job.clone()));
        let of_job = |after| Query::Pods { namespace: namespace.clone(), job: job.clone(), after };
        let mut unanswered = false;
        let rows = loop {
            let rows = session.pages(of_job).await;
            if let Some(rows) = answered(rows, &mut unanswered).await? {
                break rows;
            }
        };
        rows.into_iter()
            .map(|row| Ok(serde_json::from_value::<PodRow>(row)?.status))
            .collect::<anyhow::Result<_>>()?
    } else {
        status.pods.clone()
    };
    exit::of_job(status, &pods)
        .ok_or_else(|| anyhow!("job {}/{} has not ended", status.namespace, status.job))
}

/// The status lists some of the job's pods only.
pub fn is_partial(status: &JobStatus) -> bool {
    status.pod_counts.values().sum::<u32>() as usize > status.pods.len()
}

/// What `wait` prints: the status, or one line.
pub fn report(settings: &Settings, seen: &Seen) -> anyhow::Result<()> {
    let JobStatus { namespace, job, phase, .. } = &seen.status;
    match settings.format {
        Format::Json | Format::Yaml => print_value(settings.format, &seen.value)?,
        Format::Name => writeln!(std::io::stdout(), "{job}")?,
        Format::Table | Format::Wide => {
            let why = why(&seen.status).map(|why| format!(": {why}")).unwrap_or_default();
            writeln!(std::io::stdout(), "job {namespace}/{job} {}{why}", render::word(phase))?;
        }
    }
    Ok(())
}
/// Whether the status of a failed job wants words: where the program's own exit code does not say it all.
pub fn verdict(status: &JobStatus) -> Option<String> {
    let failed =
        status.pods.iter().find(|pod| pod.exit_code.is_none_or(|code| code != 0) && pod.phase.is_final());
    match failed {
        Some(pod) if pod.exit_code.is_some() && pod.message.is_none() => None,
        Some(pod) => render::reason_and_message(pod.reason.as_deref(), pod.message.as_deref()),
        None => why(status),
    }
}
