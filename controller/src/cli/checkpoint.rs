//! Verbs about saved work: `checkpoint`, `migrate`, `restore`, `fork`.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::{Context as _, bail};
use berth_protocol::codec;
use berth_protocol::ids::{Digest, JobName, Namespace};
use berth_protocol::message::query::{CheckpointDetail, Query};
use berth_protocol::message::user::{
    Answer, CheckpointFailure, CheckpointStatus, Command, JobCommand, JobStatus, PodStatus, Verdict,
};
use berth_protocol::topic::{JobTopic, Topic};
use serde_json::json;
use tokio::time::Instant;

use super::command::{Fork, Format, Migrate, Restore, Take};
use super::config::Settings;
use super::connect::Session;
use super::wait::Seen;
use super::{exit, print_value, render, submit};

/// How often a checkpoint under way is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// Sends one command, and what came of it.
async fn send(
    session: &mut Session,
    namespace: &Namespace,
    job: &JobName,
    command: JobCommand,
) -> anyhow::Result<Answer> {
    let id = session.request_id()?;
    let topic = Topic::job(namespace, job, JobTopic::Command);
    let payload = codec::encode(&topic, &JobCommand { id: Some(id.clone()), ..command })?;
    session.publish(&topic, payload.clone())?;
    let ours = |answer: &Answer| answer.id.as_ref() == Some(&id);
    submit::wait_for_answer(session, (topic, &payload), ours).await
}

fn answers(settings: &Settings, jobs: &[JobName]) -> Vec<String> {
    let topic = |job| Topic::job(&settings.namespace, job, JobTopic::Answer).render(&settings.cluster);
    jobs.iter().map(topic).collect()
}

fn plain(command: Command) -> JobCommand {
    JobCommand { id: None, command, node: None, checkpoint: None }
}

/// Prints what was done, or why it was refused; the exit code.
fn told(settings: &Settings, job: &JobName, answer: &Answer, done: &str) -> anyhow::Result<u8> {
    let namespace = &settings.namespace;
    match (&answer.verdict, settings.format) {
        (Verdict::Rejected { rejected }, _) => {
            eprintln!("berth: job {namespace}/{job}: {}: {}", rejected.code, rejected.message);
            return Ok(exit::BERTH);
        }
        (_, Format::Table | Format::Wide) => writeln!(std::io::stdout(), "job {namespace}/{job} {done}")?,
        (_, Format::Name) => writeln!(std::io::stdout(), "{job}")?,
        (_, format) => print_value(format, &serde_json::to_value(answer)?)?,
    }
    Ok(0)
}

async fn look(session: &mut Session, namespace: &Namespace, job: &JobName) -> anyhow::Result<JobStatus> {
    let query = Query::Job { namespace: namespace.clone(), job: job.clone() };
    Ok(Seen::from_detail(session.query(query).await?)?.status)
}

/// Of a pod that could not be saved since.
fn new_failure<'a>(before: &JobStatus, now: &'a JobStatus) -> Option<(&'a PodStatus, &'a CheckpointFailure)> {
    let known = |pod: &PodStatus| {
        let same = |other: &&PodStatus| other.pod == pod.pod;
        before.pods.iter().find(same).and_then(|other| other.checkpoint_failed.clone())
    };
    let mut failed = now.pods.iter().filter_map(|pod| Some((pod, pod.checkpoint_failed.as_ref()?)));
    failed.find(|(pod, failure)| known(pod).as_ref() != Some(*failure))
}

/// Each pod that ran then has ended there, and with it what was asked of it.
fn all_left(before: &JobStatus, now: &JobStatus) -> bool {
    let mut ran =
        before.pods.iter().filter(|pod| pod.started_at.is_some() && pod.finished_at.is_none()).peekable();
    let left = |pod: &PodStatus| now.pods.iter().any(|other| other.pod == pod.pod && other.epoch > pod.epoch);
    ran.peek().is_some() && ran.all(left)
}

/// Asks for a checkpoint and waits for it.
async fn take(
    session: &mut Session,
    settings: &Settings,
    job: &JobName,
    args: &Take,
) -> anyhow::Result<Option<CheckpointStatus>> {
    let (namespace, job) = (&settings.namespace, job);
    let before = look(session, namespace, job).await?;
    let answer = send(session, namespace, job, plain(Command::Checkpoint)).await?;
    if args.no_wait || matches!(answer.verdict, Verdict::Rejected { .. }) {
        let code = told(settings, job, &answer, "is being saved")?;
        anyhow::ensure!(code == 0, "nothing was saved");
        return Ok(None);
    }
    let terminal = std::io::stderr().is_terminal();
    let (deadline, mut shown) = (Instant::now() + args.timeout, String::new());
    let id = |status: &JobStatus| status.checkpoint.as_ref().map(|checkpoint| checkpoint.id);
    loop {
        let now = look(session, namespace, job).await?;
        if id(&now) != id(&before) {
            return Ok(now.checkpoint);
        }
        if let Some((pod, failure)) = new_failure(&before, &now) {
            bail!("pod {} could not be saved: {}", pod.pod, failure.why);
        }
        if now.phase.is_final() {
            bail!("job {namespace}/{job} ended before it was saved");
        }
        if all_left(&before, &now) {
            bail!("job {namespace}/{job} was taken off its node before it was saved");
        }
        let progress = now.pods.iter().find_map(|pod| pod.message.clone()).unwrap_or_default();
        if terminal && progress != shown {
            eprintln!("{progress}");
            shown = progress;
        }
        if Instant::now() >= deadline {
            bail!(
                "job {namespace}/{job} has not been saved in time; it may still be, `berth get checkpoints` shows"
            );
        }
        tokio::time::sleep(LOOK).await;
    }
}

