//! Owns the reading of manifests, indexes and configurations (OCI image specification 1.1, docker schema 2), and
//! the choice among platforms; pure.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

use super::{Digest, ImageConfig};

/// Of a manifest, an index or a configuration: registries refuse larger ones.
pub(super) const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// What overlayfs takes as lower directories, less the layers that berth adds (docker's own limit).
const LAYERS_MAX: usize = 127;
const INDEX_ENTRIES_MAX: usize = 1024;
/// Of all strings that the record keeps: more could not be handed to a process as its environment anyway.
const CONFIG_STRINGS_BYTES_MAX: usize = 128 << 10;

/// What a registry or layout has under a manifest's digest.
#[derive(Debug)]
pub(super) enum Document {
    /// One manifest per platform.
    Index(Vec<Descriptor>),
    Manifest {
        config: Descriptor,
        /// Lowest first.
        layers: Vec<Descriptor>,
    },
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    #[serde(default)]
    pub platform: Option<Platform>,
    #[serde(default)]
    pub annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Platform {
    pub os: String,
    /// Go's name of it.
    pub architecture: String,
    pub variant: String,
}

impl Platform {
    /// The one that this program runs on.
    pub fn this() -> Platform {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", ""),
            "x86" => ("386", ""),
            "aarch64" => ("arm64", ""),
            "arm" => ("arm", "v7"),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", ""),
            "powerpc64" => ("ppc64", ""),
            other => (other, ""),
        };
        Platform { os: "linux".into(), architecture: architecture.into(), variant: variant.into() }
    }

    /// How well an image made for `made_for` runs here; higher is better, `None` is not at all.
    fn rank(&self, made_for: &Platform) -> Option<u8> {
        if made_for.os != self.os || made_for.architecture != self.architecture {
            return None;
        }
        match (self.architecture.as_str(), made_for.variant.as_str()) {
            ("arm", variant) => {
                let level =
                    |variant: &str| variant.strip_prefix('v').and_then(|level| level.parse::<u8>().ok());
                // An image that names no variant may be anything up to v7, by docker's default it is v7.
                let made_for = level(variant).unwrap_or(7);
                (made_for <= level(&self.variant).unwrap_or(7)).then_some(made_for)
            }
            // The baseline runs everywhere; a higher level is taken only where nothing else is offered.
            ("amd64", "" | "v1") | ("arm64", "" | "v8") => Some(1),
            _ => Some(0),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(f, "/{}", self.variant)?;
        }
        Ok(())
    }
}

/// The manifest for `platform`; among equally good ones the first, as the specification asks.
pub(super) fn choose<'a>(index: &'a [Descriptor], platform: &Platform) -> Option<&'a Descriptor> {
    let mut best: Option<(u8, &Descriptor)> = None;
    for entry in index {
        // An entry without a platform says nothing against itself; its configuration will.
        let rank = entry.platform.as_ref().map_or(Some(0), |made_for| platform.rank(made_for));
        if let Some(rank) = rank
            && best.is_none_or(|(best, _)| rank > best)
        {
            best = Some((rank, entry));
        }
    }
    best.map(|(_, entry)| entry)
}

/// The platforms that an index offers, for a message.
pub(super) fn offered(index: &[Descriptor]) -> String {
    let mut names: Vec<String> = index
        .iter()
        .filter_map(|entry| entry.platform.as_ref())
        .filter(|platform| platform.os != "unknown")
        .map(|platform| super::error::clip(&platform.to_string()))
        .collect();
    names.sort();
    names.dedup();
    names.truncate(16);
    if names.is_empty() { "no platform".to_owned() } else { names.join(", ") }
}

