//! What the protocol's records look like in tables. Pure: the time is an argument.

use berth_protocol::ids::{Digest, NodeId};
use berth_protocol::message::query::{CheckpointRow, Explanation, OutputRow, PodRow};
use berth_protocol::message::user::{JobPhase, JobStatus, NodeState, NodeStatus};
use berth_protocol::pod::PodPhase;
use berth_protocol::units::{Bytes, MilliCpu, Timestamp};
use serde::Serialize;

use super::table::{Cell, Table, Tone};

/// How much a table shows.
#[derive(Debug, Clone, Copy)]
pub struct View {
    pub wide: bool,
    /// With a column for the namespace.
    pub namespaces: bool,
    pub now: Timestamp,
}

pub fn jobs(rows: &[JobStatus], view: View) -> Table {
    let mut table = Table::new(headers(
        view,
        &["NAME", "PHASE", "PODS", "RESTARTS", "AGE", "REASON"],
        &["GENERATION", "EVICTIONS", "TOOK", "NODES", "MESSAGE"],
    ));
    for job in rows {
        let mut row: Vec<Cell> = namespace(view, job.namespace.as_str());
        let restarts: u32 = job.pods.iter().map(|pod| pod.restarts).sum();
        row.extend([
            job.job.as_str().into(),
            Cell::toned(word(&job.phase), job_tone(job.phase)),
            pods_done(job).into(),
            restarts.to_string().into(),
            age(view.now, Some(job.submitted_at)).into(),
            job.reason.clone().unwrap_or_default().into(),
        ]);
        if view.wide {
            let mut nodes: Vec<&str> =
                job.pods.iter().filter_map(|pod| Some(pod.node.as_ref()?.as_str())).collect();
            nodes.sort_unstable();
            nodes.dedup();
            row.extend([
                job.generation.to_string().into(),
                job.evictions.to_string().into(),
                took(view.now, job.started_at, job.finished_at).into(),
                nodes.join(",").into(),
                job.message.clone().unwrap_or_default().into(),
            ]);
        }
        table.push(row);
    }
    table
}

pub fn pods(rows: &[PodRow], view: View) -> Table {
    let mut table = Table::new(headers(
        view,
        &["NAME", "PHASE", "NODE", "EPOCH", "RESTARTS", "EXIT", "AGE", "REASON"],
        &["JOB", "TOOK", "MESSAGE"],
    ));
    for pod in rows {
        let mut row: Vec<Cell> = namespace(view, pod.namespace.as_str());
        let status = &pod.status;
        row.extend([
            status.pod.to_string().into(),
            Cell::toned(word(&status.phase), pod_tone(status.phase)),
            status.node.as_ref().map_or("", |node| node.as_str()).into(),
            status.epoch.to_string().into(),
            status.restarts.to_string().into(),
            status.exit_code.map(|code| code.to_string()).unwrap_or_default().into(),
            age(view.now, status.started_at).into(),
            status.reason.clone().unwrap_or_default().into(),
        ]);
        if view.wide {
            row.extend([
                pod.job.as_str().into(),
                took(view.now, status.started_at, status.finished_at).into(),
                status.message.clone().unwrap_or_default().into(),
            ]);
        }
        table.push(row);
    }
    table
}

