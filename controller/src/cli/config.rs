//! What every verb goes by: command line, environment and configuration file brought together.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use berth_protocol::broker::BrokerUrl;
use berth_protocol::ids::{ClusterName, Namespace};
use rustls::ClientConfig;
use serde::Deserialize;

use super::Usage;
use super::command::{Format, Global, duration};
use super::identity::{ADMIN, Identity};

const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// A larger configuration file is not one.
const FILE_BYTES_MAX: u64 = 64 * 1024;

#[derive(Debug, Clone)]
pub struct Settings {
    pub broker: BrokerUrl,
    pub cluster: ClusterName,
    pub namespace: Namespace,
    /// The namespace was named, so that a job file may not name another.
    pub namespace_given: bool,
    pub format: Format,
    pub request_timeout: Duration,
    /// Who the user is, where there are certificates.
    pub identity: Option<Identity>,
    /// Where `berth login` keeps that.
    pub own_identity: Option<PathBuf>,
}

/// `config.toml`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    broker: Option<String>,
    cluster: Option<ClusterName>,
    namespace: Option<Namespace>,
    format: Option<Format>,
    request_timeout: Option<String>,
}

impl Settings {
    pub fn load(global: &Global) -> anyhow::Result<Self> {
        let file = match &global.config {
            Some(path) => read(path).with_context(|| format!("cannot read {}", path.display()))?,
            None => match default_path().filter(|path| path.exists()) {
                Some(path) => read(&path).with_context(|| format!("cannot read {}", path.display()))?,
                None => File::default(),
            },
        };
        let own_identity =
            global.identity.clone().or_else(|| Some(default_path()?.with_file_name("identity")));
        let identity = match &own_identity {
            Some(dir) => Identity::load(dir)?,
            None => None,
        };
        let identity = match identity {
            // Root's own. Nobody else can read it.
            None if global.identity.is_none() => Identity::load(Path::new(ADMIN)).ok().flatten(),
            identity => identity,
        };
        Ok(Self { own_identity, ..Self::merge(global, file, identity)? })
    }

    /// What to show to a server that asks for a certificate.
    pub fn tls(&self) -> anyhow::Result<Arc<ClientConfig>> {
        let identity = self.identity.as_ref().with_context(|| {
            format!(
                "the broker {} asks for a certificate, and you have none here: `berth login TOKEN`, with a token from an \
                 admin's `berth user token NAME`",
                self.broker
            )
        })?;
        identity.tls()
    }

    fn merge(global: &Global, file: File, identity: Option<Identity>) -> anyhow::Result<Self> {
        let membership = identity.as_ref().map(|identity| &identity.membership);
        let member_of = membership.map(|membership| membership.broker.clone());
        let broker = match (&global.broker, file.broker.or(member_of)) {
            (Some(url), _) => url.clone(),
            (None, Some(text)) => BrokerUrl::parse(&text).map_err(|error| Usage::new(error.to_string()))?,
            (None, None) => BrokerUrl::default(),
        };
        let request_timeout = match (global.request_timeout, file.request_timeout) {
            (Some(span), _) => span,
            (None, Some(text)) => duration(&text).map_err(Usage::new)?,
            (None, None) => REQUEST_TIMEOUT,
        };
        let cluster =
            match global.cluster.clone().or(file.cluster).or_else(|| Some(membership?.cluster.clone())) {
                Some(cluster) => cluster,
                None => ClusterName::parse("default")?,
            };
        Ok(Self {
            broker,
            cluster,
            namespace_given: global.namespace.is_some(),
            namespace: global
                .namespace
                .clone()
                .or(file.namespace)
                .unwrap_or_else(Namespace::default_namespace),
            format: global.format.or(file.format).unwrap_or(Format::Table),
            request_timeout,
            identity,
            own_identity: None,
        })
    }
}

fn default_path() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")))?;
    Some(base.join("berth/config.toml"))
}

fn read(path: &Path) -> anyhow::Result<File> {
    let bytes = std::fs::metadata(path)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(Usage::new(format!(
            "the file is {bytes} bytes long, at most {FILE_BYTES_MAX} are allowed"
        ))
        .into());
    }
    let text = std::fs::read_to_string(path)?;
    toml::from_str(&text).map_err(|e| Usage::new(e.to_string().trim_end()).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::command::Cli;
    use clap::Parser as _;

    #[test]
    fn the_command_line_goes_before_the_file() {
        let file =
            || toml::from_str::<File>("broker = 'mqtt://h:7'\nnamespace = 'team'\nformat = 'json'").unwrap();
        let settings = |args: &[&str]| {
            let args = ["berth"].iter().chain(args).chain(&["schema"]);
            Settings::merge(&Cli::parse_from(args).global, file(), None).unwrap()
        };
        let from_file = settings(&[]);
        assert_eq!(from_file.broker.to_string(), "mqtt://h:7");
        assert_eq!((from_file.namespace.as_str(), from_file.namespace_given), ("team", false));
        assert_eq!((from_file.cluster.as_str(), from_file.format), ("default", Format::Json));
        let given = settings(&["-n", "mine", "--broker", "mqtt://[::1]", "-o", "name"]);
        assert_eq!(given.broker.to_string(), "mqtt://[::1]:1883");
        assert_eq!((given.namespace.as_str(), given.namespace_given), ("mine", true));
        assert_eq!(given.format, Format::Name);
    }

    #[test]
    fn a_wrong_key_is_named() {
        let error = toml::from_str::<File>("brokre = 'mqtt://h'").unwrap_err().to_string();
        assert!(error.contains("unknown field `brokre`"), "{error}");
    }
}
