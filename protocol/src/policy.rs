//! What a node lets pods have, whoever orders it. Decides, and touches nothing: the agent asks before it begins anything, the
//! scheduler before it chooses the node, and both get the same answer. Where a policy comes from is the agent's business.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Component, Path};

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::image::{ImageRef, RegistryName, is_host};
use crate::job::{Network, PodTemplate, VolumeSource};
use crate::limits::POLICY_BYTES_MAX;
use crate::resources::GpuShare;
use crate::units::{Bytes, MilliCpu};

const SHOWN_CHARS_MAX: usize = 200;

/// All that a node grants. Pods are never privileged, so nothing here could allow that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Policy {
    /// Whose images may run; `None`: any registry's.
    pub registries: Option<Vec<ImagePattern>>,
    /// Pods may run on a view of the node's own files.
    pub host_image: bool,
    /// Directories and files of the node that pods may mount.
    pub host_paths: Vec<HostPath>,
    /// Directories whose files may be images; `None`: all.
    pub image_paths: Option<Vec<String>>,
    pub networks: BTreeSet<Network>,
    /// Beyond the default set, without `CAP_`.
    pub capabilities: BTreeSet<String>,
    pub gpus: Gpus,
    /// Of one pod, its bursts included.
    pub largest: Largest,
    /// Images that need a signature.
    pub signed: Vec<ImagePattern>,
}

/// A directory, or a file, of the node's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostPath {
    /// Absolute.
    pub path: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
}

/// Which devices pods may have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Gpus {
    #[default]
    All,
    None,
    /// By the names under which the node tells of them.
    These(BTreeSet<String>),
}

impl Gpus {
    pub fn allows(&self, uuid: &str) -> bool {
        match self {
            Gpus::All => true,
            Gpus::None => false,
            Gpus::These(named) => named.contains(uuid),
        }
    }
}

/// The most that one pod may ask for; `None`: whatever the node has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Largest {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<MilliCpu>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpus: Option<u32>,
}