/// Reads an index or a manifest.
///
/// # Errors
/// What is wrong with it, for [`ImageError::Malformed`](super::ImageError::Malformed).
pub(super) fn parse(bytes: &[u8]) -> Result<Document, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Either {
        schema_version: u32,
        #[serde(default)]
        media_type: String,
        manifests: Option<Vec<Descriptor>>,
        config: Option<Descriptor>,
        layers: Option<Vec<Descriptor>>,
    }
    let either: Either = serde_json::from_slice(bytes).map_err(|error| format!("its manifest: {error}"))?;
    if either.schema_version != 2 {
        return Err(format!("manifest schema version {} is not supported, only 2 is", either.schema_version));
    }
    match either {
        // A document that reads as both may show one image to whoever checks it and another to who runs it
        // (CVE-2021-41190).
        Either { manifests: Some(_), config, layers, .. } if config.is_some() || layers.is_some() => {
            Err("its manifest claims to be an index too".into())
        }
        Either { manifests: Some(manifests), media_type, .. } => {
            if media_type.ends_with(".manifest.v1+json") || media_type.ends_with(".manifest.v2+json") {
                return Err("its index claims to be a manifest".into());
            }
            if manifests.len() > INDEX_ENTRIES_MAX {
                return Err(format!(
                    "its index has {} entries, at most {INDEX_ENTRIES_MAX} are allowed",
                    manifests.len()
                ));
            }
            Ok(Document::Index(manifests))
        }
        Either { config: Some(config), layers: Some(layers), media_type, .. } => {
            if media_type.contains(".image.index.") || media_type.contains(".manifest.list.") {
                return Err("its manifest claims to be an index".into());
            }
            if layers.len() > LAYERS_MAX {
                return Err(format!("it has {} layers, at most {LAYERS_MAX} are allowed", layers.len()));
            }
            if let Some(layer) = layers.iter().find(|layer| layer.media_type.contains("+encrypted")) {
                return Err(format!("layer {} is encrypted, which is not supported", layer.digest));
            }
            Ok(Document::Manifest { config, layers })
        }
        _ => Err("its manifest has neither manifests nor config and layers".into()),
    }
}

/// An image's configuration, checked.
#[derive(Debug)]
pub(super) struct Configuration {
    pub platform: Platform,
    pub config: ImageConfig,
    /// Lowest first.
    pub diff_ids: Vec<Digest>,
}

/// Reads a configuration.
///
/// # Errors
/// What is wrong with it, for [`ImageError::Malformed`](super::ImageError::Malformed).
pub(super) fn parse_configuration(bytes: &[u8]) -> Result<Configuration, String> {
    #[derive(Deserialize)]
    struct File {
        #[serde(flatten)]
        platform: Platform,
        config: Option<Config>,
        rootfs: RootFs,
    }
    #[derive(Deserialize)]
    struct RootFs {
        diff_ids: Option<Vec<Digest>>,
    }
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Config {
        entrypoint: Option<Vec<String>>,
        cmd: Option<Vec<String>>,
        env: Option<Vec<String>>,
        working_dir: Option<String>,
        user: Option<String>,
        stop_signal: Option<String>,
        volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    }
    let file: File = serde_json::from_slice(bytes)
        .map_err(|error| format!("its configuration is not an image's: {error}"))?;
    let given = file.config.unwrap_or_default();
    let config = ImageConfig {
        entrypoint: given.entrypoint.unwrap_or_default(),
        cmd: given.cmd.unwrap_or_default(),
        env: given.env.unwrap_or_default(),
        working_dir: given.working_dir.unwrap_or_default(),
        user: given.user.unwrap_or_default(),
        stop_signal: given.stop_signal.filter(|signal| !signal.is_empty()),
        volumes: given.volumes.unwrap_or_default().into_keys().collect(),
    };
    let strings = [&config.working_dir, &config.user].into_iter().chain(&config.stop_signal);
    let strings =
        strings.chain(&config.entrypoint).chain(&config.cmd).chain(&config.env).chain(&config.volumes);
    let mut bytes = 0;
    for string in strings {
        if string.contains('\0') {
            return Err("a string of its configuration contains a zero byte".into());
        }
        bytes += string.len() + 1;
    }
    if bytes > CONFIG_STRINGS_BYTES_MAX {
        return Err(format!(
            "its configuration has {bytes} bytes of strings, at most {CONFIG_STRINGS_BYTES_MAX} are allowed"
        ));
    }
    let diff_ids = file.rootfs.diff_ids.unwrap_or_default();
    if diff_ids.len() > LAYERS_MAX {
        return Err(format!("it has {} layers, at most {LAYERS_MAX} are allowed", diff_ids.len()));
    }
    Ok(Configuration { platform: file.platform, config, diff_ids })
}