pub fn nodes(rows: &[NodeStatus], view: View) -> Table {
    let view = View { namespaces: false, ..view };
    let mut table = Table::new(headers(
        view,
        &["NAME", "STATE", "CPU", "MEMORY", "GPU", "PODS", "SEEN"],
        &["ARCH", "OS", "KERNEL", "AGENT", "CRIU", "MODELS", "LABELS", "TAINTS", "MESSAGE"],
    ));
    for node in rows {
        let (used, all) = (&node.allocated, &node.capacity);
        let mut row: Vec<Cell> = vec![
            node.node.as_str().into(),
            Cell::toned(word(&node.state), node_tone(node.state)),
            format!("{}/{}", cores(used.cpu_milli), cores(all.cpu_milli)).into(),
            format!("{}/{}", size(used.memory_bytes), size(all.memory_bytes)).into(),
            gpus(used.gpu_milli, all.gpu_milli).into(),
            node.pods.to_string().into(),
            age(view.now, node.last_heartbeat_at).into(),
        ];
        if view.wide {
            let mut models: Vec<&str> = node.gpus.iter().map(|gpu| gpu.model.as_str()).collect();
            models.sort_unstable();
            models.dedup();
            let labels: Vec<String> =
                node.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            row.extend([
                node.arch.as_str().into(),
                node.os.as_str().into(),
                node.kernel.as_str().into(),
                node.agent_version.as_str().into(),
                node.criu.clone().unwrap_or_default().into(),
                models.join(",").into(),
                labels.join(",").into(),
                node.taints.join(",").into(),
                node.message.clone().unwrap_or_default().into(),
            ]);
        }
        table.push(row);
    }
    table
}

pub fn outputs(rows: &[OutputRow], view: View) -> Table {
    let view = View { namespaces: false, ..view };
    let mut table = Table::new(headers(view, &["POD", "EPOCH", "SIZE", "AGE"], &["DIGEST"]));
    for output in rows {
        let mut row: Vec<Cell> = vec![
            output.pod.to_string().into(),
            output.epoch.to_string().into(),
            size(output.bytes).into(),
            age(view.now, Some(output.at)).into(),
        ];
        if view.wide {
            row.push(output.digest.to_string().into());
        }
        table.push(row);
    }
    table
}

/// The first digits, which name a checkpoint to all practical purposes.
pub fn short(id: &Digest) -> String {
    id.hex().chars().take(12).collect()
}

pub fn checkpoints(rows: &[CheckpointRow], view: View) -> Table {
    let mut table = Table::new(headers(
        view,
        &["CHECKPOINT", "POD", "NODE", "SIZE", "NEW", "FROZEN", "AGE"],
        &["EPOCH", "KIND", "KEPT AS"],
    ));
    for checkpoint in rows {
        let mut row: Vec<Cell> = Vec::new();
        if view.namespaces {
            row.push(checkpoint.namespace.as_str().into());
        }
        row.extend([
            short(&checkpoint.id).into(),
            checkpoint.pod.to_string().into(),
            checkpoint.node.as_ref().map_or(String::new(), ToString::to_string).into(),
            size(checkpoint.bytes).into(),
            size(checkpoint.new_bytes).into(),
            format!("{} ms", checkpoint.frozen_ms).into(),
            age(view.now, Some(checkpoint.at)).into(),
        ]);
        if view.wide {
            row.push(checkpoint.epoch.to_string().into());
            row.push(checkpoint.kind.as_str().into());
            row.push(checkpoint.kept.clone().into());
        }
        table.push(row);
    }
    table
}

