//! Owns what an image may be called, and the list of those that a node says it holds; parses names, touches nothing.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::Digest;
use crate::limits::{IMAGES_PER_NODE_BYTES_MAX, IMAGES_PER_NODE_MAX};

const REFERENCE_BYTES_MAX: usize = 1024;
const REFERENCE_SHOWN_CHARS_MAX: usize = 300;
/// Of registry host and repository together (distribution's `NameTotalLengthMax`).
const NAME_BYTES_MAX: usize = 255;
const TAG_BYTES_MAX: usize = 128;
const DEFAULT_REGISTRY: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";

/// Where an image comes from. `host`, the job file's word for the node's own file system, is not an image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ImageRef {
    /// `[registry[:port]/]repository[:tag][@digest]`, with docker's defaults.
    Registry(RegistryName),
    /// `oci:/path[:tag]`: a directory of the OCI image layout.
    Layout { path: PathBuf, tag: Option<String> },
    /// `docker-archive:/file.tar`: what `docker save` writes.
    Archive { path: PathBuf },
}

/// An image's full name in a registry.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RegistryName {
    /// Host and port: `docker.io`, `localhost:5000`, `[::1]:5000`.
    pub registry: String,
    pub repository: String,
    /// Always there unless a digest is.
    pub tag: Option<String>,
    pub digest: Option<Digest>,
}

/// Why a text is no reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{reference}` is not an image reference: {why}")]
pub struct ImageRefError {
    /// As much of it as fits a message.
    pub reference: String,
    pub why: &'static str,
}

impl ImageRef {
    /// Reads a reference as a person writes it.
    pub fn parse(text: &str) -> Result<ImageRef, ImageRefError> {
        let clean = |c: char| if c.is_control() { ' ' } else { c };
        parse(text).map_err(|why| ImageRefError {
            reference: text.chars().take(REFERENCE_SHOWN_CHARS_MAX).map(clean).collect(),
            why,
        })
    }

    /// What this reference and every other spelling of it are compared by.
    pub fn name(&self) -> ImageName {
        ImageName(self.to_string().into())
    }

    /// Whether the name is expected to mean something else tomorrow: `latest`, given or implied.
    pub fn floats(&self) -> bool {
        matches!(self, ImageRef::Registry(name) if name.digest.is_none() && name.tag.as_deref() == Some(DEFAULT_TAG))
    }
}

fn parse(text: &str) -> Result<ImageRef, &'static str> {
    if text.len() > REFERENCE_BYTES_MAX {
        return Err("it is longer than 1024 bytes");
    }
    if let Some(rest) = text.strip_prefix("oci:") {
        // The last colon begins a tag unless a slash follows: a directory's name may have colons, its end is clear.
        return match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => {
                let tag = is_tag(tag).then(|| tag.to_owned()).ok_or("the tag has forbidden characters")?;
                Ok(ImageRef::Layout { path: absolute(path)?, tag: Some(tag) })
            }
            _ => Ok(ImageRef::Layout { path: absolute(rest)?, tag: None }),
        };
    }
    if let Some(rest) = text.strip_prefix("docker-archive:") {
        return Ok(ImageRef::Archive { path: absolute(rest)? });
    }
    registry_name(text).map(ImageRef::Registry)
}

fn absolute(path: &str) -> Result<PathBuf, &'static str> {
    if path.bytes().any(|byte| byte.is_ascii_control()) {
        return Err("the path has control characters");
    }
    let path = Path::new(path);
    if path.is_absolute() { Ok(path.to_owned()) } else { Err("the path must be absolute") }
}

