//! `describe`: everything about one job, pod, node or checkpoint.

use std::io::Write as _;

use anyhow::Context as _;
use berth_protocol::message::query::{CheckpointDetail, JobDetail, PodRow, Query};
use berth_protocol::message::user::{JobStatus, NodeStatus, PodStatus};
use berth_protocol::units::Timestamp;
use serde_json::Value;

use super::command::{Describe, Described, Format};
use super::config::Settings;
use super::connect::Session;
use super::render::{self, View};
use super::{get, print_value};

pub async fn describe(settings: &Settings, args: Describe) -> anyhow::Result<u8> {
    let namespace = settings.namespace.clone();
    let mut session = Session::open(settings, Vec::new()).await?;
    let (name, value) = match &args.what {
        Described::Job { name } => {
            (name.to_string(), session.query(Query::Job { namespace, job: name.clone() }).await?)
        }
        Described::Node { name } => {
            (name.to_string(), session.query(Query::Node { node: name.clone() }).await?)
        }
        Described::Checkpoint { name } => {
            let query = Query::Checkpoint { namespace: Some(namespace), id: name.clone() };
            let mut value = session.query(query).await?;
            // What opens the depot is nobody's to see.
            if let Some(fields) = value.as_object_mut() {
                fields.remove("depot");
            }
            (value["id"].as_str().unwrap_or(name).trim_start_matches("sha256:").to_owned(), value)
        }
        Described::Pod { name } => {
            let (namespace, job) = (Some(namespace), Some(name.job.clone()));
            let rows = session
                .pages(|after| Query::Pods { namespace: namespace.clone(), job: job.clone(), after })
                .await?;
            let text = name.to_string();
            let row = rows.into_iter().find(|row| row["pod"].as_str() == Some(&text));
            (text, row.with_context(|| format!("job {} has no pod {name}", name.job))?)
        }
    };
    session.close().await;
    match settings.format {
        Format::Json | Format::Yaml => print_value(settings.format, &value)?,
        Format::Name => writeln!(std::io::stdout(), "{name}")?,
        Format::Table | Format::Wide => {
            let text = text(&args.what, value, get::now(), get::colour())?;
            std::io::stdout().write_all(text.as_bytes())?;
        }
    }
    Ok(0)
}

fn text(what: &Described, value: Value, now: Timestamp, colour: bool) -> anyhow::Result<String> {
    let another = "the controller's reply cannot be read: is it of another version?";
    Ok(match what {
        Described::Job { .. } => job(&serde_json::from_value(value).context(another)?, now, colour)?,
        Described::Pod { .. } => pod(&serde_json::from_value(value).context(another)?, now, colour),
        Described::Checkpoint { .. } => checkpoint(&serde_json::from_value(value).context(another)?, now),
        Described::Node { .. } => node(&serde_json::from_value(value).context(another)?, now, colour),
    })
}