/// The summary, and a table of all nodes.
pub fn explanation(explained: &Explanation) -> (String, Table) {
    // Not of jobs that run on the nodes' own files.
    let images = explained.nodes.iter().any(|verdict| verdict.has_image.is_some());
    let (first, image): (&[_], &[_]) = (&["NODE", "FITS", "PODS"], if images { &["IMAGE"] } else { &[] });
    let mut table = Table::new([first, image, &["WHY NOT"]].concat());
    for verdict in &explained.nodes {
        let pods: Vec<String> = verdict.pods.iter().map(ToString::to_string).collect();
        let fits = if verdict.fits { Cell::toned("yes", Tone::Good) } else { Cell::toned("no", Tone::Bad) };
        let mut row = vec![verdict.node.as_str().into(), fits, pods.join(",").into()];
        if images {
            let words = |has| if has { "has the image" } else { "would pull the image" };
            row.push(verdict.has_image.map_or("", words).into());
        }
        row.push(verdict.reasons.join("; ").into());
        table.push(row);
    }
    let mut head = format!("job {}/{}: {}\n", explained.namespace, explained.job, explained.summary);
    if explained.waiting > 0 && explained.ahead > 0 {
        let jobs = if explained.ahead == 1 { "job is" } else { "jobs are" };
        head.push_str(&format!("  turn: {} {jobs} served before it\n", explained.ahead));
    }
    if let Some(nearest) = &explained.nearest {
        head.push_str(&format!("  nearest: {} {}\n", nearest.node, nearest.reasons.join("; ")));
    }
    if let Some(freeing) = &explained.freeing {
        let nodes: Vec<&str> = freeing.nodes.iter().map(NodeId::as_str).collect();
        let amount = match freeing.gpu_milli {
            0 => format!("{} cores", freeing.cpu_milli),
            milli => format!("{} GPUs, {} cores", MilliCpu(milli), freeing.cpu_milli),
        };
        let pods = freeing.pods.join(", ");
        head.push_str(&format!(
            "  to free: it would start on {} if {pods} ended ({amount})\n",
            nodes.join(", ")
        ));
    }
    for seat in &explained.seats {
        head.push_str(&format!("  {} is on {}: {}\n", seat.pod, seat.node, seat.why.join("; ")));
    }
    (head, table)
}

fn headers(view: View, narrow: &[&'static str], wide: &[&'static str]) -> Vec<&'static str> {
    let wide = if view.wide { wide } else { &[] };
    let namespace: &[_] = if view.namespaces { &["NAMESPACE"] } else { &[] };
    [namespace, narrow, wide].concat()
}

fn namespace(view: View, namespace: &str) -> Vec<Cell> {
    if view.namespaces { vec![namespace.into()] } else { Vec::new() }
}

