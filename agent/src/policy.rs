//! The policy file of a node: read once at the agent's start, parsed whole or not at all. What it means is decided in
//! `berth_protocol::policy`; here is where it comes from, and who may have written it.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use berth_protocol::job::Network;
use berth_protocol::limits::POLICY_BYTES_MAX;
use berth_protocol::policy::{
    Gpus, HostPath, ImagePattern, Largest, Policy, Refusal, Rule, Wants, plain_capability,
};
use berth_protocol::units::{Bytes, MilliCpu};
use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer};

use crate::io::image::{BadKey, CosignKey, Signer};

pub const FILE: &str = "/etc/berth/policy.toml";
const FILE_BYTES_MAX: u64 = 64 << 10;
const OTHERS_MAY_WRITE: u32 = 0o022;

/// All that a node grants, and to whom images must be traced back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePolicy {
    pub granted: Granted,
    pub signers: Vec<Signer>,
}

/// What orders are held against.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Granted {
    pub rules: Policy,
    pub source: Source,
}

/// Where a policy was said, and may be changed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Source {
    /// By the flags `--allow-…`, or nowhere.
    #[default]
    Flags,
    File(PathBuf),
}

#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error("cannot read {path}")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{path} is no file, or larger than 64 KiB")]
    NoFile { path: PathBuf },
    #[error(
        "{path} belongs to user {uid}, and whoever may write it decides what this node's pods may do: chown root {path}"
    )]
    Foreign { path: PathBuf, uid: u32 },
    #[error("{path} may be written by others than root (mode {mode:04o}): chmod go-w {path}")]
    Writable { path: PathBuf, mode: u32 },
    #[error("{path} is not valid")]
    Malformed { path: PathBuf, source: Box<toml::de::Error> },
    #[error(
        "{flag} stands beside {path}, and a policy file is the whole policy: take the flag away, and write `{key}` there"
    )]
    Beside { path: PathBuf, flag: &'static str, key: &'static str },
    #[error("{path}: {why}")]
    Wrong { path: PathBuf, why: &'static str },
    #[error(
        "{path}: the policy takes {bytes} bytes in a message, and at most {POLICY_BYTES_MAX} are told: name fewer, broader things"
    )]
    TooLarge { path: PathBuf, bytes: usize },
    #[error("{path} is no key that signatures are verified with")]
    Key { path: PathBuf, source: BadKey },
}

impl Granted {
    /// Why nothing of it is begun, for people; names the rule, and where it can be changed.
    pub fn refuses(&self, wants: &Wants) -> Option<String> {
        self.rules.refusals(wants).first().map(|refusal| self.words(refusal))
    }

    pub fn words(&self, refusal: &Refusal) -> String {
        let what = &refusal.what;
        let hint = match (&self.source, refusal.rule) {
            (Source::File(path), rule) => format!("see `{}` in {}", rule.key(), path.display()),
            (Source::Flags, Rule::HostImage) => "its agent would with --allow-host-image".to_owned(),
            (Source::Flags, Rule::HostPaths) => "its agent would with --allow-host-path".to_owned(),
            (Source::Flags, Rule::Networks) if what.ends_with("host") || what.contains("host`") => {
                "its agent would with --allow-host-network".to_owned()
            }
            (Source::Flags, Rule::ImagePaths) => "its agent would with --allow-image-path".to_owned(),
            (Source::Flags, Rule::Capabilities) => {
                let name = what.rsplit(' ').next().unwrap_or_default();
                format!("its agent would with --allow-capability {name}")
            }
            (Source::Flags, rule) => format!("see `{}`", rule.key()),
        };
        format!("this node's policy allows no {what}: {hint}")
    }
}

impl fmt::Display for Granted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::File(path) => write!(f, "{}: {}", path.display(), self.rules),
            Source::Flags => write!(f, "by flags and defaults: {}", self.rules),
        }
    }
}

/// The file, as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct Written {
    registries: Option<Vec<ImagePattern>>,
    host_image: bool,
    host_paths: Vec<PathWritten>,
    image_paths: Vec<Absolute>,
    networks: Option<BTreeSet<Network>>,
    capabilities: Vec<String>,
    gpus: Option<GpusWritten>,
    largest: LargestWritten,
    signers: Vec<SignerWritten>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a path, or {path = \"/…\", read-only = true}")]
