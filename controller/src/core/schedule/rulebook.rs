//! What jobs say about nodes, one rulebook for all jobs that say the same: compiled once, asked once for each version
//! of a node, forgotten with its last job.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use berth_protocol::ids::NodeId;
use berth_protocol::job::{JobSpec, Network, Placement, Preference};
use berth_protocol::message::user::FieldError;
use berth_protocol::policy::{self, Wants};
use berth_protocol::resources::Inventory;
use cel::objects::{Key, Map};
use cel::{Context, ExecutionError, Program, Value};

use super::problem::{Site, Zoning};
use super::typed::{self, Fault};

/// A rulebook's place among them.
pub type BookId = usize;

/// All that a job says about nodes, whatever is free on them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Words {
    affinity: Option<String>,
    prefer: Vec<(String, i32)>,
    spread: Option<String>,
    anti_affinity: Option<String>,
    tolerations: BTreeSet<String>,
    /// What nodes' own policies may be against.
    wants: Wants,
}

impl Words {
    /// `fine`: some node's policy asks for what differs from job to job.
    fn of(spec: &JobSpec, fine: bool) -> Self {
        let wants = Wants::of(&spec.pod);
        let Placement { affinity, prefer, spread, tolerations, anti_affinity } = &spec.placement;
        Self {
            affinity: affinity.clone(),
            prefer: prefer.iter().map(|p| (p.when.clone(), p.weight)).collect(),
            spread: spread.clone(),
            anti_affinity: anti_affinity.clone(),
            tolerations: tolerations.clone(),
            wants: if fine { wants } else { wants.coarse() },
        }
    }
}

/// The rulebooks in use.
#[derive(Default)]
pub struct Rulebooks {
    ids: BTreeMap<Words, BookId>,
    books: Vec<Option<Book>>,
    /// Some node's policy asks for repositories or amounts. As long as none does, jobs that differ in these alone share a
    /// rulebook.
    fine: bool,
}

/// One rulebook, and what it says of each room.
pub struct Book {
    words: Words,
    jobs: usize,
    affinity: Option<Program>,
    prefer: Vec<(Program, i32)>,
    pub zoning: Zoning,
    /// The label whose values are zones; none: each node is one.
    label: Option<String>,
    zones: BTreeMap<String, usize>,
    /// By room.
    sites: Vec<Site>,
    /// By room, the node's version that was asked.
    asked: Vec<u64>,
    /// Of rooms that are refused.
    refusals: BTreeMap<usize, Vec<Refusal>>,
    /// The clock of inventories at which every room was asked.
    seen: u64,
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
    /// By the node's own policy.
    Policy(policy::Refusal),
}

/// A condition that is none, at which field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadCondition {
    pub field: String,
    pub text: String,
    pub fault: Fault,
}

impl BadCondition {
    /// `place`: the line and column where the field's value begins in `file`.
    pub fn in_file(self, file: &str, place: Option<(u32, u32)>) -> FieldError {
        let Self { field, text, fault } = self;
        let spot = place.and_then(|(line, column)| {
            let rest: String = file
                .lines()
                .nth((line as usize).checked_sub(1)?)?
                .chars()
                .skip((column as usize).checked_sub(1)?)
                .collect();
            // Folded or escaped text is shown by its beginning.
            let quote = usize::from(rest.starts_with(['"', '\'']));
            let same = rest.chars().skip(quote).collect::<String>().starts_with(&text);
            let within = if same { fault.at.map_or(0, |at| at + quote) } else { 0 };
            Some((line, column + u32::try_from(within).ok()?))
        });
        let message = match (fault.at, text.contains('\n')) {
            (Some(at), false) => format!("{} (at character {} of `{text}`)", fault.message, at + 1),
            _ => fault.message,
        };
        FieldError { field, line: spot.map(|s| s.0), column: spot.map(|s| s.1), message }
    }
}

impl Rulebooks {
    /// The rulebook of a job, which `close` gives back.
    pub fn open(&mut self, spec: &JobSpec) -> Result<BookId, Vec<BadCondition>> {
        let words = Words::of(spec, self.fine);
        if let Some(id) = self.ids.get(&words) {
            if let Some(book) = &mut self.books[*id] {
                book.jobs += 1;
            }
            return Ok(*id);
        }
        let book = Book::compile(words.clone())?;
        let free = self.books.iter().position(Option::is_none);
        let id = free.unwrap_or_else(|| {
            self.books.push(None);
            self.books.len() - 1
        });
        self.books[id] = Some(book);
        self.ids.insert(words, id);
        Ok(id)
    }

    pub fn close(&mut self, id: BookId) {
        let Some(book) = self.books.get_mut(id).and_then(Option::as_mut) else { return };
        book.jobs -= 1;
        if book.jobs == 0 {
            self.ids.remove(&book.words);
            self.books[id] = None;
        }
    }