/// The protocol's own word for a phase or state.
pub fn word<T: Serialize>(phase: &T) -> String {
    match serde_json::to_value(phase) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

pub fn reason_and_message(reason: Option<&str>, message: Option<&str>) -> Option<String> {
    match (reason, message) {
        (Some(reason), Some(message)) => Some(format!("{reason}: {message}")),
        (one, other) => one.or(other).map(str::to_owned),
    }
}

fn pods_done(job: &JobStatus) -> String {
    let count = |phase| job.pod_counts.get(&phase).copied().unwrap_or_default();
    let all: u32 = job.pod_counts.values().sum();
    match all {
        0 => {
            let done = job.pods.iter().filter(|pod| pod.phase == PodPhase::Succeeded).count();
            format!("{done}/{}", job.pods.len())
        }
        all => format!("{}/{all}", count(PodPhase::Succeeded)),
    }
}

pub fn job_tone(phase: JobPhase) -> Tone {
    match phase {
        JobPhase::Running | JobPhase::Succeeded => Tone::Good,
        JobPhase::Pending => Tone::Busy,
        JobPhase::Failed | JobPhase::Rejected => Tone::Bad,
        JobPhase::Suspended | JobPhase::Cancelled => Tone::Faint,
    }
}

pub fn pod_tone(phase: PodPhase) -> Tone {
    match phase {
        PodPhase::Running | PodPhase::Succeeded => Tone::Good,
        PodPhase::Failed | PodPhase::Lost => Tone::Bad,
        PodPhase::Paused => Tone::Faint,
        _ => Tone::Busy,
    }
}

pub fn node_tone(state: NodeState) -> Tone {
    match state {
        NodeState::Online => Tone::Good,
        NodeState::Silent => Tone::Busy,
        NodeState::Offline => Tone::Bad,
        NodeState::Cordoned => Tone::Faint,
    }
}

/// `2`, `0.5`: cores as a column of numbers.
pub fn cores(cpu: MilliCpu) -> String {
    let text = format!("{}.{:03}", cpu.0 / 1000, cpu.0 % 1000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn gpus(used: u64, all: u64) -> String {
    if all == 0 { "-".into() } else { format!("{}/{}", cores(MilliCpu(used)), cores(MilliCpu(all))) }
}

/// About three digits: `1.5Gi`, `512Mi`, `0`.
pub fn size(bytes: Bytes) -> String {
    let units = ["", "Ki", "Mi", "Gi", "Ti", "Pi"];
    let (mut value, mut unit) = (bytes.0 as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if unit > 0 && value < 10.0 { format!("{value:.1}") } else { format!("{value:.0}") };
    format!("{}{}", digits.trim_end_matches(".0"), units[unit])
}

fn age(now: Timestamp, since: Option<Timestamp>) -> String {
    since.map(|since| span(now.since(since).0)).unwrap_or_default()
}

fn took(now: Timestamp, from: Option<Timestamp>, to: Option<Timestamp>) -> String {
    from.map(|from| span(to.unwrap_or(now).since(from).0)).unwrap_or_default()
}

/// A span in at most two units: `3s`, `2m5s`, `3h`, `4d2h`.
pub fn span(ms: u64) -> String {
    let s = ms / 1000;
    let two = |large: u64, unit: &str, small: u64, rest: &str| match small {
        0 => format!("{large}{unit}"),
        small => format!("{large}{unit}{small}{rest}"),
    };
    match s {
        0..120 => format!("{s}s"),
        120..600 => two(s / 60, "m", s % 60, "s"),
        600..7_200 => format!("{}m", s / 60),
        7_200..36_000 => two(s / 3600, "h", s % 3600 / 60, "m"),
        36_000..172_800 => format!("{}h", s / 3600),
        172_800..864_000 => two(s / 86_400, "d", s % 86_400 / 3600, "h"),
        _ => format!("{}d", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::golden;

    #[test]
    fn spans() {
        for (s, want) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (185, "3m5s"),
            (900, "15m"),
            (8_100, "2h15m"),
            (90_000, "25h"),
            (180_000, "2d2h"),
            (8_640_000, "100d"),
        ] {
            assert_eq!(span(s * 1000), want);
        }
    }

    #[test]
    fn sizes() {
        for (bytes, want) in [
            (0, "0"),
            (1023, "1023"),
            (1536, "1.5Ki"),
            (512 << 20, "512Mi"),
            (4 << 30, "4Gi"),
            (66_000_000_000, "61Gi"),
        ] {
            assert_eq!(size(Bytes(bytes)), want);
        }
        assert_eq!(cores(MilliCpu(1500)), "1.5");
        assert_eq!(cores(MilliCpu(2000)), "2");
        assert_eq!(cores(MilliCpu(0)), "0");
    }

    /// Each `golden/KIND*.json` is shown as its `.table` and `.wide` say.
    #[test]
    fn tables_look_as_they_did() {
        let now = Timestamp::parse("2026-01-01T01:00:00.000Z").unwrap();
        let dir = golden::dir();
        let mut seen = 0;
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let stem = path.file_stem().unwrap().to_str().unwrap();
            for (extension, wide) in [("table", false), ("wide", true)] {
                let view = View { wide, namespaces: stem.ends_with("-all"), now };
                let shown = match stem.split('-').next().unwrap() {
                    "jobs" => jobs(&serde_json::from_str::<Vec<JobStatus>>(&text).unwrap(), view),
                    "pods" => pods(&serde_json::from_str::<Vec<PodRow>>(&text).unwrap(), view),
                    "nodes" => nodes(&serde_json::from_str::<Vec<NodeStatus>>(&text).unwrap(), view),
                    "outputs" => outputs(&serde_json::from_str::<Vec<OutputRow>>(&text).unwrap(), view),
                    "explain" => explanation(&serde_json::from_str(&text).unwrap()).1,
                    "describe" => continue,
                    other => panic!("no table for {other}"),
                };
                let shown = shown.render(true, false, &mut Vec::new());
                seen += 1;
                golden::check(&path.with_extension(extension), &shown);
            }
        }
        assert!(seen >= 8, "{seen} tables in {}", dir.display());
    }
}