enum PathWritten {
    Plain(Absolute),
    Told(PathTold),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct PathTold {
    path: Absolute,
    #[serde(default)]
    read_only: bool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected true, false, or a list of GPUs' names")]
enum GpusWritten {
    Switch(bool),
    These(BTreeSet<String>),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LargestWritten {
    cpu: Option<Amount<MilliCpu>>,
    memory: Option<Amount<Bytes>>,
    gpus: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct SignerWritten {
    images: Vec<ImagePattern>,
    cosign_key: Absolute,
}

/// A path from the root, without parts that lead up again.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct Absolute(String);

impl TryFrom<String> for Absolute {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        let plain = Path::new(&text).is_absolute() && !text.split('/').any(|part| part == "..");
        if plain { Ok(Self(text)) } else { Err("a path begins with / and has no `..`") }
    }
}

/// As in a job file: `2`, `0.5`, `"500m"`, `"4Gi"`.
#[derive(Debug)]
struct Amount<T>(T);

trait FromText: Sized {
    fn from_text(text: &str) -> Result<Self, berth_protocol::units::UnitError>;
}

impl FromText for MilliCpu {
    fn from_text(text: &str) -> Result<Self, berth_protocol::units::UnitError> {
        Self::parse(text)
    }
}

impl FromText for Bytes {
    fn from_text(text: &str) -> Result<Self, berth_protocol::units::UnitError> {
        Self::parse(text)
    }
}

impl<'de, T: FromText> Deserialize<'de> for Amount<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = String;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an amount, such as 2, 0.5 or \"4Gi\"")
            }

            fn visit_str<E>(self, text: &str) -> Result<String, E> {
                Ok(text.to_owned())
            }

            fn visit_i64<E>(self, number: i64) -> Result<String, E> {
                Ok(number.to_string())
            }

            fn visit_f64<E>(self, number: f64) -> Result<String, E> {
                Ok(number.to_string())
            }
        }
        let text = from.deserialize_any(Text)?;
        T::from_text(&text).map(Amount).map_err(D::Error::custom)
    }
}

/// The short ways to say parts of a policy.
#[derive(Debug, Default)]
pub struct Flags {
    pub host_image: Option<bool>,
    pub host_paths: Option<Vec<PathBuf>>,
    pub image_paths: Option<Vec<PathBuf>>,
    pub capabilities: Option<Vec<String>>,
    pub host_network: Option<bool>,
}

/// Those that reach nothing of the node's own: what is there where nobody has said more.
const NETWORKS: [Network; 2] = [Network::Bridge, Network::None];

/// The policy of the file that is named, or of the usual one where there is one, else of the flags. `dev`: without a file,
/// this machine's own files may be images, and its network be pods'.
///
/// # Errors
/// As [`read`]; or both were said, of which only one can be all.
pub fn choose(
    named: Option<PathBuf>,
    usual: &Path,
    flags: Flags,
    dev: bool,
) -> Result<NodePolicy, PolicyError> {
    let file = named.or_else(|| usual.exists().then(|| usual.to_owned()));
    let Some(path) = file else { return of_flags(flags, dev) };
    let Flags { host_image, host_paths, image_paths, capabilities, host_network } = &flags;
    for (flag, said, rule) in [
        ("allow-host-image", host_image.is_some(), Rule::HostImage),
        ("allow-host-path", host_paths.is_some(), Rule::HostPaths),
        ("allow-image-path", image_paths.is_some(), Rule::ImagePaths),
        ("allow-capability", capabilities.is_some(), Rule::Capabilities),
        ("allow-host-network", host_network.is_some(), Rule::Networks),
    ] {
        if said {
            return Err(PolicyError::Beside { path, flag, key: rule.key() });
        }
    }
    read(&path)
}

fn of_flags(flags: Flags, dev: bool) -> Result<NodePolicy, PolicyError> {
    let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path).display().to_string();
    let Flags { host_image, host_paths, image_paths, capabilities, host_network } = flags;
    let host_network = host_network.unwrap_or(dev).then_some(Network::Host);
    let host_paths = host_paths.unwrap_or_default().into_iter().map(absolute);
    let image_paths = image_paths.or((!dev).then(Vec::new));
    let rules = Policy {
        host_image: host_image.unwrap_or(dev),
        host_paths: host_paths.map(|path| HostPath { path, read_only: false }).collect(),
        image_paths: image_paths.map(|paths| paths.into_iter().map(absolute).collect()),
        networks: NETWORKS.into_iter().chain(host_network).collect(),
        capabilities: capabilities.iter().flatten().map(|name| plain_capability(name).to_owned()).collect(),
        ..Policy::default()
    };
    match rules.too_large() {
        Some(bytes) => Err(PolicyError::TooLarge { path: "--allow-…".into(), bytes }),
        None => Ok(NodePolicy { granted: Granted { rules, source: Source::Flags }, signers: Vec::new() }),
    }
}

/// Reads a policy file that only root can have written, and the keys that it names.
///
/// # Errors
/// Somebody else may write one of them, or it cannot be read, or something in it is not understood: then the agent does not
/// start, since a part of a policy is another policy.
pub fn read(path: &Path) -> Result<NodePolicy, PolicyError> {
    parse(path, &read_owned(path)?, |key| {
        let text = read_owned(key)?;
        CosignKey::from_pem(&text).map_err(|source| PolicyError::Key { path: key.to_owned(), source })
    })
}