    /// A node has such a policy. Whether it is the first that asks for so much: jobs' rulebooks are no longer the right ones.
    pub fn learn(&mut self, has: &Inventory) -> bool {
        let fine = has.policy.as_ref().is_some_and(|policy| policy.is_fine());
        fine && !std::mem::replace(&mut self.fine, true)
    }

    pub fn get(&self, id: BookId) -> Option<&Book> {
        self.books.get(id)?.as_ref()
    }

    pub fn get_mut(&mut self, id: BookId) -> Option<&mut Book> {
        self.books.get_mut(id)?.as_mut()
    }
}

/// Everything wrong with a job's conditions.
pub fn check(placement: &Placement) -> Vec<BadCondition> {
    let prefer = placement.prefer.iter().enumerate();
    let prefer = prefer.map(|(i, Preference { when, .. })| (format!("prefer[{i}].when"), when));
    let affinity = placement.affinity.iter().map(|text| ("affinity".to_owned(), text));
    affinity
        .chain(prefer)
        .filter_map(|(field, text)| {
            let fault = typed::compile(text).err()?;
            Some(BadCondition { field, text: text.clone(), fault })
        })
        .collect()
}

fn compile(field: String, text: &str) -> Result<Program, Vec<BadCondition>> {
    typed::compile(text).map_err(|fault| vec![BadCondition { field, text: text.to_owned(), fault }])
}

impl Book {
    fn compile(words: Words) -> Result<Self, Vec<BadCondition>> {
        let affinity =
            words.affinity.as_ref().map(|text| compile("affinity".to_owned(), text)).transpose()?;
        let prefer = words.prefer.iter().enumerate();
        let prefer =
            prefer.map(|(i, (when, weight))| Ok((compile(format!("prefer[{i}].when"), when)?, *weight)));
        let prefer = prefer.collect::<Result<Vec<_>, Vec<BadCondition>>>()?;
        let label = |text: &str| text.strip_prefix("node.labels.").unwrap_or(text).to_owned();
        let (zoning, label) = match (&words.anti_affinity, &words.spread) {
            (Some(apart), _) if apart == "job" => (Zoning::Apart, None),
            (Some(apart), _) => (Zoning::Apart, Some(label(apart))),
            (None, Some(spread)) => (Zoning::Spread, Some(label(spread))),
            (None, None) => (Zoning::Free, None),
        };
        Ok(Self {
            words,
            jobs: 1,
            affinity,
            prefer,
            zoning,
            label,
            zones: BTreeMap::new(),
            sites: Vec::new(),
            asked: Vec::new(),
            refusals: BTreeMap::new(),
            seen: u64::MAX,
        })
    }

    /// Whether every room was asked at this moment of the clock of inventories.
    pub fn is_current(&self, clock: u64, rooms: usize) -> bool {
        self.seen == clock && self.sites.len() == rooms
    }

    pub fn all_asked(&mut self, clock: u64) {
        self.seen = clock;
    }