pub async fn checkpoint(settings: &Settings, args: Take) -> anyhow::Result<u8> {
    let job = args.job.clone().context("no job is named")?;
    let mut session = Session::open(settings, answers(settings, std::slice::from_ref(&job))).await?;
    let taken = take(&mut session, settings, &job, &args).await?;
    session.close().await;
    let Some(taken) = taken else { return Ok(0) };
    match settings.format {
        Format::Table | Format::Wide => writeln!(
            std::io::stdout(),
            "job {}/{} is saved as {}: {}, {} of it new, frozen for {} ms",
            settings.namespace,
            job,
            render::short(&taken.id),
            render::size(taken.bytes),
            render::size(taken.new_bytes),
            taken.frozen_ms
        )?,
        Format::Name => writeln!(std::io::stdout(), "{}", taken.id.hex())?,
        format => print_value(format, &serde_json::to_value(&taken)?)?,
    }
    Ok(0)
}

pub async fn migrate(settings: &Settings, args: Migrate) -> anyhow::Result<u8> {
    let mut session = Session::open(settings, answers(settings, std::slice::from_ref(&args.job))).await?;
    let command = JobCommand { node: Some(args.to.clone()), ..plain(Command::Migrate) };
    let answer = send(&mut session, &settings.namespace, &args.job, command).await?;
    session.close().await;
    told(settings, &args.job, &answer, &format!("is on its way to {}", args.to))
}

pub async fn find(session: &mut Session, settings: &Settings, id: &str) -> anyhow::Result<CheckpointDetail> {
    let query = Query::Checkpoint { namespace: Some(settings.namespace.clone()), id: id.to_owned() };
    serde_json::from_value(session.query(query).await?)
        .context("the controller's reply cannot be read: is it of another version?")
}

pub async fn restore(settings: &Settings, args: Restore) -> anyhow::Result<u8> {
    // Which job it is of, and so where the answer comes, the checkpoint says.
    let mut session = Session::open(settings, Vec::new()).await?;
    let found = find(&mut session, settings, &args.checkpoint).await?;
    session.close().await;
    let job = args.name.unwrap_or(found.row.job);
    let mut session = Session::open(settings, answers(settings, std::slice::from_ref(&job))).await?;
    let restore = JobCommand { node: args.node, checkpoint: Some(found.row.id), ..plain(Command::Restore) };
    let answer = send(&mut session, &settings.namespace, &job, restore).await?;
    session.close().await;
    told(settings, &job, &answer, &format!("goes on from {}", render::short(&found.row.id)))
}

pub async fn fork(settings: &Settings, args: Fork) -> anyhow::Result<u8> {
    let names: Result<Vec<JobName>, _> =
        (1..=args.copies).map(|n| JobName::parse(&format!("{}-fork-{n}", args.job))).collect();
    let names = names.map_err(|error| super::Usage::new(error.to_string()))?;
    let all: Vec<JobName> = std::iter::once(args.job.clone()).chain(names.iter().cloned()).collect();
    let mut session = Session::open(settings, answers(settings, &all)).await?;
    let id: Digest = match &args.checkpoint {
        Some(id) => find(&mut session, settings, id).await?.row.id,
        None => {
            let save = Take { job: None, no_wait: false, timeout: args.timeout };
            take(&mut session, settings, &args.job, &save).await?.context("nothing was saved")?.id
        }
    };
    let (mut code, mut made) = (0, Vec::new());
    for name in &names {
        let command = JobCommand { checkpoint: Some(id), ..plain(Command::Restore) };
        let answer = send(&mut session, &settings.namespace, name, command).await?;
        match &answer.verdict {
            Verdict::Rejected { rejected } => {
                eprintln!("berth: job {name}: {}: {}", rejected.code, rejected.message);
                code = exit::BERTH;
            }
            Verdict::Accepted { .. } => made.push(name.clone()),
        }
    }
    session.close().await;
    match settings.format {
        Format::Json | Format::Yaml => {
            print_value(settings.format, &json!({"checkpoint": id, "jobs": made}))?;
        }
        Format::Name => made.iter().try_for_each(|name| writeln!(std::io::stdout(), "{name}"))?,
        Format::Table | Format::Wide => made.iter().try_for_each(|name| {
            writeln!(
                std::io::stdout(),
                "job {}/{name} goes on from {}",
                settings.namespace,
                render::short(&id)
            )
        })?,
    }
    Ok(code)
}