/// A policy's text; `path` is what errors and refusals call it.
///
/// # Errors
/// As [`read`].
pub fn parse(
    path: &Path,
    text: &str,
    key: impl Fn(&Path) -> Result<CosignKey, PolicyError>,
) -> Result<NodePolicy, PolicyError> {
    let malformed = |source| PolicyError::Malformed { path: path.to_owned(), source: Box::new(source) };
    let written: Written = toml::from_str(text).map_err(malformed)?;
    let wrong = |why| Err(PolicyError::Wrong { path: path.to_owned(), why });
    let signed: Vec<ImagePattern> = written.signers.iter().flat_map(|signer| signer.images.clone()).collect();
    if written.signers.iter().any(|signer| signer.images.is_empty()) {
        return wrong("a signer needs `images`, those that it signs");
    }
    if written.registries.is_none() && !signed.is_empty() && !signed.contains(&ImagePattern::Any) {
        return wrong(
            "`signers` for some images need `registries`: a registry that is called by another of its names or addresses would \
             be none of those images'",
        );
    }
    let path_of = |written| match written {
        PathWritten::Plain(path) => HostPath { path: path.0, read_only: false },
        PathWritten::Told(PathTold { path, read_only }) => HostPath { path: path.0, read_only },
    };
    let LargestWritten { cpu, memory, gpus } = written.largest;
    let rules = Policy {
        registries: written.registries,
        host_image: written.host_image,
        host_paths: written.host_paths.into_iter().map(path_of).collect(),
        image_paths: Some(written.image_paths.into_iter().map(|path| path.0).collect()),
        networks: written.networks.unwrap_or_else(|| NETWORKS.into()),
        capabilities: written.capabilities.iter().map(|name| plain_capability(name).to_owned()).collect(),
        gpus: match written.gpus {
            None | Some(GpusWritten::Switch(true)) => Gpus::All,
            Some(GpusWritten::Switch(false)) => Gpus::None,
            Some(GpusWritten::These(named)) => Gpus::These(named),
        },
        largest: Largest { cpu: cpu.map(|cpu| cpu.0), memory: memory.map(|memory| memory.0), gpus },
        signed,
    };
    if let Some(bytes) = rules.too_large() {
        return Err(PolicyError::TooLarge { path: path.to_owned(), bytes });
    }
    let signer =
        |SignerWritten { images, cosign_key }| Ok(Signer { images, key: key(Path::new(&cosign_key.0))? });
    let signers = written.signers.into_iter().map(signer).collect::<Result<_, PolicyError>>()?;
    Ok(NodePolicy { granted: Granted { rules, source: Source::File(path.to_owned()) }, signers })
}