    /// Finds out what `node` is to the jobs; remembered until the node's version changes. Whether it was asked anew.
    pub fn ask(&mut self, room: usize, version: u64, node: &NodeId, has: &Inventory) -> bool {
        if self.sites.len() <= room {
            self.asked.resize(room + 1, u64::MAX);
            self.sites.resize(room + 1, Site::default());
        }
        if self.asked[room] == version {
            return false;
        }
        let mut refusals = self.words.refusals(has);
        let mut bonus = 0;
        if self.affinity.is_some() || !self.prefer.is_empty() {
            let mut context = Context::default();
            // The name is free: it is no function of the language's own.
            let _ = context.add_function("atLeast", at_least);
            context.add_variable_from_value("node", describe(node, has));
            if let Some(program) = &self.affinity {
                let text = self.words.affinity.as_deref().unwrap_or_default();
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
        let zone = if self.zoning == Zoning::Free {
            0
        } else {
            let fresh = self.zones.len();
            *self.zones.entry(zone).or_insert(fresh)
        };
        self.sites[room] = Site { eligible: refusals.is_empty(), bonus, zone };
        self.asked[room] = version;
        if refusals.is_empty() {
            self.refusals.remove(&room);
        } else {
            self.refusals.insert(room, refusals);
        }
        true
    }

    /// One for each room asked.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    pub fn refusals(&self, room: usize) -> &[Refusal] {
        self.refusals.get(&room).map_or(&[], Vec::as_slice)
    }

    /// Whether no room is refused.
    pub fn is_everywhere(&self) -> bool {
        self.refusals.is_empty()
    }

    /// Whether some rooms may be better than others.
    pub fn has_preferences(&self) -> bool {
        !self.prefer.is_empty()
    }
}

impl Words {
    fn refusals(&self, has: &Inventory) -> Vec<Refusal> {
        let strange = has.taints.iter().filter(|taint| !self.tolerations.contains(*taint));
        let host = self.wants.host_image && !has.host_image;
        let bridge = self.wants.network == Network::Bridge && !has.bridge;
        let against = has.policy.as_ref().map(|policy| policy.refusals(&self.wants)).unwrap_or_default();
        // Nodes of every version say whether they run these.
        let against = against.into_iter().filter(|refusal| refusal.rule != policy::Rule::HostImage);
        strange
            .cloned()
            .map(Refusal::Taint)
            .chain(host.then_some(Refusal::HostImage))
            .chain(bridge.then_some(Refusal::Bridge))
            .chain(against.map(Refusal::Policy))
            .collect()
    }
}

fn evaluate(program: &Program, context: &Context<'_, '_>, text: &str) -> Result<(), Refusal> {
    match program.execute(context) {
        Ok(Value::Bool(true)) => Ok(()),
        Ok(Value::Bool(false)) => Err(Refusal::Affinity(text.to_owned())),
        Ok(other) => {
            Err(Refusal::AffinityError(format!("it gives a {}, not true or false", other.type_of())))
        }
        Err(ExecutionError::NoSuchKey(key)) => Err(Refusal::NoLabel((*key).clone())),
        Err(error) => Err(Refusal::AffinityError(error.to_string())),
    }
}

/// `"6.12.4".atLeast("6.9")`: number by number, what is no number as zero.
fn at_least(
    cel::extractors::This(has): cel::extractors::This<std::sync::Arc<String>>,
    wants: std::sync::Arc<String>,
) -> bool {
    let numbers = |text: &str| -> Vec<u64> {
        let digits = |part: &str| part.chars().take_while(char::is_ascii_digit).collect::<String>();
        text.split(['.', '-', '+']).map(|part| digits(part).parse().unwrap_or(0)).collect()
    };
    let (mut has, mut wants) = (numbers(&has), numbers(&wants));
    let longer = has.len().max(wants.len());
    has.resize(longer, 0);
    wants.resize(longer, 0);
    has >= wants
}

fn map(entries: impl IntoIterator<Item = (String, Value)>) -> Value {
    let map: HashMap<Key, Value> = entries.into_iter().map(|(key, value)| (Key::from(key), value)).collect();
    Value::Map(Map { map: map.into() })
}

fn object<const N: usize>(fields: [(&str, Value); N]) -> Value {
    map(fields.into_iter().map(|(name, value)| (name.to_owned(), value)))
}

fn whole(n: u64) -> Value {
    Value::Int(i64::try_from(n).unwrap_or(i64::MAX))
}

fn text(text: &str) -> Value {
    Value::from(text)
}

fn texts<'a>(list: impl Iterator<Item = &'a String>) -> Value {
    Value::from(list.map(|item| text(item)).collect::<Vec<_>>())
}

/// `node` as `typed` has it: cores as a number with fractions, memory and disk in bytes, what is not there as an
/// empty text.
fn describe(node: &NodeId, has: &Inventory) -> Value {
    let usable = || has.gpus.iter().filter(|gpu| gpu.unhealthy.is_none());
    let maybe = |value: &Option<String>| text(value.as_deref().unwrap_or_default());
    let gpu = object([
        ("count", whole(usable().count() as u64)),
        ("model", text(usable().next().map_or("", |gpu| &gpu.model))),
        ("memory", whole(usable().map(|gpu| gpu.memory.0).max().unwrap_or(0))),
    ]);
    let versions = object([
        ("agent", text(&has.agent_version)),
        ("kernel", text(&has.kernel)),
        ("criu", maybe(&has.criu)),
        ("driver", maybe(&has.gpu_driver)),
        ("cuda", maybe(&has.cuda)),
    ]);
    let cores = f64::from(u32::try_from(has.cpu.0).unwrap_or(u32::MAX)) / 1000.0;
    object([
        ("name", text(node.as_str())),
        ("hostname", text(&has.hostname)),
        ("labels", map(has.labels.iter().map(|(key, value)| (key.clone(), text(value))))),
        ("taints", texts(has.taints.iter())),
        ("arch", text(&has.arch)),
        ("os", text(&has.os)),
        ("kernel", text(&has.kernel)),
        ("cores", Value::Float(cores)),
        ("memory", whole(has.memory.0)),
        ("disk", whole(has.disk.0)),
        ("cpu", object([("model", text(&has.cpu_model)), ("features", texts(has.cpu_features.iter()))])),
        ("gpu", gpu),
        ("versions", versions),
    ])
}