fn registry_name(text: &str) -> Result<RegistryName, &'static str> {
    let (text, digest) = match text.split_once('@') {
        Some((name, digest)) => (
            name,
            Some(Digest::parse(digest).map_err(|_| "the digest must be sha256:<64 hexadecimal digits>")?),
        ),
        None => (text, None),
    };
    let (name, tag) = match text.rsplit_once(':') {
        // A colon before a slash belongs to the registry's port.
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (text, None),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err(
            "the tag must be at most 128 letters, digits, '_', '.' or '-', and begin with none of the last two",
        );
    }
    let (registry, repository) = match name.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest.to_owned()),
        Some(_) => (DEFAULT_REGISTRY, name.to_owned()),
        None => (DEFAULT_REGISTRY, format!("library/{name}")),
    };
    let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
    if name.is_empty() {
        return Err("the name is empty");
    }
    if !is_host(registry) {
        return Err("the registry must be a host name or address, with a port if any");
    }
    if registry.len() + 1 + repository.len() > NAME_BYTES_MAX {
        return Err("the name is longer than 255 bytes");
    }
    if !repository.split('/').all(is_component) {
        return Err(
            "the repository must be lowercase letters and digits, joined by '.', '_', '__', '-' or '/'",
        );
    }
    let tag = match (tag, &digest) {
        (None, None) => Some(DEFAULT_TAG.to_owned()),
        (tag, _) => tag.map(str::to_owned),
    };
    Ok(RegistryName { registry: registry.to_owned(), repository, tag, digest })
}

fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= TAG_BYTES_MAX
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|byte| word(byte) || byte == b'.' || byte == b'-')
}

/// One part of a repository between slashes: runs of `[a-z0-9]`, joined by `.`, `_`, `__` or any number of `-`.
fn is_component(component: &str) -> bool {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let mut rest = component;
    loop {
        let run = rest.trim_start_matches(alphanumeric);
        if run.len() == rest.len() {
            return false;
        }
        if run.is_empty() {
            return true;
        }
        let after = run.trim_start_matches(|c: char| !alphanumeric(c));
        let separator = &run[..run.len() - after.len()];
        if !(matches!(separator, "." | "_" | "__") || separator.bytes().all(|byte| byte == b'-')) {
            return false;
        }
        rest = after;
    }
}

/// `name.example`, `10.0.0.1`, `[::1]`, each with a port or without. Nothing in it may end the host part of a URL.
pub fn is_host(host: &str) -> bool {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        _ => (host, None),
    };
    if port
        .is_some_and(|port| port.parse::<u16>().is_err() || !port.bytes().all(|byte| byte.is_ascii_digit()))
    {
        return false;
    }
    if let Some(address) = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
        return address.parse::<std::net::Ipv6Addr>().is_ok();
    }
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// Whether `host` (with a port or without) is this machine.
pub fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || address.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageRef::Registry(name) => name.fmt(f),
            ImageRef::Layout { path, tag: Some(tag) } => write!(f, "oci:{}:{tag}", path.display()),
            ImageRef::Layout { path, tag: None } => write!(f, "oci:{}", path.display()),
            ImageRef::Archive { path } => write!(f, "docker-archive:{}", path.display()),
        }
    }
}

impl fmt::Display for RegistryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for ImageRef {
    type Err = ImageRefError;

    fn from_str(text: &str) -> Result<ImageRef, ImageRefError> {
        ImageRef::parse(text)
    }
}

impl TryFrom<String> for ImageRef {
    type Error = ImageRefError;

    fn try_from(text: String) -> Result<ImageRef, ImageRefError> {
        ImageRef::parse(&text)
    }
}

impl From<ImageRef> for String {
    fn from(reference: ImageRef) -> String {
        reference.to_string()
    }
}

/// An image in the one spelling that all its references share: `docker.io/library/python:latest` for `python`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageName(Box<str>);

