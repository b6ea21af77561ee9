//! `get`: lists of jobs, pods, nodes, checkpoints and outputs, once or as they change.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::time::SystemTime;

use anyhow::Context as _;
use berth_protocol::codec;
use berth_protocol::ids::{JobName, Namespace, NodeId, PodName};
use berth_protocol::message::query::{CheckpointRow, OutputRow, PodRow, Query};
use berth_protocol::message::user::{JobStatus, NodeStatus};
use berth_protocol::topic::{JobTopic, Topic};
use berth_protocol::units::Timestamp;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::command::{Format, Get, Kind};
use super::config::Settings;
use super::connect::{News, Session};
use super::render::{self, View};
use super::table::Table;
use super::{Usage, print_value};

pub async fn get(settings: &Settings, args: Get) -> anyhow::Result<u8> {
    let wanted = Wanted::new(settings, &args)?;
    let filters = if args.watch { wanted.filters(settings)? } else { Vec::new() };
    let mut session = Session::open(settings, filters).await?;
    let rows = wanted.list(&mut session).await?;
    let mut printer = Printer::new(settings.format, args.kind, args.all_namespaces, args.watch);
    printer.print(&rows)?;
    if args.watch {
        watch(&mut session, &wanted, &mut printer, rows).await?;
    }
    session.close().await;
    Ok(0)
}

/// What to list.
struct Wanted {
    kind: Kind,
    namespace: Option<Namespace>,
    job: Option<JobName>,
    pod: Option<PodName>,
    node: Option<NodeId>,
    selector: Selector,
}

impl Wanted {
    fn new(settings: &Settings, args: &Get) -> anyhow::Result<Self> {
        let name = args.name.as_deref();
        let usage = |error: berth_protocol::ids::IdError| Usage::new(error.to_string());
        let mut wanted = Self {
            kind: args.kind,
            namespace: (!args.all_namespaces).then(|| settings.namespace.clone()),
            job: None,
            pod: None,
            node: None,
            selector: Selector::parse(args.selector.as_deref().unwrap_or_default()).map_err(Usage::new)?,
        };
        if args.selector.is_some() && args.kind != Kind::Nodes {
            return Err(Usage::new("labels are the nodes': -l goes with `get nodes`").into());
        }
        if args.all_namespaces && name.is_some() {
            return Err(Usage::new("a name is one of a namespace: leave out -A or the name").into());
        }
        match (args.kind, name) {
            (Kind::Jobs, Some(name)) => wanted.job = Some(JobName::parse(name).map_err(usage)?),
            // What reads as a pod may be a job all the same: `digits-2`.
            (Kind::Pods, Some(name)) => {
                wanted.job = Some(JobName::parse(name).map_err(usage)?);
                wanted.pod = PodName::parse(name).ok();
            }
            (Kind::Nodes, Some(name)) => wanted.node = Some(NodeId::parse(name).map_err(usage)?),
            (Kind::Checkpoints | Kind::Outputs, Some(name)) => {
                wanted.job = Some(JobName::parse(name).map_err(usage)?)
            }
            (Kind::Outputs, None) => {
                return Err(Usage::new("whose outputs? write `berth get outputs JOB`").into());
            }
            (_, None) => {}
        }
        if args.watch && args.kind == Kind::Outputs {
            return Err(Usage::new(
                "outputs come when a job ends: use `berth wait`, then `berth get outputs`",
            )
            .into());
        }
        if args.watch && args.kind == Kind::Checkpoints {
            return Err(
                Usage::new("checkpoints are not watched: `berth get jobs -w` shows each job's last").into()
            );
        }
        Ok(wanted)
    }

    /// Topics on which the listed things announce their changes.
    fn filters(&self, settings: &Settings) -> anyhow::Result<Vec<String>> {
        let prefix = format!("berth/v1/{}", settings.cluster);
        let namespace = self.namespace.as_ref().map_or("+", |namespace| namespace.as_str());
        Ok(match self.kind {
            Kind::Nodes => vec![format!("{prefix}/state/nodes/+")],
            _ => vec![format!("{prefix}/jobs/{namespace}/+/status")],
        })
    }

