//! Conditions of jobs about nodes, in CEL: compiled once a job, evaluated once for each version of a node.

use std::collections::{BTreeMap, HashMap};

use berth_protocol::ids::NodeId;
use berth_protocol::job::{JobSpec, Network, Placement};
use berth_protocol::limits::CEL_BYTES_MAX;
use berth_protocol::message::user::FieldError;
use berth_protocol::resources::Inventory;
use cel::objects::{Key, Map};
use cel::{Context, ExecutionError, Program, Value};

use super::problem::{Site, Zoning};

/// Macros that walk a list, in one expression: each nests a loop, and their product is the work.
const LOOPS_MAX: usize = 2;

/// A job's placement, ready to be asked.
pub struct Rules {
    affinity: Option<Program>,
    prefer: Vec<(Program, i32)>,
    pub zoning: Zoning,
    /// The label whose values are zones; none: each node is one.
    label: Option<String>,
    zones: BTreeMap<String, usize>,
    /// By room.
    sites: Vec<Site>,
    /// By room: the node's version that was asked, and why it refuses.
    verdicts: Vec<(u64, Vec<Refusal>)>,
}

/// Why a node is no place for a job, however empty it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    Affinity(String),
    /// The condition asks for a label that the node does not have.
    NoLabel(String),
    AffinityError(String),
    Taint(String),
    HostImage,
    Bridge,
}

fn compile(field: String, text: &str) -> Result<Program, FieldError> {
    let error = |message: String| FieldError { field: field.clone(), line: None, column: None, message };
    if text.len() > CEL_BYTES_MAX {
        return Err(error(format!("is {} bytes long, at most {CEL_BYTES_MAX} are allowed", text.len())));
    }
    let loops = ["all", "exists", "exists_one", "map", "filter"];
    let loops: usize = loops.iter().map(|name| text.matches(&format!(".{name}")).count()).sum();
    if loops > LOOPS_MAX {
        return Err(error(format!("walks lists {loops} times, at most {LOOPS_MAX} are allowed")));
    }
    Program::compile(text).map_err(|errors| {
        let first = errors.errors.first();
        let what = first.map_or("it is empty".to_owned(), |e| format!("{} at column {}", e.msg, e.pos.1 + 1));
        error(format!("`{text}` is not a CEL expression: {what}"))
    })
}

impl Rules {
    /// Compiles a job's conditions; every one that does not compile is told.
    pub fn compile(placement: &Placement) -> Result<Self, Vec<FieldError>> {
        let mut errors = Vec::new();
        let mut keep = |result: Result<Program, FieldError>| result.map_err(|error| errors.push(error)).ok();
        let affinity =
            placement.affinity.as_ref().and_then(|text| keep(compile("affinity".to_owned(), text)));
        let prefer = placement
            .prefer
            .iter()
            .enumerate()
            .filter_map(|(i, p)| Some((keep(compile(format!("prefer[{i}].when"), &p.when))?, p.weight)))
            .collect();
        if !errors.is_empty() {
            return Err(errors);
        }
        let label = |text: &str| text.strip_prefix("node.labels.").unwrap_or(text).to_owned();
        let (zoning, label) = match (&placement.anti_affinity, &placement.spread) {
            (Some(apart), _) if apart == "job" => (Zoning::Apart, None),
            (Some(apart), _) => (Zoning::Apart, Some(label(apart))),
            (None, Some(spread)) => (Zoning::Spread, Some(label(spread))),
            (None, None) => (Zoning::Free, None),
        };
        Ok(Self {
            affinity,
            prefer,
            zoning,
            label,
            zones: BTreeMap::new(),
            sites: Vec::new(),
            verdicts: Vec::new(),
        })
    }