/// `Key:   value` lines; what has no value is left out.
struct Facts(Vec<(&'static str, String)>);

impl Facts {
    fn add(&mut self, key: &'static str, value: impl Into<String>) -> &mut Self {
        let value = value.into();
        if !value.is_empty() {
            self.0.push((key, value));
        }
        self
    }

    fn maybe<T: ToString>(&mut self, key: &'static str, value: Option<T>) -> &mut Self {
        self.add(key, value.map(|value| value.to_string()).unwrap_or_default())
    }

    fn at(&mut self, key: &'static str, at: Option<Timestamp>, now: Timestamp) -> &mut Self {
        self.add(
            key,
            at.map(|at| format!("{at} ({} ago)", render::span(now.since(at).0))).unwrap_or_default(),
        )
    }

    fn render(&self) -> String {
        let width = self.0.iter().map(|(key, _)| key.len() + 3).max().unwrap_or_default();
        self.0.iter().map(|(key, value)| format!("{:width$}{value}\n", format!("{key}:"))).collect()
    }
}

fn checkpoint(detail: &CheckpointDetail, now: Timestamp) -> String {
    let (row, info) = (&detail.row, &detail.info);
    let needs = &info.needs;
    let mut facts = Facts(Vec::new());
    facts
        .add("Digest", row.id.to_string())
        .add("Namespace", row.namespace.as_str())
        .add("Job", row.job.as_str())
        .add("Pod", format!("{}, epoch {}", row.pod, row.epoch))
        .maybe("Node", row.node.as_ref())
        .at("Taken", Some(row.at), now)
        .add("Kind", row.kind.as_str())
        .add("Size", format!("{}, {} of it new", render::size(row.bytes), render::size(row.new_bytes)))
        .add("Frozen", format!("{} ms", row.frozen_ms))
        .add("Log", format!("{} records", info.log_records))
        .add("Kept as", row.kept.clone())
        .add("Needs", needs.arch.clone())
        .maybe("  kernel", needs.kernel.as_ref().map(|version| format!("{version} or later")))
        .maybe("  CRIU", needs.criu.as_ref().map(|version| format!("{version} or later")))
        .maybe("  driver", needs.gpu_driver.as_ref())
        .add("  GPUs", needs.gpus.join(", "));
    if !needs.cpu_features.is_empty() {
        facts.add("  processor", format!("{} features of the one it ran on", needs.cpu_features.len()));
    }
    let mut out = facts.render();
    out.push('\n');
    for node in &detail.nodes {
        let verdict = if node.fits { "can go on there".to_owned() } else { node.reasons.join("; ") };
        out.push_str(&format!("{}: {verdict}\n", node.node));
    }
    out
}

fn job(detail: &JobDetail, now: Timestamp, colour: bool) -> anyhow::Result<String> {
    let JobStatus { namespace, job, uid, generation, phase, reason, message, .. } = &detail.status;
    let status = &detail.status;
    let mut facts = Facts(Vec::new());
    facts
        .add("Name", job.as_str())
        .add("Namespace", namespace.as_str())
        .maybe("Uid", uid.as_ref())
        .add("Generation", generation.to_string())
        .add("Phase", render::job_tone(*phase).paint(&render::word(phase), colour))
        .maybe("Reason", reason.as_ref())
        .maybe("Message", message.as_ref())
        .at("Submitted", Some(status.submitted_at), now)
        .at("Started", status.started_at, now)
        .at("Finished", status.finished_at, now);
    if let Some(from) = status.started_at {
        facts.add("Took", render::span(status.finished_at.unwrap_or(now).since(from).0));
    }
    facts
        .add("Failures", status.failures.to_string())
        .add("Evictions", status.evictions.to_string())
        .add("Migrations", status.migrations.to_string());
    if let Some(checkpoint) = &status.checkpoint {
        facts.add(
            "Checkpoint",
            format!(
                "{} of {}, {}",
                render::short(&checkpoint.id),
                checkpoint.at,
                render::size(checkpoint.bytes)
            ),
        );
    }
    let counts: Vec<String> =
        status.pod_counts.iter().map(|(phase, count)| format!("{count} {}", render::word(phase))).collect();
    facts.add("Pods", counts.join(", "));
    let mut out = facts.render();
    if !status.pods.is_empty() {
        let row =
            |pod: &PodStatus| PodRow { namespace: namespace.clone(), job: job.clone(), status: pod.clone() };
        let rows: Vec<PodRow> = status.pods.iter().map(row).collect();
        let table = render::pods(&rows, View { wide: false, namespaces: false, now });
        out.push('\n');
        out.push_str(&table.render(true, colour, &mut Vec::new()));
        for pod in &status.pods {
            if let Some(message) = &pod.message {
                out.push_str(&format!("{}: {message}\n", pod.pod));
            }
        }
    }
    out.push_str("\nFile:\n");
    let file = serde_yaml_ng::to_string(&detail.spec)?;
    out.extend(file.lines().map(|line| format!("  {line}\n")));
    Ok(out)
}

fn pod(row: &PodRow, now: Timestamp, colour: bool) -> String {
    let status = &row.status;
    let mut facts = Facts(Vec::new());
    facts
        .add("Name", status.pod.to_string())
        .add("Namespace", row.namespace.as_str())
        .add("Job", row.job.as_str())
        .maybe("Node", status.node.as_ref())
        .add("Phase", render::pod_tone(status.phase).paint(&render::word(&status.phase), colour))
        .maybe("Exit code", status.exit_code)
        .maybe("Reason", status.reason.as_ref())
        .maybe("Message", status.message.as_ref())
        .add("Epoch", status.epoch.to_string())
        .add("Restarts", status.restarts.to_string())
        .at("Started", status.started_at, now)
        .at("Finished", status.finished_at, now)
        .maybe("Log records", status.log_records);
    facts.render()
}

/// Whether pods with GPUs can be saved there by CRIU.
fn gpu_memory(node: &NodeStatus) -> Option<&'static str> {
    if node.gpus.is_empty() {
        return None;
    }
    Some(match node.saves_gpus {
        true => "what pods have on them can be saved",
        false => "what pods have on them cannot be saved: `berth-agent doctor` says why there",
    })
}

fn node(node: &NodeStatus, now: Timestamp, colour: bool) -> String {
    let labels: Vec<String> = node.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let share = |used: String, all: String| format!("{used} of {all} allotted");
    let (used, all) = (&node.allocated, &node.capacity);
    let mut facts = Facts(Vec::new());
    facts
        .add("Name", node.node.as_str())
        .add("State", render::node_tone(node.state).paint(&render::word(&node.state), colour))
        .maybe("Message", node.message.as_ref())
        .at("Heartbeat", node.last_heartbeat_at, now)
        .add("CPU", share(render::cores(used.cpu_milli), format!("{} cores", render::cores(all.cpu_milli))))
        .add("Memory", share(render::size(used.memory_bytes), render::size(all.memory_bytes)))
        .add("Pods", node.pods.to_string())
        .add("System", format!("{}, Linux {}, {}", node.os, node.kernel, node.arch))
        .add("Agent", node.agent_version.as_str())
        .maybe("CRIU", node.criu.as_ref())
        .maybe("GPUs", gpu_memory(node))
        .maybe("Policy", node.policy.as_ref())
        .add("Labels", labels.join(", "))
        .add("Taints", node.taints.join(", "));
    if let Some(usage) = &node.usage {
        let load = usage.load_milli as f64 / 1000.0;
        facts.add(
            "In use",
            format!(
                "{} cores, {} memory, load {load:.2}",
                render::cores(usage.cpu),
                render::size(usage.memory)
            ),
        );
    }
    let mut out = facts.render();
    for image in node.images.iter() {
        out.push_str(&format!("Image {image}\n"));
    }
    for gpu in &node.gpus {
        let health = gpu.unhealthy.as_ref().map(|why| format!(", unhealthy: {why}")).unwrap_or_default();
        let theirs = if gpu.outside.0 > 0 {
            format!(", {} of it held by other programs", render::size(gpu.outside))
        } else {
            String::new()
        };
        out.push_str(&format!(
            "GPU {}: {}, {}{theirs}{health}\n",
            gpu.uuid,
            gpu.model,
            render::size(gpu.memory)
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::golden;

    #[test]
    fn descriptions_look_as_they_did() {
        let now = Timestamp::parse("2026-01-01T01:00:00.000Z").unwrap();
        let dir = golden::dir();
        for (stem, what) in [
            ("describe-job", Described::Job { name: "digits".parse().unwrap() }),
            ("describe-pod", Described::Pod { name: "digits-0".parse().unwrap() }),
            ("describe-node", Described::Node { name: "n1".parse().unwrap() }),
        ] {
            let value = std::fs::read_to_string(dir.join(stem).with_extension("json")).unwrap();
            let shown = text(&what, serde_json::from_str(&value).unwrap(), now, false).unwrap();
            golden::check(&dir.join(stem).with_extension("text"), &shown);
        }
    }
}