    async fn list(&self, session: &mut Session) -> anyhow::Result<Vec<Value>> {
        let namespace = self.namespace.clone();
        let here = || namespace.clone().unwrap_or_else(Namespace::default_namespace);
        match (self.kind, &self.job, &self.node) {
            (Kind::Jobs, Some(job), _) => {
                let detail = session.query(Query::Job { namespace: here(), job: job.clone() }).await?;
                Ok(vec![super::wait::Seen::from_detail(detail)?.value])
            }
            (Kind::Jobs, None, _) => {
                session.pages(|after| Query::Jobs { namespace: namespace.clone(), after }).await
            }
            (Kind::Pods, job, _) => self.list_pods(session, job.clone()).await,
            (Kind::Nodes, _, Some(node)) => {
                Ok(vec![session.query(Query::Node { node: node.clone() }).await?])
            }
            (Kind::Nodes, _, None) => {
                let rows = session.pages(|after| Query::Nodes { after }).await?;
                Ok(rows.into_iter().filter(|row| self.selector.matches(row)).collect())
            }
            (Kind::Checkpoints, job, _) => {
                let of = |after| Query::Checkpoints { namespace: namespace.clone(), job: job.clone(), after };
                session.pages(of).await
            }
            (Kind::Outputs, job, _) => {
                let job = job.clone().context("no job named")?;
                session.pages(|after| Query::Outputs { namespace: here(), job: job.clone(), after }).await
            }
        }
    }

    async fn list_pods(&self, session: &mut Session, job: Option<JobName>) -> anyhow::Result<Vec<Value>> {
        let of = |job: Option<JobName>| {
            let namespace = self.namespace.clone();
            move |after| Query::Pods { namespace: namespace.clone(), job: job.clone(), after }
        };
        let of_job = session.pages(of(job)).await;
        let Some(pod) = &self.pod else { return of_job };
        match of_job {
            Ok(rows) if !rows.is_empty() => Ok(rows),
            // No such job: then it is a pod's name.
            _ => {
                let rows = session.pages(of(Some(pod.job.clone()))).await?;
                let rows: Vec<Value> =
                    rows.into_iter().filter(|row| row["pod"].as_str() == Some(&pod.to_string())).collect();
                anyhow::ensure!(!rows.is_empty(), "job {} has no pod {pod}", pod.job);
                Ok(rows)
            }
        }
    }