    /// Finds out what `node` is to the job; remembered until the node's version changes.
    pub fn ask(&mut self, room: usize, version: u64, node: &NodeId, has: &Inventory, spec: &JobSpec) {
        if self.sites.len() <= room {
            self.verdicts.resize(room + 1, (u64::MAX, Vec::new()));
            self.sites.resize(room + 1, Site::default());
        }
        if self.verdicts[room].0 == version {
            return;
        }
        let mut refusals = refusals(has, spec);
        let mut bonus = 0;
        if self.affinity.is_some() || !self.prefer.is_empty() {
            let mut context = Context::default();
            context.add_variable_from_value("node", describe(node, has));
            if let Some(program) = &self.affinity {
                let text = spec.placement.affinity.clone().unwrap_or_default();
                refusals.extend(evaluate(program, &context, text).err());
            }
            let holds = |program: &Program| matches!(program.execute(&context), Ok(Value::Bool(true)));
            bonus = self.prefer.iter().filter(|(p, _)| holds(p)).map(|(_, w)| i64::from(*w)).sum();
        }
        let zone = match &self.label {
            None => format!("node {node}"),
            Some(label) => match (has.labels.get(label), self.zoning) {
                (Some(value), _) => format!("label {value}"),
                // Without the label a node is a place of its own, or all such nodes are one.
                (None, Zoning::Apart) => format!("node {node}"),
                (None, _) => String::new(),
            },
        };
        let fresh = self.zones.len();
        let zone = *self.zones.entry(zone).or_insert(fresh);
        self.sites[room] = Site { eligible: refusals.is_empty(), bonus, zone };
        self.verdicts[room] = (version, refusals);
    }

    /// One for each room asked.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    pub fn refusals(&self, room: usize) -> &[Refusal] {
        self.verdicts.get(room).map_or(&[], |(_, refusals)| refusals)
    }
}

fn refusals(has: &Inventory, spec: &JobSpec) -> Vec<Refusal> {
    let tolerated = &spec.placement.tolerations;
    let taints = has.taints.iter().filter(|taint| !tolerated.contains(*taint)).cloned().map(Refusal::Taint);
    let host = spec.pod.containers.iter().any(|c| c.image == "host") && !has.host_image;
    let bridge = spec.pod.network == Network::Bridge && !has.bridge;
    taints.chain(host.then_some(Refusal::HostImage)).chain(bridge.then_some(Refusal::Bridge)).collect()
}

fn evaluate(program: &Program, context: &Context<'_, '_>, text: String) -> Result<(), Refusal> {
    match program.execute(context) {
        Ok(Value::Bool(true)) => Ok(()),
        Ok(Value::Bool(false)) => Err(Refusal::Affinity(text)),
        Ok(other) => {
            Err(Refusal::AffinityError(format!("it gives a {}, not true or false", other.type_of())))
        }
        Err(ExecutionError::NoSuchKey(key)) => Err(Refusal::NoLabel((*key).clone())),
        Err(error) => Err(Refusal::AffinityError(error.to_string())),
    }
}

fn map(entries: impl IntoIterator<Item = (String, Value)>) -> Value {
    let map: HashMap<Key, Value> = entries.into_iter().map(|(key, value)| (Key::from(key), value)).collect();
    Value::Map(Map { map: map.into() })
}

fn int(n: u64) -> Value {
    Value::Int(i64::try_from(n).unwrap_or(i64::MAX))
}

/// `node` as conditions see it: cores as a number with fractions, memory in bytes.
fn describe(node: &NodeId, has: &Inventory) -> Value {
    let usable = || has.gpus.iter().filter(|gpu| gpu.unhealthy.is_none());
    let text = |text: &str| Value::from(text);
    let gpu = map([
        ("count".to_owned(), int(usable().count() as u64)),
        ("model".to_owned(), text(usable().next().map_or("", |gpu| &gpu.model))),
        ("memory".to_owned(), int(usable().map(|gpu| gpu.memory.0).max().unwrap_or(0))),
    ]);
    map([
        ("name".to_owned(), text(node.as_str())),
        ("labels".to_owned(), map(has.labels.iter().map(|(k, v)| (k.clone(), text(v))))),
        ("arch".to_owned(), text(&has.arch)),
        ("kernel".to_owned(), text(&has.kernel)),
        ("cores".to_owned(), Value::Float(f64::from(u32::try_from(has.cpu.0).unwrap_or(u32::MAX)) / 1000.0)),
        ("memory".to_owned(), int(has.memory.0)),
        ("taints".to_owned(), Value::from(has.taints.iter().map(|t| text(t)).collect::<Vec<_>>())),
        ("gpu".to_owned(), gpu),
    ])
}