impl ImageName {
    pub fn parse(text: &str) -> Result<ImageName, ImageRefError> {
        Ok(ImageRef::parse(text)?.name())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for ImageName {
    type Error = ImageRefError;

    fn try_from(text: String) -> Result<ImageName, ImageRefError> {
        ImageName::parse(&text)
    }
}

impl From<ImageName> for String {
    fn from(name: ImageName) -> String {
        name.0.into()
    }
}

/// Images that a node holds, ready to run: each once, the most recently used first, and no more of them than
/// `IMAGES_PER_NODE_MAX` and `IMAGES_PER_NODE_BYTES_MAX` allow. A hint: what is not listed may be there all the same.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Images(Vec<ImageName>);

impl Images {
    /// As many of `names`, from the first, as may be listed.
    pub fn cut(names: impl IntoIterator<Item = ImageName>) -> Images {
        let (mut kept, mut bytes) = (Vec::new(), 0);
        for name in names {
            if kept.contains(&name) {
                continue;
            }
            bytes += name.0.len();
            if kept.len() == IMAGES_PER_NODE_MAX || bytes > IMAGES_PER_NODE_BYTES_MAX {
                break;
            }
            kept.push(name);
        }
        Images(kept)
    }

    /// The image is here and has just been used. True: the list did not have it.
    pub fn used(&mut self, name: ImageName) -> bool {
        if let Some(at) = self.0.iter().position(|known| *known == name) {
            self.0[..=at].rotate_right(1);
            return false;
        }
        let before = std::mem::take(&mut self.0);
        *self = Images::cut([name].into_iter().chain(before));
        true
    }

    /// The image is no longer here. True: the list had it.
    pub fn gone(&mut self, name: &ImageName) -> bool {
        let before = self.0.len();
        self.0.retain(|known| known != name);
        self.0.len() < before
    }

    pub fn iter(&self) -> std::slice::Iter<'_, ImageName> {
        self.0.iter()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A name that this version cannot read, or one too many, costs the message nothing: it is left out.
impl<'de> Deserialize<'de> for Images {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        Ok(Images::cut(texts.iter().filter_map(|text| ImageName::parse(text).ok())))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_get_dockers_defaults() {
        let digest = Digest::of(b"");
        for (text, full) in [
            ("python", "docker.io/library/python:latest"),
            ("python:3.12-slim", "docker.io/library/python:3.12-slim"),
            ("index.docker.io/library/python:3", "docker.io/library/python:3"),
            ("grafana/grafana", "docker.io/grafana/grafana:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("localhost:5000/a/b__c:v1", "localhost:5000/a/b__c:v1"),
            ("127.0.0.1:5000/a---b", "127.0.0.1:5000/a---b:latest"),
            ("[::1]:5000/a:t", "[::1]:5000/a:t"),
            ("ghcr.io/o/r:t", "ghcr.io/o/r:t"),
            ("oci:/srv/layout", "oci:/srv/layout"),
            ("oci:/srv/layout:v1.2", "oci:/srv/layout:v1.2"),
            ("oci:/srv/a:b/c", "oci:/srv/a:b/c"),
            ("docker-archive:/srv/image.tar", "docker-archive:/srv/image.tar"),
        ] {
            assert_eq!(ImageRef::parse(text).unwrap().to_string(), full, "{text}");
        }
        let pinned = ImageRef::parse(&format!("python@{digest}")).unwrap();
        assert_eq!(pinned.to_string(), format!("docker.io/library/python@{digest}"));
        assert!(!pinned.floats());
        assert!(ImageRef::parse("python").unwrap().floats());
        assert!(!ImageRef::parse("python:3").unwrap().floats());
    }

    #[test]
    fn refuses_what_is_not_a_name() {
        for text in [
            "",
            ":",
            "@",
            "/",
            "a/",
            "/a",
            "a//b",
            "A",
            "a:",
            "a:-x",
            "a:b:c",
            "a@sha256:00",
            "a..b",
            "a.-b",
            "-a",
            "exa mple.com/a",
            "example.com:port/a",
            "example.com:99999/a",
            "user@example.com/a",
            "a.b?x/c",
            "a.b#x/c",
            "[::1/a",
            "[fe80::1%eth0]/a",
            "http://example.com/a",
            "oci:relative",
            "oci:/a:",
            "oci:",
            "oci:/a\n",
            "docker-archive:x.tar",
            "docker-archive:",
            "ex\u{e4}mple.com/a",
            ".example.com/a",
            "a/../b",
        ] {
            ImageRef::parse(text).expect_err(text);
        }
        assert!(ImageRef::parse(&"a".repeat(256)).is_err());
        assert!(ImageRef::parse(&format!("a:{}", "b".repeat(129))).is_err());
    }

    #[test]
    fn knows_loopback() {
        for host in ["localhost", "localhost:5000", "127.0.0.1", "127.9.9.9:1", "[::1]", "[::1]:5000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in
            ["docker.io", "localhost.example.com", "10.0.0.1:5000", "127.0.0.1.example.com", "[::2]:1"]
        {
            assert!(!is_loopback(host), "{host}");
        }
    }

    proptest! {
        #[test]
        fn whatever_parses_prints_and_parses_again(text in "(oci:|docker-archive:)?[a-zA-Z0-9.:/@_\\[\\]-]{0,60}") {
            if let Ok(reference) = ImageRef::parse(&text) {
                prop_assert_eq!(ImageRef::parse(&reference.to_string()).unwrap(), reference);
            }
        }

        #[test]
        fn never_panics(text in any::<String>()) {
            let _ = ImageRef::parse(&text);
        }

        /// Whatever happens to them, the list is one that a message may carry, and comes back from it as it was.
        #[test]
        fn a_list_stays_within_its_bounds(
            steps in proptest::collection::vec((any::<bool>(), 0..90usize, 1..230usize), 0..200),
        ) {
            let mut images = Images::default();
            for (used, number, length) in steps {
                let name = name(&format!("a{number}/{}", "b".repeat(length)));
                let listed = images.iter().any(|known| *known == name);
                if used {
                    prop_assert_eq!(images.used(name.clone()), !listed);
                    prop_assert_eq!(images.iter().next(), Some(&name));
                } else {
                    prop_assert_eq!(images.gone(&name), listed);
                    prop_assert!(!images.iter().any(|known| *known == name));
                }
                let bytes: usize = images.iter().map(|name| name.as_str().len()).sum();
                prop_assert!(images.iter().count() <= IMAGES_PER_NODE_MAX && bytes <= IMAGES_PER_NODE_BYTES_MAX);
            }
            let json = serde_json::to_string(&images).unwrap();
            prop_assert_eq!(serde_json::from_str::<Images>(&json).unwrap(), images);
        }
    }

    fn name(text: &str) -> ImageName {
        ImageName::parse(text).unwrap()
    }

    #[test]
    fn spellings_of_one_image_are_one_name() {
        let python = name("docker.io/library/python:latest");
        for text in ["python", "library/python", "index.docker.io/library/python", "python:latest"] {
            assert_eq!(name(text), python, "{text}");
        }
        assert_ne!(name("python:3"), python);
    }

    #[test]
    fn the_longest_unused_are_left_out() {
        let mut images = Images::default();
        for number in 0..IMAGES_PER_NODE_MAX + 2 {
            assert!(images.used(name(&format!("a:{number}"))));
        }
        assert_eq!(images.iter().count(), IMAGES_PER_NODE_MAX);
        let tags: Vec<&str> = images.iter().filter_map(|name| name.as_str().rsplit(':').next()).collect();
        assert_eq!((tags[0], tags[IMAGES_PER_NODE_MAX - 1]), ("65", "2"));
        assert!(!images.used(name("a:2")), "it is known, and comes first from here on");
        assert!(images.used(name("a:0")));
        assert!(!images.gone(&name("a:3")) && images.gone(&name("a:2")));
    }

    #[test]
    fn a_list_may_hold_what_this_version_does_not_know() {
        let read = |json: &str| serde_json::from_str::<Images>(json).unwrap();
        let known = read(r#"["python", "someday://x", "", "docker.io/library/python:latest", "a:1"]"#);
        assert_eq!(known, Images::cut([name("python"), name("a:1")]));
        let many: Vec<String> = (0..1000).map(|number| format!("a:{number}")).collect();
        assert_eq!(read(&serde_json::to_string(&many).unwrap()).iter().count(), IMAGES_PER_NODE_MAX);
    }
}