impl Configuration {
    /// Whether the image runs on `platform`; one that names no architecture is believed to.
    pub fn runs_on(&self, platform: &Platform) -> bool {
        self.platform.architecture.is_empty() || platform.rank(&self.platform).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(platforms: &[&str]) -> Vec<Descriptor> {
        let entry = |(number, platform): (usize, &&str)| {
            let mut parts = platform.split('/').map(str::to_owned);
            let mut next = || parts.next().unwrap_or_default();
            Descriptor {
                media_type: String::new(),
                digest: Digest::of(&[number as u8]),
                size: 1,
                platform: Some(Platform { os: next(), architecture: next(), variant: next() }),
                annotations: None,
            }
        };
        platforms.iter().enumerate().map(entry).collect()
    }

    fn check(here: &str, offers: &[&str], expect: Option<usize>) {
        let here = index(&[here])[0].platform.clone().unwrap();
        let index = index(offers);
        let chosen = choose(&index, &here).map(|entry| entry.digest);
        assert_eq!(chosen, expect.map(|number| index[number].digest), "{here} among {offers:?}");
    }

    #[test]
    fn chooses_the_platform() {
        check("linux/amd64", &["linux/arm64", "linux/amd64"], Some(1));
        check("linux/amd64", &["linux/amd64/v3", "linux/amd64"], Some(1));
        check("linux/amd64", &["linux/amd64/v3"], Some(0));
        check("linux/amd64", &["windows/amd64", "unknown/unknown"], None);
        check("linux/arm64", &["linux/arm/v7", "linux/arm64/v8"], Some(1));
        check("linux/arm/v7", &["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"], Some(1));
        check("linux/arm/v6", &["linux/arm/v7", "linux/arm/v5"], Some(1));
        check("linux/arm/v6", &["linux/arm/v7", "linux/arm64"], None);
        check("linux/amd64", &[], None);
        assert_eq!(
            offered(&index(&["linux/arm64", "unknown/unknown", "linux/386"])),
            "linux/386, linux/arm64"
        );
    }

    #[test]
    fn a_document_is_one_thing() {
        let digest = Digest::of(b"");
        let descriptor = format!(r#"{{"mediaType":"x","digest":"{digest}","size":1}}"#);
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{descriptor}]}}"#);
        assert!(matches!(parse(index.as_bytes()), Ok(Document::Index(_))));
        let manifest = format!(r#"{{"schemaVersion":2,"config":{descriptor},"layers":[{descriptor}]}}"#);
        assert!(matches!(parse(manifest.as_bytes()), Ok(Document::Manifest { .. })));
        for (bad, why) in [
            (
                format!(r#"{{"schemaVersion":2,"manifests":[],"config":{descriptor},"layers":[]}}"#),
                "index too",
            ),
            (r#"{"schemaVersion":1}"#.to_owned(), "schema version 1"),
            (r#"{"schemaVersion":2}"#.to_owned(), "neither"),
            ("[".to_owned(), "its manifest"),
            (manifest.replace("\"x\"", "\"application/vnd.oci.image.layer.v1.tar+encrypted\""), "encrypted"),
            (manifest.replace("sha256:", "sha256:../../"), "not a digest"),
            (
                manifest.replace("2,", r#"2,"mediaType":"application/vnd.oci.image.index.v1+json","#),
                "claims to be an index",
            ),
        ] {
            let error = parse(bad.as_bytes()).expect_err(&bad);
            assert!(error.contains(why), "{error} lacks {why}");
        }
    }

    #[test]
    fn nulls_in_a_configuration_are_defaults() {
        let file = parse_configuration(
            br#"{"architecture":"amd64","os":"linux","config":{"Entrypoint":null,"Cmd":["sh"],"Env":["A=1"],
                "Volumes":{"/data":{}},"StopSignal":""},"rootfs":{"type":"layers","diff_ids":null}}"#,
        )
        .unwrap();
        assert_eq!(file.config.cmd, ["sh"]);
        assert_eq!(file.config.volumes, ["/data"]);
        assert_eq!(file.config.stop_signal, None);
        assert!(file.diff_ids.is_empty());
        assert!(parse_configuration(br#"{"name":"a helm chart"}"#).is_err());
        assert!(parse_configuration(br#"{"config":{"Env":["A=\u0000"]},"rootfs":{}}"#).is_err());
    }
}
