//! Why a pod does not fit a node, in words with numbers. Reads what `solve` reads, and decides nothing.

use std::collections::BTreeMap;

use berth_protocol::job::JobSpec;
use berth_protocol::units::{Bytes, MilliCpu};

use super::problem::{Room, Shape};
use super::rulebook::Refusal;

/// One reason against one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// The whole of it: `needs 4 cores, 1500m are free`.
    pub text: String,
    /// For counting nodes of which it holds, with `needs`, `lacks`, … for one and `need`, `lack`, … for many.
    verb: (&'static str, &'static str),
    object: String,
}

impl Reason {
    fn new(verb: (&'static str, &'static str), object: impl Into<String>, detail: impl AsRef<str>) -> Self {
        let (object, detail) = (object.into(), detail.as_ref());
        let text = if detail.is_empty() {
            format!("{} {object}", verb.0)
        } else {
            format!("{} {object}, {detail}", verb.0)
        };
        Self { text, verb, object }
    }
}

impl Reason {
    /// What a checkpoint needs and the node has not, said whole.
    pub fn of_checkpoint(text: String) -> Self {
        Self { text, verb: CANNOT, object: "go on from its checkpoint".to_owned() }
    }

    /// As counted over nodes: without the node's own figures.
    pub fn counted(&self) -> String {
        format!("{} {}", self.verb.1, self.object)
    }

    /// How far from fitting, roughly: what is short may come free, what is closed may open, what is refused stays.
    pub fn distance(&self) -> u8 {
        match self.verb {
            NEEDS => 0,
            IS => 1,
            HAS => 2,
            _ => 3,
        }
    }
}

/// Another pod of the job is in the node's zone.
pub fn apart() -> Reason {
    Reason::new(HAS, "a pod of the job", "and antiAffinity keeps them apart")
}

/// Its room is held.
pub fn held(by: Option<String>) -> Reason {
    Reason::new(IS, "held for another job", by.map(|by| format!("which is {by}")).unwrap_or_default())
}

const CANNOT: (&str, &str) = ("cannot", "cannot");
const NEEDS: (&str, &str) = ("needs", "need");
const LACKS: (&str, &str) = ("lacks", "lack");
const IS: (&str, &str) = ("is", "are");
const HAS: (&str, &str) = ("has", "have");
const ALLOWS_NO: (&str, &str) = ("has a policy that allows no", "have a policy that allows no");
const DOES_NOT: (&str, &str) = ("does not", "do not");

fn cores(milli: u64) -> String {
    match milli {
        1000 => "1 core".to_owned(),
        milli if milli % 1000 == 0 => format!("{} cores", milli / 1000),
        milli => format!("{} of a core", MilliCpu(milli)),
    }
}

fn rounded(bytes: u64) -> String {
    let mib = bytes / Bytes::MIB;
    if mib >= 10 * 1024 { format!("{}Gi", mib / 1024) } else { format!("{mib}Mi") }
}

