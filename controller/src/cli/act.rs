//! The short verbs: commands to jobs, `explain`, `version`.

use std::io::Write as _;
use std::time::Duration;

use anyhow::Context as _;
use berth_protocol::codec;
use berth_protocol::message::query::{ControllerVersion, Query};
use berth_protocol::message::user::{Command, JobCommand, Verdict};
use berth_protocol::topic::{JobTopic, Topic};
use serde_json::{Value, json};

use super::command::{Format, JobArg, JobNames, Version};
use super::config::Settings;
use super::connect::Session;
use super::{exit, get, print_value, render, submit};

/// A command and what is said once it is accepted.
#[derive(Clone, Copy)]
pub struct Act {
    command: Command,
    done: &'static str,
}

pub const CANCEL: Act = Act { command: Command::Cancel, done: "is being cancelled" };
pub const SUSPEND: Act = Act { command: Command::Suspend, done: "is being suspended" };
pub const RESUME: Act = Act { command: Command::Resume, done: "goes on" };
pub const RESTART: Act = Act { command: Command::Restart, done: "starts anew" };

/// How long `version` asks before it says that there is no controller.
const VERSION_PATIENCE: Duration = Duration::from_secs(2);

pub async fn command(settings: &Settings, act: Act, args: JobNames) -> anyhow::Result<u8> {
    let namespace = &settings.namespace;
    let answers = |job| Topic::job(namespace, job, JobTopic::Answer).render(&settings.cluster);
    let mut session = Session::open(settings, args.jobs.iter().map(answers).collect()).await?;
    let mut code = 0;
    for job in &args.jobs {
        let id = session.request_id()?;
        let topic = Topic::job(namespace, job, JobTopic::Command);
        let message = JobCommand { id: Some(id.clone()), command: act.command, node: None, checkpoint: None };
        let payload = codec::encode(&topic, &message)?;
        session.publish(&topic, payload.clone())?;
        let ours = |answer: &berth_protocol::message::user::Answer| answer.id.as_ref() == Some(&id);
        let answer = submit::wait_for_answer(&mut session, (topic, &payload), ours).await?;
        match (&answer.verdict, settings.format) {
            (Verdict::Rejected { rejected }, _) => {
                eprintln!("berth: job {namespace}/{job}: {}: {}", rejected.code, rejected.message);
                code = exit::BERTH;
            }
            (_, Format::Table | Format::Wide) => {
                writeln!(std::io::stdout(), "job {namespace}/{job} {}", act.done)?
            }
            (_, Format::Name) => writeln!(std::io::stdout(), "{job}")?,
            (_, format) => print_value(format, &serde_json::to_value(&answer)?)?,
        }
    }
    session.close().await;
    Ok(code)
}

pub async fn explain(settings: &Settings, args: JobArg) -> anyhow::Result<u8> {
    let mut session = Session::open(settings, Vec::new()).await?;
    let value =
        session.query(Query::Explain { namespace: settings.namespace.clone(), job: args.job }).await?;
    session.close().await;
    if matches!(settings.format, Format::Json | Format::Yaml) {
        print_value(settings.format, &value)?;
        return Ok(0);
    }
    let explained = serde_json::from_value(value).context("the controller's reply cannot be read")?;
    let (summary, table) = render::explanation(&explained);
    let mut out = std::io::stdout().lock();
    out.write_all(summary.as_bytes())?;
    if !table.is_empty() {
        write!(out, "\n{}", table.render(true, get::colour(), &mut Vec::new()))?;
    }
    Ok(0)
}

pub async fn version(settings: &Settings, args: Version) -> anyhow::Result<u8> {
    let client = env!("CARGO_PKG_VERSION");
    let controller = match args.client {
        true => None,
        false => ask_version(settings).await.map_err(|e| eprintln!("berth: {e:#}")).ok(),
    };
    match settings.format {
        Format::Json | Format::Yaml => {
            print_value(settings.format, &json!({"client": client, "controller": controller}))?;
        }
        _ => {
            writeln!(std::io::stdout(), "berth {client}")?;
            if let Some(value) = controller {
                let ControllerVersion { version, cluster } = serde_json::from_value(value)?;
                writeln!(std::io::stdout(), "berth-controller {version} (cluster {cluster})")?;
            }
        }
    }
    Ok(0)
}

async fn ask_version(settings: &Settings) -> anyhow::Result<Value> {
    let patience = settings.request_timeout.min(VERSION_PATIENCE);
    let mut session =
        Session::open(&Settings { request_timeout: patience, ..settings.clone() }, Vec::new()).await?;
    let value = session.query(Query::Version).await?;
    session.close().await;
    Ok(value)
}