    /// The rows that a message on a watched topic stands for.
    fn rows_of(&self, topic: &Topic, payload: &[u8]) -> Vec<Value> {
        let Ok(value) = codec::decode::<Value>(topic, payload) else { return Vec::new() };
        match (topic, self.kind) {
            (Topic::NodeState { node }, Kind::Nodes) => {
                let named = self.node.as_ref().is_none_or(|wanted| wanted == node);
                if named && self.selector.matches(&value) { vec![value] } else { Vec::new() }
            }
            (Topic::Job { job, kind: JobTopic::Status, .. }, Kind::Jobs) => {
                if self.job.as_ref().is_none_or(|wanted| wanted == job) { vec![value] } else { Vec::new() }
            }
            (Topic::Job { namespace, job, kind: JobTopic::Status }, Kind::Pods) => {
                let of_job = self.job.as_ref().is_none_or(|wanted| wanted == job);
                let of_pod = |row: &Value| {
                    self.pod.as_ref().is_some_and(|pod| row["pod"].as_str() == Some(&pod.to_string()))
                };
                let pods = value["pods"].as_array().cloned().unwrap_or_default();
                let add = |mut pod: Value| {
                    pod["namespace"] = namespace.as_str().into();
                    pod["job"] = job.as_str().into();
                    pod
                };
                pods.into_iter().map(add).filter(|row| of_job || of_pod(row)).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// Prints what changes, for ever.
async fn watch(
    session: &mut Session,
    wanted: &Wanted,
    printer: &mut Printer,
    rows: Vec<Value>,
) -> anyhow::Result<()> {
    let mut last: BTreeMap<String, Value> =
        rows.into_iter().map(|row| (key(wanted.kind, &row), row)).collect();
    loop {
        let rows = match session.next().await? {
            News::Message(message) => wanted.rows_of(&message.topic, &message.payload),
            News::Reconnected => wanted.list(session).await?,
            News::Reply(_) => continue,
        };
        let mut changed = Vec::new();
        for row in rows {
            let key = key(wanted.kind, &row);
            if last.get(&key) != Some(&row) {
                last.insert(key, row.clone());
                changed.push(row);
            }
        }
        if !changed.is_empty() {
            printer.print(&changed)?;
        }
    }
}

/// What names a row among its kind.
fn key(kind: Kind, row: &Value) -> String {
    let text = |field: &str| row[field].as_str().unwrap_or_default().to_owned();
    match kind {
        Kind::Jobs => format!("{}/{}", text("namespace"), text("job")),
        Kind::Pods => format!("{}/{}", text("namespace"), text("pod")),
        Kind::Nodes => text("node"),
        Kind::Checkpoints => text("id").trim_start_matches("sha256:").to_owned(),
        Kind::Outputs => format!("{}/{}", text("pod"), row["epoch"]),
    }
}

struct Printer {
    format: Format,
    kind: Kind,
    namespaces: bool,
    /// Rows come one by one: no array around them.
    streaming: bool,
    header: bool,
    widths: Vec<usize>,
}

impl Printer {
    fn new(format: Format, kind: Kind, namespaces: bool, streaming: bool) -> Self {
        Self { format, kind, namespaces, streaming, header: true, widths: Vec::new() }
    }

    fn print(&mut self, rows: &[Value]) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        match self.format {
            Format::Json if self.streaming => {
                for row in rows {
                    writeln!(out, "{row}")?;
                }
            }
            Format::Yaml if self.streaming => {
                for row in rows {
                    write!(out, "---\n{}", serde_yaml_ng::to_string(row)?)?;
                }
            }
            Format::Json | Format::Yaml => print_value(self.format, &Value::Array(rows.to_vec()))?,
            Format::Name => {
                for row in rows {
                    let key = key(self.kind, row);
                    // A name is ready for other verbs; across namespaces it would not be one without its own.
                    let name =
                        if self.namespaces { &key } else { key.split('/').next_back().unwrap_or(&key) };
                    writeln!(out, "{name}")?;
                }
            }
            Format::Table | Format::Wide => {
                let table = self.table(rows)?;
                if table.is_empty() && self.header && !self.streaming {
                    eprintln!("berth: nothing found");
                    return Ok(());
                }
                out.write_all(table.render(self.header, colour(), &mut self.widths).as_bytes())?;
                self.header = false;
            }
        }
        Ok(out.flush()?)
    }

    fn table(&self, rows: &[Value]) -> anyhow::Result<Table> {
        let view = View { wide: self.format == Format::Wide, namespaces: self.namespaces, now: now() };
        Ok(match self.kind {
            Kind::Jobs => render::jobs(&typed::<JobStatus>(rows)?, view),
            Kind::Pods => render::pods(&typed::<PodRow>(rows)?, view),
            Kind::Nodes => render::nodes(&typed::<NodeStatus>(rows)?, view),
            Kind::Checkpoints => render::checkpoints(&typed::<CheckpointRow>(rows)?, view),
            Kind::Outputs => render::outputs(&typed::<OutputRow>(rows)?, view),
        })
    }
}

fn typed<T: DeserializeOwned>(rows: &[Value]) -> anyhow::Result<Vec<T>> {
    let typed = rows.iter().map(|row| serde_json::from_value(row.clone()));
    typed
        .collect::<Result<_, _>>()
        .context("the controller's reply cannot be read: is it of another version?")
}

pub fn now() -> Timestamp {
    Timestamp::from_system(SystemTime::now())
}

/// Standard output is a terminal, and nobody asked for none.
pub fn colour() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Conditions on labels, all of which must hold: `zone=lab`, `gpu!=none`, `ssd`, `!spot`.
#[derive(Debug, Default)]
struct Selector(Vec<(String, Condition)>);

#[derive(Debug)]
enum Condition {
    Is(String),
    IsNot(String),
    There,
    Absent,
}

impl Selector {
    fn parse(text: &str) -> Result<Self, String> {
        let terms = text.split(',').map(str::trim).filter(|term| !term.is_empty());
        let parsed = terms.map(|term| {
            let (key, condition) = if let Some((key, value)) = term.split_once("!=") {
                (key, Condition::IsNot(value.into()))
            } else if let Some((key, value)) = term.split_once("==").or_else(|| term.split_once('=')) {
                (key, Condition::Is(value.into()))
            } else if let Some(key) = term.strip_prefix('!') {
                (key, Condition::Absent)
            } else {
                (term, Condition::There)
            };
            match key {
                "" => Err(format!("`{term}` names no label: write KEY=VALUE, KEY!=VALUE, KEY or !KEY")),
                key => Ok((key.to_owned(), condition)),
            }
        });
        parsed.collect::<Result<_, _>>().map(Self)
    }

    fn matches(&self, node: &Value) -> bool {
        self.0.iter().all(|(key, condition)| {
            let label = node["labels"].get(key).and_then(Value::as_str);
            match condition {
                Condition::Is(value) => label == Some(value),
                Condition::IsNot(value) => label != Some(value),
                Condition::There => label.is_some(),
                Condition::Absent => label.is_none(),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn selectors() {
        let node = json!({"labels": {"zone": "lab", "ssd": ""}});
        for (text, want) in [
            ("", true),
            ("zone=lab", true),
            ("zone==lab,ssd", true),
            ("zone!=lab", false),
            ("!spot", true),
            ("!zone", false),
            ("rack!=1", true),
            ("rack=1", false),
        ] {
            assert_eq!(Selector::parse(text).unwrap().matches(&node), want, "{text}");
        }
        assert!(Selector::parse("=lab").is_err());
    }
}