/// Everything that stands against one more pod of `spec` in `room`; empty where it fits.
/// `closed` says why the node takes no pods at all, `taken` of how many devices programs outside berth hold a part.
pub fn reasons(
    room: &Room,
    shape: &Shape,
    refusals: &[Refusal],
    closed: Option<&str>,
    taken: usize,
    spec: &JobSpec,
) -> Vec<Reason> {
    let mut all = Vec::new();
    if let Some(closed) = closed {
        all.push(Reason::new(IS, closed, ""));
    }
    for refusal in refusals {
        all.push(match refusal {
            Refusal::Affinity(text) => {
                Reason::new(DOES_NOT, "match the affinity", format!("which is `{text}`"))
            }
            Refusal::NoLabel(key) => {
                Reason::new(LACKS, format!("label {key}"), "which the affinity asks for")
            }
            Refusal::AffinityError(error) => {
                Reason::new(DOES_NOT, "match the affinity", format!("which cannot be evaluated: {error}"))
            }
            Refusal::Taint(taint) => {
                Reason::new(HAS, format!("taint {taint}"), "which the job does not tolerate")
            }
            Refusal::HostImage => {
                Reason::new(ALLOWS_NO, "`image: host`", "name an image, or see `host-image` there")
            }
            Refusal::Policy(refusal) => {
                Reason::new(ALLOWS_NO, refusal.what.as_str(), format!("see `{}` there", refusal.rule.key()))
            }
            Refusal::Bridge => Reason::new(
                LACKS,
                "`network: bridge`",
                "use `network: host` or `network: none`, or install what the agent's log asks for",
            ),
        });
    }
    if room.cpu_milli < shape.cpu_milli {
        let free = format!("{} are free", MilliCpu(room.cpu_milli));
        all.push(Reason::new(NEEDS, cores(shape.cpu_milli), free));
    }
    if room.memory_bytes < shape.memory_bytes {
        let free = format!("{} are free", rounded(room.memory_bytes));
        all.push(Reason::new(NEEDS, format!("{} of memory", Bytes(shape.memory_bytes)), free));
    }
    if room.disk_bytes < shape.disk_bytes {
        // Of its size: what files already fill is not known here.
        let free = format!("{} are not promised to others", rounded(room.disk_bytes));
        all.push(Reason::new(NEEDS, format!("{} of disk", Bytes(shape.disk_bytes)), free));
    }
    let fitting = room.devices.iter().filter(|device| device.fits(shape)).count();
    if fitting < shape.gpus {
        all.push(Reason::new(NEEDS, gpu(shape, spec), devices(room, shape, fitting, taken)));
    }
    if room.slots == 0 {
        all.push(Reason::new(HAS, "as many pods as a node may", ""));
    }
    all
}

fn gpu(shape: &Shape, spec: &JobSpec) -> String {
    let amount = match (shape.gpus, shape.gpu_milli) {
        (1, 1000) => "1 GPU".to_owned(),
        (n, 1000) => format!("{n} GPUs"),
        (_, milli) => format!("{milli}m of a GPU"),
    };
    let wants = spec.pod.resources().gpu;
    let models: Vec<String> = wants.map(|gpu| gpu.model.into_iter().collect()).unwrap_or_default();
    let model = if models.is_empty() { String::new() } else { format!(" of model {}", models.join(" or ")) };
    let memory = if shape.gpu_memory_bytes == 0 {
        String::new()
    } else {
        format!(" with {}", Bytes(shape.gpu_memory_bytes))
    };
    format!("{amount}{model}{memory}")
}

fn devices(room: &Room, shape: &Shape, fitting: usize, taken: usize) -> String {
    let has = room.devices.len();
    if has == 0 {
        return "it has none".to_owned();
    }
    let other = room.devices.iter().filter(|d| shape.models.as_ref().is_some_and(|m| !m.contains(&d.model)));
    let (other, broken) = (other.count(), room.devices.iter().filter(|d| !d.usable).count());
    let mut text = format!("{fitting} of its {has} will do");
    for (count, what) in [
        (other, "of another model"),
        (broken, "unhealthy or split"),
        (taken, "in part held by other programs"),
    ] {
        if count > 0 {
            text.push_str(&format!(", {count} {what}"));
        }
    }
    text
}

/// `0 of 3 nodes fit: 2 need 4 cores, 1 lacks label zone`; each node counted under its first reason.
pub fn summary<'a>(nodes: usize, first: impl IntoIterator<Item = &'a Reason>) -> String {
    if nodes == 0 {
        return "there are no nodes yet: start an agent".to_owned();
    }
    let mut counts: BTreeMap<(&str, &str, &str), usize> = BTreeMap::new();
    for reason in first {
        *counts.entry((reason.verb.0, reason.verb.1, &reason.object)).or_default() += 1;
    }
    let against: usize = counts.values().sum();
    let mut parts: Vec<(usize, String)> = counts
        .into_iter()
        .map(|((one, many, object), n)| (n, format!("{n} {} {object}", if n == 1 { one } else { many })))
        .collect();
    parts.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let text: Vec<String> = parts.into_iter().map(|(_, text)| text).collect();
    let noun = if nodes == 1 { "node fits" } else { "nodes fit" };
    format!("{} of {nodes} {noun}: {}", nodes - against, text.join(", "))
}