/// A file that root alone can have written.
fn read_owned(path: &Path) -> Result<String, PolicyError> {
    let path = path.to_owned();
    let unreadable = |source| PolicyError::Unreadable { path: path.clone(), source };
    let file = File::open(&path).map_err(unreadable)?;
    let meta = file.metadata().map_err(unreadable)?;
    if !meta.is_file() || meta.len() > FILE_BYTES_MAX {
        return Err(PolicyError::NoFile { path });
    }
    if meta.uid() != 0 {
        return Err(PolicyError::Foreign { path, uid: meta.uid() });
    }
    if meta.mode() & OTHERS_MAY_WRITE != 0 {
        return Err(PolicyError::Writable { path, mode: meta.mode() & 0o7777 });
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(unreadable)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, chown};

    use super::*;

    const KEY: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----\n";

    fn of(text: &str) -> Result<NodePolicy, PolicyError> {
        parse(Path::new("/p.toml"), text, |_| Ok(CosignKey::from_pem(KEY).expect("a key")))
    }

    /// An error with what caused it, as it is printed.
    fn wrong(text: &str) -> String {
        format!("{:#}", anyhow::Error::from(of(text).expect_err(text)))
    }

    #[test]
    fn the_sample_is_a_policy() {
        let sample = include_str!("../../systemd/policy.toml");
        let silent = of(sample).expect("all of it is commented out");
        assert_eq!(silent.granted.rules, Policy { networks: NETWORKS.into(), ..Policy::default() });
        let told: String = sample
            .lines()
            .filter_map(|line| {
                line.strip_prefix("# ").filter(|line| line.contains(" = ") || line.starts_with('['))
            })
            .flat_map(|line| [line, "\n"])
            .collect();
        let told = of(&told).expect("each setting is one");
        let rules = told.granted.rules;
        let least = Policy::default();
        assert!(
            rules.registries.is_some()
                && rules.host_image
                && !rules.host_paths.is_empty()
                && rules.gpus != least.gpus
        );
        assert!(
            rules.networks != least.networks
                && !rules.capabilities.is_empty()
                && rules.image_paths != least.image_paths
        );
        assert!(
            rules.largest.cpu.is_some() && rules.largest.memory.is_some() && rules.largest.gpus.is_some()
        );
        assert_eq!(told.signers.len(), 1);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, says) in [
            ("\nnetwork = [\"host\"]", "line 2"),
            ("\nnetwork = [\"host\"]", "`networks`"),
            ("networks = [\"mesh\"]", "expected one of `bridge`, `host`, `none`"),
            ("registries = [\"team/*\"]", "does not begin with a registry's name"),
            ("host-paths = [\"srv\"]", "expected a path"),
            ("image-paths = [\"/srv/../etc\"]", "no `..`"),
            ("gpus = \"some\"", "expected true, false, or a list"),
            ("[largest]\ncpu = \"much\"", "not a number of cores"),
            ("[largest]\nmemory = true", "an amount"),
            ("privileged = true", "unknown field `privileged`"),
            ("[[signers]]\nimages = []\ncosign-key = \"/k\"", "a signer needs `images`"),
            ("[[signers]]\nimages = [\"docker.io\"]\ncosign-key = \"/k\"", "need `registries`"),
            ("[[signers]]\nimages = [\"*\"]\ncosign-key = \"k\"", "begins with /"),
        ] {
            assert!(wrong(text).contains(says), "{text}: {}", wrong(text));
        }
        let many: Vec<String> = (0..400).map(|n| format!("\"/srv/{n:08}\"")).collect();
        assert!(wrong(&format!("image-paths = [{}]", many.join(","))).contains("bytes in a message"));
        assert!(of("[[signers]]\nimages = [\"*\"]\ncosign-key = \"/k\"").is_ok());
        let amounts = of("[largest]\ncpu = 0.5\nmemory = \"1Gi\"").expect("amounts").granted.rules.largest;
        assert_eq!((amounts.cpu, amounts.memory), (Some(MilliCpu(500)), Some(Bytes(1 << 30))));
    }

    #[test]
    fn a_file_is_the_whole_policy_and_flags_are_one_without() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.toml");
        let flags = || Flags { capabilities: Some(vec!["CAP_NET_ADMIN".into()]), ..Flags::default() };
        let plain = choose(None, &path, flags(), false).unwrap().granted;
        assert_eq!(
            plain.rules,
            Policy {
                capabilities: ["NET_ADMIN".to_owned()].into(),
                networks: NETWORKS.into(),
                ..Policy::default()
            }
        );
        let host = Flags { host_network: Some(true), ..Flags::default() };
        let host = choose(None, &path, host, false).unwrap().granted.rules;
        assert!(host.networks.contains(&Network::Host) && !host.host_image);
        let dev = choose(None, &path, Flags::default(), true).unwrap().granted.rules;
        assert!(dev.host_image && dev.image_paths.is_none() && dev.networks.contains(&Network::Host));
        assert!(matches!(choose(Some(path.clone()), &path, flags(), true), Err(PolicyError::Beside { .. })));
        assert!(matches!(
            choose(Some(path.clone()), &path, Flags::default(), true),
            Err(PolicyError::Unreadable { .. })
        ));
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let both = choose(None, &path, flags(), true).unwrap_err();
        assert!(both.to_string().contains("`capabilities`"), "{both}");
        // What --dev allows by itself it does not beside a file.
        let of_file = choose(None, &path, Flags::default(), true).unwrap().granted;
        let rules = Policy { networks: NETWORKS.into(), ..Policy::default() };
        assert_eq!(of_file, Granted { rules, source: Source::File(path) });
    }

    #[test]
    fn a_file_that_others_may_write_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let (path, key) = (dir.path().join("policy.toml"), dir.path().join("key.pub"));
        fs::write(&key, KEY).unwrap();
        fs::write(&path, format!("[[signers]]\nimages = [\"*\"]\ncosign-key = \"{}\"\n", key.display()))
            .unwrap();
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        mode(&path, 0o644);
        mode(&key, 0o644);
        assert!(read(&path).is_ok());
        for file in [&path, &key] {
            for writable in [0o664, 0o646] {
                mode(file, writable);
                assert!(matches!(read(&path), Err(PolicyError::Writable { .. })), "{writable:o}");
            }
            mode(file, 0o644);
            chown(file, Some(12345), None).unwrap();
            assert!(matches!(read(&path), Err(PolicyError::Foreign { uid: 12345, .. })));
            chown(file, Some(0), None).unwrap();
        }
        assert!(read(&path).is_ok());
        fs::write(&key, "no key").unwrap();
        assert!(matches!(read(&path), Err(PolicyError::Key { .. })));
        assert!(matches!(read(dir.path()), Err(PolicyError::NoFile { .. })));
    }
}