/// Images by where they come from: `*`, `registry.lab:5000`, `registry.lab:5000/team/*`, `docker.io/library/python`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ImagePattern {
    Any,
    /// All of a registry.
    Registry(String),
    /// Repositories of a registry that begin so; it ends with `/`.
    Below(String, String),
    Repository(String, String),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{pattern}` names no images: {why}; write `docker.io`, `registry.lab:5000/team/*`, `docker.io/library/python` or `*`"
)]
pub struct BadPattern {
    pattern: String,
    why: &'static str,
}

impl ImagePattern {
    /// # Errors
    /// It is none of the four forms. A name without a registry is refused, not completed: who reads a policy should not have
    /// to know docker's defaults.
    pub fn parse(text: &str) -> Result<Self, BadPattern> {
        let bad = |why| BadPattern { pattern: text.chars().take(100).collect(), why };
        if text == "*" {
            return Ok(Self::Any);
        }
        let (host, repository) = text.split_once('/').map_or((text, None), |(host, rest)| (host, Some(rest)));
        if !(host.contains(['.', ':']) || host == "localhost") || !is_host(host) {
            return Err(bad("it does not begin with a registry's name"));
        }
        let host = match host.to_ascii_lowercase() {
            host if host == "index.docker.io" => "docker.io".to_owned(),
            host => host,
        };
        let Some(repository) = repository else { return Ok(Self::Registry(host)) };
        if repository == "*" {
            return Ok(Self::Registry(host));
        }
        let plain = repository.strip_suffix("/*").unwrap_or(repository);
        if plain.contains('*') {
            return Err(bad("`*` stands alone, or behind the last slash"));
        }
        if plain.contains([':', '@']) {
            return Err(bad("tags and digests are not told apart"));
        }
        if ImageRef::parse(&format!("{host}/{plain}")).is_err() {
            return Err(bad("it is no repository's name"));
        }
        Ok(match plain.len() == repository.len() {
            true => Self::Repository(host, plain.to_owned()),
            false => Self::Below(host, format!("{plain}/")),
        })
    }

    /// Images that are files of the node have no registry: `*` alone means them too.
    pub fn matches(&self, image: &ImageRef) -> bool {
        let ImageRef::Registry(name) = image else { return *self == Self::Any };
        // Names of hosts have no case: whoever spells one otherwise reaches the same registry.
        let same = |host: &String| name.registry.eq_ignore_ascii_case(host);
        match self {
            Self::Any => true,
            Self::Registry(host) => same(host),
            Self::Below(host, prefix) => same(host) && name.repository.starts_with(prefix),
            Self::Repository(host, repository) => same(host) && name.repository == *repository,
        }
    }
}

impl fmt::Display for ImagePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Registry(host) => f.write_str(host),
            Self::Below(host, prefix) => write!(f, "{host}/{prefix}*"),
            Self::Repository(host, repository) => write!(f, "{host}/{repository}"),
        }
    }
}

impl TryFrom<String> for ImagePattern {
    type Error = BadPattern;

    fn try_from(text: String) -> Result<Self, BadPattern> {
        Self::parse(&text)
    }
}

impl From<ImagePattern> for String {
    fn from(pattern: ImagePattern) -> String {
        pattern.to_string()
    }
}

/// What a pod wants of whatever a policy is about. Pods that want the same get the same answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wants {
    pub host_image: bool,
    /// Without tags and digests.
    pub images: BTreeSet<ImageRef>,
    pub host_paths: BTreeSet<HostPath>,
    pub network: Network,
    pub capabilities: BTreeSet<String>,
    pub cpu: MilliCpu,
    pub memory: Bytes,
    pub gpus: u32,
    /// Those that orders hand out.
    pub devices: BTreeSet<String>,
}

impl Wants {
    /// Of any template, also one that no parser of job files has made: what does not add up is more than anything.
    pub fn of(template: &PodTemplate) -> Self {
        let mut wants = Self { network: template.network, ..Self::default() };
        for container in &template.containers {
            wants.host_image |= container.image == "host";
            wants.images.extend(repository(&container.image));
            let names = container.capabilities.iter();
            wants.capabilities.extend(names.map(|name| plain_capability(name).to_owned()));
            // No limit is none.
            let most = |asked: u64, limit: u64| if limit == 0 { u64::MAX } else { asked.max(limit) };
            let (asked, limits) = (&container.resources, &container.limits);
            wants.cpu = wants.cpu.saturating_add(MilliCpu(most(asked.cpu.0, limits.cpu.0)));
            wants.memory = wants.memory.saturating_add(Bytes(most(asked.memory.0, limits.memory.0)));
            wants.gpus = wants.gpus.saturating_add(asked.gpu.as_ref().map_or(0, |gpu| gpu.count.max(1)));
        }
        for volume in &template.volumes {
            if let VolumeSource::Host(path) = &volume.source {
                wants.host_paths.insert(HostPath { path: path.clone(), read_only: volume.read_only });
            }
        }
        wants
    }

    /// And the devices that orders hand out with it, which need not be those that it asks for.
    #[must_use]
    pub fn with(mut self, devices: &[GpuShare]) -> Self {
        self.devices.extend(devices.iter().map(|share| share.uuid.clone()));
        self.gpus = self.gpus.max(u32::try_from(self.devices.len()).unwrap_or(u32::MAX));
        self
    }

    /// Without what is different for nearly every job, for policies that do not ask for it: see [`Policy::is_fine`].
    #[must_use]
    pub fn coarse(mut self) -> Self {
        self.images.retain(|image| !matches!(image, ImageRef::Registry(_)));
        Self { cpu: MilliCpu::ZERO, memory: Bytes::ZERO, ..self }
    }
}

/// None where that names no image: nothing is ever brought by such a name.
fn repository(image: &str) -> Option<ImageRef> {
    if image == "host" {
        return None;
    }
    Some(match ImageRef::parse(image).ok()? {
        ImageRef::Registry(name) => ImageRef::Registry(RegistryName { tag: None, digest: None, ..name }),
        ImageRef::Layout { path, .. } => ImageRef::Layout { path, tag: None },
        archive @ ImageRef::Archive { .. } => archive,
    })
}

/// Without the prefix that some write.
pub fn plain_capability(name: &str) -> &str {
    name.strip_prefix("CAP_").unwrap_or(name)
}

/// By which part of a policy something is refused, as its file calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    Registries,
    HostImage,
    HostPaths,
    ImagePaths,
    Networks,
    Capabilities,
    Gpus,
    Largest,
    Signers,
}

impl Rule {
    pub fn key(self) -> &'static str {
        match self {
            Rule::Registries => "registries",
            Rule::HostImage => "host-image",
            Rule::HostPaths => "host-paths",
            Rule::ImagePaths => "image-paths",
            Rule::Networks => "networks",
            Rule::Capabilities => "capabilities",
            Rule::Gpus => "gpus",
            Rule::Largest => "largest",
            Rule::Signers => "signers",
        }
    }
}

/// Something that a policy does not allow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub rule: Rule,
    /// To be read behind `allows no`, such as `capability NET_ADMIN`.
    pub what: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no {} (`{}`)", self.what, self.rule.key())
    }
}

impl Default for Policy {
    /// Of an agent that nothing was said to.
    fn default() -> Self {
        Self {
            registries: None,
            host_image: false,
            host_paths: Vec::new(),
            image_paths: Some(Vec::new()),
            networks: [Network::Bridge, Network::Host, Network::None].into(),
            capabilities: BTreeSet::new(),
            gpus: Gpus::All,
            largest: Largest::default(),
            signed: Vec::new(),
        }
    }
}

impl Policy {
    /// The first reason not to run a pod of this template.
    pub fn refuses(&self, template: &PodTemplate) -> Option<Refusal> {
        self.refusals(&Wants::of(template)).into_iter().next()
    }

    /// All reasons.
    pub fn refusals(&self, wants: &Wants) -> Vec<Refusal> {
        let mut all = Vec::new();
        // Whoever orders has written some of it.
        let mut refuse = |rule, what: String| all.push(Refusal { rule, what: shown(&what) });
        if wants.host_image && !self.host_image {
            refuse(Rule::HostImage, "`image: host`".to_owned());
        }
        for image in &wants.images {
            if let Some((rule, what)) = self.against(image) {
                refuse(rule, what);
            }
        }
        for HostPath { path, read_only } in &wants.host_paths {
            match self.host_path(Path::new(path)) {
                None => refuse(Rule::HostPaths, format!("host path {path}")),
                Some(found) if found.read_only && !read_only => {
                    refuse(Rule::HostPaths, format!("host path {path} unless it is `readOnly`"));
                }
                Some(_) => {}
            }
        }
        if !self.networks.contains(&wants.network) {
            refuse(Rule::Networks, format!("`network: {}`", word(wants.network)));
        }
        for name in wants.capabilities.difference(&self.capabilities) {
            refuse(Rule::Capabilities, format!("capability {name}"));
        }
        if self.gpus == Gpus::None && wants.gpus > 0 {
            refuse(Rule::Gpus, "GPUs".to_owned());
        } else if let Some(uuid) = wants.devices.iter().find(|uuid| !self.gpus.allows(uuid)) {
            refuse(Rule::Gpus, format!("GPU {uuid}"));
        }
        let Largest { cpu, memory, gpus } = self.largest;
        if let Some(most) = cpu.filter(|most| wants.cpu > *most) {
            refuse(Rule::Largest, format!("pods with more cores than {most}"));
        }
        if let Some(most) = memory.filter(|most| wants.memory > *most) {
            refuse(Rule::Largest, format!("pods with more memory than {most}"));
        }
        if let Some(most) = gpus.filter(|most| wants.gpus > *most) {
            refuse(Rule::Largest, format!("pods with more GPUs than {most}"));
        }
        all
    }

    fn against(&self, image: &ImageRef) -> Option<(Rule, String)> {
        let named = |patterns: &[ImagePattern]| patterns.iter().any(|pattern| pattern.matches(image));
        if let ImageRef::Registry(_) = image {
            let allowed = self.registries.as_deref().is_none_or(named);
            return (!allowed).then(|| (Rule::Registries, format!("image of {image}")));
        }
        let (ImageRef::Layout { path, .. } | ImageRef::Archive { path }) = image else { return None };
        if !self.image_path(path) {
            return Some((Rule::ImagePaths, format!("image from {}", path.display())));
        }
        // A file has nobody's signature beside it.
        named(&self.signed).then(|| (Rule::Signers, format!("unsigned image {image}")))
    }

    /// The innermost of the directories that pods may mount which the path lies in.
    pub fn host_path(&self, path: &Path) -> Option<&HostPath> {
        let depth = |found: &&HostPath| Path::new(&found.path).components().count();
        let around = self.host_paths.iter().filter(|found| is_below(path, Path::new(&found.path)));
        around.max_by_key(depth)
    }

    /// May that file be an image?
    pub fn image_path(&self, path: &Path) -> bool {
        self.image_paths.as_ref().is_none_or(|dirs| dirs.iter().any(|dir| is_below(path, Path::new(dir))))
    }

    /// It looks at repositories or at amounts, of which nearly every job has its own.
    pub fn is_fine(&self) -> bool {
        let Largest { cpu, memory, gpus: _ } = self.largest;
        self.registries.is_some() || cpu.is_some() || memory.is_some()
    }

    /// What it takes in a message, where that is more than it may.
    pub fn too_large(&self) -> Option<usize> {
        let bytes = serde_json::to_string(self).map_or(usize::MAX, |json| json.len());
        (bytes > POLICY_BYTES_MAX).then_some(bytes)
    }
}

/// As much of it as fits a message.
fn shown(text: &str) -> String {
    text.chars().take(SHOWN_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// As it is written, and with nothing in it that leads up again.
fn is_below(path: &Path, dir: &Path) -> bool {
    let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    path.is_absolute() && dir.is_absolute() && path.components().all(plain) && path.starts_with(dir)
}

/// As a job file has it.
fn word(network: Network) -> &'static str {
    match network {
        Network::Bridge => "bridge",
        Network::Host => "host",
        Network::None => "none",
    }
}

/// In a message from another version: what this one does not understand, or what is beyond its bounds, is as if nothing had
/// been said. The node refuses for itself.
pub(crate) fn understood<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Box<Policy>>, D::Error> {
    let policy: Option<Box<Policy>> = serde_json::from_value(Value::deserialize(from)?).unwrap_or(None);
    Ok(policy.filter(|policy| policy.too_large().is_none()))
}

impl fmt::Display for Policy {
    /// In one line, for people: what is granted beyond the least, and what is kept back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn list<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
            items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
        }
        let mut parts = Vec::new();
        match self.registries.as_deref() {
            None => parts.push("any registry".to_owned()),
            Some([]) => parts.push("no registry".to_owned()),
            Some(known) => parts.push(format!("registries {}", list(known))),
        }
        if !self.signed.is_empty() {
            parts.push(format!("signed {}", list(&self.signed)));
        }
        match self.image_paths.as_deref() {
            None => parts.push("images from any path".to_owned()),
            Some([]) => {}
            Some(dirs) => parts.push(format!("images from {}", list(dirs))),
        }
        if self.host_image {
            parts.push("image host".to_owned());
        }
        if !self.host_paths.is_empty() {
            let path = |found: &HostPath| match found.read_only {
                true => format!("{} (read-only)", found.path),
                false => found.path.clone(),
            };
            parts.push(format!("host paths {}", list(self.host_paths.iter().map(path))));
        }
        parts.push(match self.networks.is_empty() {
            true => "no network".to_owned(),
            false => format!("networks {}", list(self.networks.iter().map(|network| word(*network)))),
        });
        if !self.capabilities.is_empty() {
            parts.push(format!("capabilities {}", list(&self.capabilities)));
        }
        match &self.gpus {
            Gpus::All => {}
            Gpus::None => parts.push("no GPUs".to_owned()),
            Gpus::These(named) => parts.push(format!("GPUs {}", list(named))),
        }
        let Largest { cpu, memory, gpus } = self.largest;
        let most = [
            cpu.map(|cpu| format!("cpu {cpu}")),
            memory.map(|memory| format!("memory {memory}")),
            gpus.map(|gpus| format!("gpus {gpus}")),
        ];
        let most: Vec<String> = most.into_iter().flatten().collect();
        if !most.is_empty() {
            parts.push(format!("largest {}", list(most)));
        }
        f.write_str(&parts.join("; "))
    }
}

#[cfg(test)]
mod tests;
