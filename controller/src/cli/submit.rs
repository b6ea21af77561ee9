//! `submit`: a job file to the controller, sent until it is answered.

use std::io::Write as _;
use std::time::Duration;

use anyhow::Context as _;
use berth_protocol::codec;
use berth_protocol::ids::{Digest, Generation};
use berth_protocol::message::user::{Answer, JobStatus, Rejection, Verdict};
use berth_protocol::topic::{JobTopic, Topic, filter};
use serde_json::json;

use super::command::{Format, Submit};
use super::config::Settings;
use super::connect::{Message, News, RESEND_MIN, Resend, Session};
use super::jobfile::{self, JobFile};
use super::{exit, print_value, wait};

pub async fn submit(settings: &Settings, args: Submit) -> anyhow::Result<u8> {
    // Every file is read and checked before the first is sent.
    let mut files = Vec::new();
    for path in &args.files {
        files.push((path, jobfile::check(settings, path, jobfile::read(path)?)?.named()?));
    }
    let filters =
        files.iter().flat_map(|(_, file)| filter::job(&settings.cluster, &file.namespace, &file.job));
    let mut session =
        Session::open(settings, filters.filter(|filter| !filter.ends_with('+')).collect()).await?;
    let mut accepted = Vec::new();
    for (path, file) in &files {
        let (answer, unchanged) = send(&mut session, file).await?;
        match answer.verdict {
            Verdict::Accepted { generation, .. } => {
                if !args.wait || matches!(settings.format, Format::Table | Format::Wide) {
                    report(settings, file, generation, unchanged)?;
                }
                accepted.push((file, generation));
            }
            Verdict::Rejected { rejected } => {
                let source = path.display().to_string();
                eprintln!("berth: {}", rejection(file, Some((&source, &file.payload)), &rejected));
                session.close().await;
                return Ok(code_of(&rejected));
            }
        }
    }
    let mut code = 0;
    if args.wait {
        for (file, generation) in accepted {
            let ended = wait::until_final(&mut session, &file.namespace, &file.job, generation).await?;
            let ended_with = wait::exit_code(&mut session, &ended.status).await?;
            wait::report(settings, &ended)?;
            code = if code == 0 { ended_with } else { code };
        }
    }
    session.close().await;
    Ok(code)
}

fn report(
    settings: &Settings,
    file: &JobFile,
    generation: Generation,
    unchanged: bool,
) -> anyhow::Result<()> {
    let JobFile { namespace, job, .. } = file;
    match settings.format {
        Format::Table | Format::Wide => {
            let what = if unchanged { "unchanged" } else { "accepted" };
            writeln!(std::io::stdout(), "job {namespace}/{job} {what} (generation {generation})")?;
        }
        Format::Name => writeln!(std::io::stdout(), "{job}")?,
        format => print_value(
            format,
            &json!({"namespace": namespace, "job": job, "accepted": true, "generation": generation}),
        )?,
    }
    Ok(())
}

/// Sends the file until it is answered; also tells whether the job was there already in this generation.
pub async fn send(session: &mut Session, file: &JobFile) -> anyhow::Result<(Answer, bool)> {
    session.publish(&Topic::job(&file.namespace, &file.job, JobTopic::Submit), file.payload.clone())?;
    answered(session, file).await
}

/// Waits for the answer to a file that was just sent, and sends it again until then.
pub async fn answered(session: &mut Session, file: &JobFile) -> anyhow::Result<(Answer, bool)> {
    let topic = |kind| Topic::job(&file.namespace, &file.job, kind);
    let sha256 = Digest::of(&file.payload).hex();
    let request = (topic(JobTopic::Submit), file.payload.as_slice());
    let answer = wait_for_answer(session, request, |answer| answer.sha256 == sha256).await?;
    let Verdict::Accepted { generation, .. } = answer.verdict else { return Ok((answer, false)) };
    let status = topic(JobTopic::Status);
    let unchanged = session.held().any(|news| match news {
        News::Message(message) if message.retained && message.topic == status => {
            codec::decode::<JobStatus>(&status, &message.payload).is_ok_and(|s| s.generation == generation)
        }
        _ => false,
    });
    Ok((answer, unchanged))
}

/// Waits for an answer on the request's job and repeats the request, which was sent once already, until it is there.
pub async fn wait_for_answer(
    session: &mut Session,
    (topic, payload): (Topic, &[u8]),
    ours: impl Fn(&Answer) -> bool,
) -> anyhow::Result<Answer> {
    let Topic::Job { namespace, job, .. } = &topic else { anyhow::bail!("{topic} is not a job's topic") };
    let answers = Topic::job(namespace, job, JobTopic::Answer);
    let patience: Duration = session.settings.request_timeout;
    let mut again = Resend::new(RESEND_MIN, patience);
    let mut told = false;
    loop {
        let found = session
            .hear_until(again.next(), |news| match news {
                News::Message(Message { topic, payload, .. }) if *topic == answers => {
                    codec::decode::<Answer>(topic, payload).ok().filter(&ours)
                }
                _ => None,
            })
            .await?;
        if let Some(answer) = found {
            return Ok(answer);
        }
        if again.is_over() {
            return Err(session.no_answer(patience));
        }
        if !told {
            told = true;
            eprintln!("berth: no answer from the controller yet, sending again");
        }
        session.publish(&topic, payload.to_vec()).context("cannot send again")?;
    }
}

/// A rejection for a person; with the file that it is about, its lines are shown. The message of a single error stands
/// in for it.
pub fn rejection(file: &JobFile, source: Option<(&str, &[u8])>, rejected: &Rejection) -> String {
    let Rejection { code, message, errors } = rejected;
    if let Some((name, payload)) = source.filter(|_| !errors.is_empty()) {
        return jobfile::render_errors(name, payload, errors);
    }
    let head = format!("job {}/{} was rejected: {code}: {message}", file.namespace, file.job);
    let listed = if errors.len() > 1 { errors.as_slice() } else { &[] };
    listed.iter().fold(head, |text, error| {
        let field = if error.field.is_empty() { String::new() } else { format!("{}: ", error.field) };
        format!("{text}\n  {field}{}", error.message)
    })
}

/// A file that is no good is the caller's mistake, anything else ours.
pub fn code_of(rejected: &Rejection) -> u8 {
    match rejected.code.as_str() {
        "InvalidJob" | "TooLarge" => exit::USAGE,
        _ => exit::BERTH,
    }
}
