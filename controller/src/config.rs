//! What the controller was told at its start: flags, the environment, a TOML file, in this order of precedence.

mod setup;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use berth_protocol::broker::{BrokerUrl, BrokerUrlError};
use berth_protocol::ids::{ClusterName, Namespace};
use berth_protocol::units::{Bytes, MilliCpu, UnitError};
use clap::Parser;
use serde::Deserialize;

pub use self::setup::Setup;
use self::setup::hosts;
use crate::admin::Admin;
use crate::core::Allowance;
use crate::core::schedule::moves::MOVES_MAX;
use crate::io::depot::{Bucket, BucketError};
use crate::io::store::{StoreChoice, StoreChoiceError};

const DEFAULT_DATA_DIR: &str = "/var/lib/berth/controller";
const DEFAULT_CLUSTER: &str = "default";
const DEFAULT_LISTEN_MQTT: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1883);
const MEMBERS_LISTEN_MQTT: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 8883);
const MEMBERS_LISTEN_HTTP: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 7420);
const DEFAULT_LISTEN_HTTP: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 7420);

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the configuration {path} is not one")]
    Malformed { path: PathBuf, source: toml::de::Error },
    #[error("the configuration {path} has the unknown key `{key}`{}", nearest.map(|key| format!(", did you mean `{key}`?")).unwrap_or_default())]
    UnknownKey { path: PathBuf, key: String, nearest: Option<&'static str> },
    #[error("--broker: {0}")]
    Broker(#[from] BrokerUrlError),
    #[error("--cluster: {0}")]
    Cluster(#[from] berth_protocol::ids::IdError),
    #[error("--store: {0}")]
    Store(#[from] StoreChoiceError),
    #[error(
        "--store {0} is for several controllers, and each would have a broker of its own: name one that they share with --broker mqtt://HOST:PORT"
    )]
    LonelyBroker(StoreChoice),
    #[error("--depot: {0}")]
    Depot(#[from] BucketError),
    #[error("--checkpoint-quota: {0}")]
    Quota(#[from] UnitError),
    #[error("[namespace.{0}] {1}: {2}")]
    Namespace(String, String, String),
    #[error("`{0}` is not a network: write ADDRESS/BITS, such as 10.0.0.0/8")]
    Network(String),
    #[error(
        "who may connect? `berth-controller init --host NAME` sets up a cluster, whose members have certificates; --dev lets everybody on this machine in"
    )]
    NoIdentity,
    #[error("--host `{0}` is neither a host's name nor an address")]
    Host(String),
    #[error(
        "--broker {0} speaks in plain, and the cluster's members are to know it by its certificate: write mqtts://HOST:PORT"
    )]
    PlainBroker(BrokerUrl),
    #[error(
        "--broker {0} asks for certificates, and with --dev nobody has one: write mqtt://HOST:PORT, or set up a cluster with `berth-controller init`"
    )]
    TlsBroker(BrokerUrl),
    #[error(
        "{flag} {address} is not on loopback, and --dev lets everybody in: name a test network with --dev=CIDR, or listen on 127.0.0.1"
    )]
    Exposed { flag: &'static str, address: SocketAddr },
    #[error(
        "--listen-http {address} stands for every address of this machine, and agents and clients would be told to reach the depot there: write one address, or say how they reach it with --depot-url, such as http://10.0.0.1:{}",
        address.port()
    )]
    DepotNowhere { address: SocketAddr },
}

/// A network, as in `10.0.0.0/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    address: IpAddr,
    bits: u8,
}

impl Cidr {
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let bad = || ConfigError::Network(text.to_owned());
        let (address, bits) = text.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let bits: u8 = bits.parse().map_err(|_| bad())?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        if bits > width { Err(bad()) } else { Ok(Self { address, bits }) }
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        fn equal_above(a: u128, b: u128, below: u32) -> bool {
            a.checked_shr(below).unwrap_or(0) == b.checked_shr(below).unwrap_or(0)
        }
        let bits = u32::from(self.bits);
        match (self.address, address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                equal_above(u32::from(a).into(), u32::from(b).into(), 32 - bits)
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => equal_above(a.into(), b.into(), 128 - bits),
            _ => false,
        }
    }
}

/// Which broker carries the messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BrokerChoice {
    Embedded,
    Url(BrokerUrl),
}

/// The configuration, complete and checked.
#[derive(Debug, Clone)]
pub struct Config {
    pub data_dir: PathBuf,
    pub store: StoreChoice,
    pub cluster: ClusterName,
    pub broker: BrokerChoice,
    pub listen_mqtt: SocketAddr,
    pub listen_http: SocketAddr,
    /// Where agents and clients reach the depot; `None`: where `listen_http` says.
    pub depot_url: Option<String>,
    /// The bucket that is the depot, `s3://BUCKET/PREFIX`; `None`: a directory below `data_dir`.
    pub depot: Option<String>,
    /// Of the checkpoints of one namespace.
    pub checkpoint_quota: Option<Bytes>,
    /// Weights and quotas.
    pub namespaces: BTreeMap<Namespace, Allowance>,
    /// Pods that may be moved for one that waits.
    pub moves: u8,
    pub admission: Admission,
}

/// Who may connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// Everybody on loopback, and in the test network that `--dev=CIDR` names.
    Dev(Option<Cidr>),
    /// Those with a certificate of the cluster's, who reach this machine by these names and addresses; the first is told to
    /// those that join.
    Members { hosts: Vec<String> },
}

/// berth's controller: takes jobs over MQTT, places them on nodes, keeps their records.
#[derive(Debug, Parser)]
#[command(name = "berth-controller", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct Flags {
    /// Read the settings below from a TOML file too; flags and BERTH_… variables go before it
    #[arg(long, value_name = "FILE", env = "BERTH_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    #[command(subcommand)]
    pub admin: Option<Admin>,
}

/// Which store an administrative command is about: the settings of the controller that uses it.
#[derive(Debug, clap::Args)]
pub struct Place {
    /// Read the settings below from the controller's TOML file too
    #[arg(long, value_name = "FILE", env = "BERTH_CONFIG")]
    config: Option<PathBuf>,
    /// Where the store lives [default: /var/lib/berth/controller]
    #[arg(long, value_name = "DIR", env = "BERTH_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// `embedded`, etcd://HOST:PORT[,HOST:PORT…], or etcds://…?ca=FILE&cert=FILE&key=FILE [default: embedded]
    #[arg(long, value_name = "STORE", env = "BERTH_STORE")]
    store: Option<String>,
    /// The cluster's name [default: default]
    #[arg(long, value_name = "NAME", env = "BERTH_CLUSTER")]
    cluster: Option<String>,
}

impl Place {
    pub fn resolve(self) -> Result<(StoreChoice, PathBuf, ClusterName), ConfigError> {
        let file = self.config.as_deref().map(Settings::read).transpose()?.unwrap_or_default();
        let flags = Settings {
            data_dir: self.data_dir,
            store: self.store,
            cluster: self.cluster,
            ..Settings::default()
        };
        flags.or(file).place()
    }
}

const EXAMPLES: &str = "\
Examples:
  berth-controller init --host ctl.example.org
      Sets up a cluster, once; `berth node token` then makes the line that lets a machine in.
  berth-controller --dev
      For this machine alone: the embedded broker on 127.0.0.1:1883, no passwords.
  berth-controller --dev --data-dir /tmp/berth --listen-mqtt 127.0.0.1:2883 --listen-http 127.0.0.1:7520
      A second one beside it.
  berth-controller --dev --broker mqtt://127.0.0.1:1883
      With a broker that is there already, such as Mosquitto.
  berth-controller --dev --broker mqtt://127.0.0.1:1883 --store etcd://10.0.0.1:2379,10.0.0.2:2379,10.0.0.3:2379
      One of several: one leads, the others stand by.
  berth-controller backup /srv/backup/berth.sqlite
      A copy of all records, while the controller runs.";

/// What flags, variables and the file may each say. The file's keys are the flags' names.
#[derive(Debug, Default, clap::Args, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Settings {
    /// Where the store and the depot live [default: /var/lib/berth/controller]
    #[arg(long, value_name = "DIR", env = "BERTH_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// `embedded`, in the data directory, or the etcd that several controllers share: etcd://HOST:PORT[,HOST:PORT…]
    /// [default: embedded]
    #[arg(long, value_name = "STORE", env = "BERTH_STORE")]
    store: Option<String>,
    /// The cluster's name, part of every topic [default: default]
    #[arg(long, value_name = "NAME", env = "BERTH_CLUSTER")]
    cluster: Option<String>,
    /// `embedded`, or the broker to use: mqtt://HOST[:PORT], with commas between them several of one cluster, any of
    /// which will do [default: embedded]
    #[arg(long, value_name = "BROKER", env = "BERTH_BROKER")]
    broker: Option<String>,
    /// Where the embedded broker listens [default: 127.0.0.1:1883]
    #[arg(long, value_name = "ADDRESS:PORT", env = "BERTH_LISTEN_MQTT")]
    listen_mqtt: Option<SocketAddr>,
    /// Where the depot, /healthz and /metrics listen [default: 127.0.0.1:7420]
    #[arg(long, value_name = "ADDRESS:PORT", env = "BERTH_LISTEN_HTTP")]
    listen_http: Option<SocketAddr>,
    /// How agents and clients reach the depot [default: http:// and the address above]
    #[arg(long, value_name = "URL", env = "BERTH_DEPOT_URL")]
    depot_url: Option<String>,
    /// Keep logs, outputs and checkpoints in a bucket: s3://BUCKET/PREFIX; credentials and endpoint are taken from the
    /// environment's AWS_… [default: a directory below the data directory]
    #[arg(long, value_name = "URL", env = "BERTH_DEPOT")]
    depot: Option<String>,
    /// The most that the checkpoints of one namespace may take, such as 500Gi [default: no limit]
    #[arg(long, value_name = "SIZE", env = "BERTH_CHECKPOINT_QUOTA")]
    checkpoint_quota: Option<String>,
    /// How many running pods may be moved, saved, for one that has waited for a minute; 0: none [default: 8]
    #[arg(long, value_name = "N", env = "BERTH_MOVES", value_parser = clap::value_parser!(u8).range(0..=MOVES_MAX as i64))]
    moves: Option<u8>,
    /// A name or address by which other machines reach this one, for its certificate; may be repeated, and the first is
    /// what those that join are told
    #[arg(long = "host", value_name = "HOST", env = "BERTH_HOST", value_delimiter = ',')]
    #[serde(rename = "host")]
    hosts: Option<Vec<String>>,
    /// Let everybody on loopback in without certificates; with a CIDR, a test network too
    #[arg(long, value_name = "CIDR", env = "BERTH_DEV", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[serde(deserialize_with = "flag_or_text")]
    dev: Option<String>,
    /// `[namespace.NAME]` tables, in the file alone.
    #[arg(skip)]
    namespace: BTreeMap<String, NamespaceTable>,
}

/// A namespace's weight and quotas, as in `[namespace.lab]`.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
struct NamespaceTable {
    weight: Option<u32>,
    /// Cores, as in job files.
    cpu: Option<String>,
    memory: Option<String>,
    gpus: Option<String>,
    pods: Option<u64>,
}

impl NamespaceTable {
    fn resolve(self, name: &str) -> Result<(Namespace, Allowance), ConfigError> {
        let bad = |key: &str, why: String| ConfigError::Namespace(name.to_owned(), key.to_owned(), why);
        let cores = |key: &str, text: Option<String>| {
            let parsed = text.map(|text| MilliCpu::parse(&text)).transpose();
            parsed.map_err(|error| bad(key, error.to_string()))
        };
        let memory = self.memory.map(|text| Bytes::parse(&text)).transpose();
        let allowance = Allowance {
            weight: self.weight.unwrap_or(1),
            cpu: cores("cpu", self.cpu)?,
            memory: memory.map_err(|error| bad("memory", error.to_string()))?,
            // Written as cores are: 4, 0.5 or 500m.
            gpu_milli: cores("gpus", self.gpus)?.map(|gpus| gpus.0),
            pods: self.pods,
        };
        if allowance.weight == 0 {
            return Err(bad("weight", "is 0, at least 1 is due".to_owned()));
        }
        let namespace = Namespace::parse(name).map_err(|error| bad("name", error.to_string()))?;
        Ok((namespace, allowance))
    }
}

const KEYS: [&str; 13] = [
    "data-dir",
    "store",
    "cluster",
    "broker",
    "listen-mqtt",
    "listen-http",
    "depot-url",
    "depot",
    "checkpoint-quota",
    "moves",
    "host",
    "dev",
    "namespace",
];

/// `dev = true` in the file, as well as `dev = "10.0.0.0/8"`.
fn flag_or_text<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Flag(bool),
        Text(String),
    }
    Ok(Some(match Either::deserialize(from)? {
        Either::Flag(on) => on.to_string(),
        Either::Text(text) => text,
    }))
}

impl Settings {
    fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let malformed = |source| ConfigError::Malformed { path: path.to_owned(), source };
        let table: toml::Table = toml::from_str(&text).map_err(malformed)?;
        if let Some(key) = table.keys().find(|key| !KEYS.contains(&key.as_str())) {
            let nearest = KEYS.into_iter().min_by_key(|known| strsim::osa_distance(known, key));
            let nearest = nearest.filter(|known| strsim::osa_distance(known, key) <= known.len() / 2);
            return Err(ConfigError::UnknownKey { path: path.to_owned(), key: key.clone(), nearest });
        }
        // From the text, so that an error names the line.
        toml::from_str(&text).map_err(malformed)
    }

    fn place(&self) -> Result<(StoreChoice, PathBuf, ClusterName), ConfigError> {
        Ok((
            self.store.as_deref().map(StoreChoice::parse).transpose()?.unwrap_or_default(),
            self.data_dir.clone().unwrap_or_else(|| DEFAULT_DATA_DIR.into()),
            ClusterName::parse(self.cluster.as_deref().unwrap_or(DEFAULT_CLUSTER))?,
        ))
    }

    fn or(self, other: Self) -> Self {
        Self {
            data_dir: self.data_dir.or(other.data_dir),
            store: self.store.or(other.store),
            cluster: self.cluster.or(other.cluster),
            broker: self.broker.or(other.broker),
            listen_mqtt: self.listen_mqtt.or(other.listen_mqtt),
            listen_http: self.listen_http.or(other.listen_http),
            depot_url: self.depot_url.or(other.depot_url),
            depot: self.depot.or(other.depot),
            checkpoint_quota: self.checkpoint_quota.or(other.checkpoint_quota),
            moves: self.moves.or(other.moves),
            hosts: self.hosts.or(other.hosts),
            dev: self.dev.or(other.dev),
            namespace: if self.namespace.is_empty() { other.namespace } else { self.namespace },
        }
    }
}

impl Config {
    pub fn resolve(flags: Flags) -> Result<Self, ConfigError> {
        let file = flags.config.as_deref().map(Settings::read).transpose()?.unwrap_or_default();
        let settings = flags.settings.or(file);
        let broker = match settings.broker.as_deref() {
            None | Some("embedded") => BrokerChoice::Embedded,
            Some(url) => BrokerChoice::Url(BrokerUrl::parse(url)?),
        };
        let admission = match settings.dev.as_deref() {
            None | Some("false" | "0" | "") => Admission::Members { hosts: hosts(settings.hosts.clone())? },
            Some("true" | "1") => Admission::Dev(None),
            Some(cidr) => Admission::Dev(Some(Cidr::parse(cidr)?)),
        };
        let open = matches!(admission, Admission::Members { .. });
        match &broker {
            BrokerChoice::Url(url) if open && !url.is_tls() => {
                return Err(ConfigError::PlainBroker(url.clone()));
            }
            BrokerChoice::Url(url) if !open && url.is_tls() => {
                return Err(ConfigError::TlsBroker(url.clone()));
            }
            _ => {}
        }
        let (listen_mqtt, listen_http) = match open {
            true => (MEMBERS_LISTEN_MQTT, MEMBERS_LISTEN_HTTP),
            false => (DEFAULT_LISTEN_MQTT, DEFAULT_LISTEN_HTTP),
        };
        let (store, data_dir, cluster) = settings.place()?;
        let config = Self {
            data_dir,
            store,
            cluster,
            broker,
            listen_mqtt: settings.listen_mqtt.unwrap_or(listen_mqtt),
            listen_http: settings.listen_http.unwrap_or(listen_http),
            depot_url: settings.depot_url,
            depot: settings.depot,
            checkpoint_quota: settings.checkpoint_quota.as_deref().map(Bytes::parse).transpose()?,
            namespaces: settings
                .namespace
                .into_iter()
                .map(|(name, table)| table.resolve(&name))
                .collect::<Result<_, _>>()?,
            moves: settings.moves.unwrap_or(MOVES_MAX as u8).min(MOVES_MAX as u8),
            admission,
        };
        config.depot.as_deref().map(Bucket::parse).transpose()?;
        if config.store != StoreChoice::Embedded && config.broker == BrokerChoice::Embedded {
            return Err(ConfigError::LonelyBroker(config.store));
        }
        config.refuse_exposure("--listen-http", config.listen_http)?;
        if config.broker == BrokerChoice::Embedded {
            config.refuse_exposure("--listen-mqtt", config.listen_mqtt)?;
        }
        if config.listen_http.ip().is_unspecified() && config.depot_url.is_none() && !open {
            return Err(ConfigError::DepotNowhere { address: config.listen_http });
        }
        Ok(config)
    }

    /// Other machines are let in, but are told to reach the depot on their own loopback.
    pub fn hides_depot(&self) -> bool {
        if matches!(self.admission, Admission::Members { .. }) {
            return false;
        }
        let open = self.broker == BrokerChoice::Embedded && !self.listen_mqtt.ip().is_loopback();
        open && self.listen_http.ip().is_loopback() && self.depot_url.is_none()
    }

    /// Several controllers may follow each other, and each has a depot of its own.
    pub fn keeps_depot_to_itself(&self) -> bool {
        self.store != StoreChoice::Embedded && self.depot.is_none()
    }

    fn refuse_exposure(&self, flag: &'static str, address: SocketAddr) -> Result<(), ConfigError> {
        let Admission::Dev(network) = self.admission else { return Ok(()) };
        let ip = address.ip();
        let inside = |network: Cidr| ip.is_unspecified() || network.contains(ip);
        if ip.is_loopback() || network.is_some_and(inside) {
            return Ok(());
        }
        Err(ConfigError::Exposed { flag, address })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(flags: &[&str], file: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, file).unwrap();
        let program = ["berth-controller", "--config", path.to_str().unwrap()];
        Config::resolve(Flags::parse_from(program.iter().chain(flags)))
    }

    #[test]
    fn flags_go_before_the_file_and_the_file_before_defaults() {
        let file = "cluster = \"lab\"\nlisten-http = \"127.0.0.1:1\"\ndev = true";
        let config = resolve(&["--listen-http", "127.0.0.1:2", "--broker=mqtt://b:1"], file).unwrap();
        assert_eq!(config.cluster.as_str(), "lab");
        assert_eq!(config.listen_http.port(), 2);
        assert_eq!(config.listen_mqtt, DEFAULT_LISTEN_MQTT);
        assert_eq!(config.data_dir, Path::new(DEFAULT_DATA_DIR));
        assert_eq!(config.broker, BrokerChoice::Url(BrokerUrl::parse("mqtt://b:1").unwrap()));
    }

    #[test]
    fn namespaces_have_weights_and_quotas() {
        let file = "dev = true\n[namespace.lab]\nweight = 3\ncpu = \"16\"\nmemory = \"64Gi\"\ngpus = \"0.5\"\npods = 9";
        let config = resolve(&[], file).unwrap();
        let lab = Allowance {
            weight: 3,
            cpu: Some(MilliCpu(16_000)),
            memory: Some(Bytes(64 * Bytes::GIB)),
            gpu_milli: Some(500),
            pods: Some(9),
        };
        assert_eq!(config.namespaces, BTreeMap::from([(Namespace::parse("lab").unwrap(), lab)]));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (flags, file, message) in [
            (
                &[][..],
                "dev = true\nlisten_mqtt = 1",
                "unknown key `listen_mqtt`, did you mean `listen-mqtt`?",
            ),
            (&[], "zzzzzzzzzz = 1", "unknown key `zzzzzzzzzz`"),
            (&[], "", "who may connect? `berth-controller init"),
            (&["--host=a_b"], "", "--host `a_b` is neither"),
            (&["--host=a", "--broker=mqtt://b"], "", "write mqtts://HOST:PORT"),
            (&["--dev", "--cluster=A"], "", "--cluster: cluster `A` may hold only"),
            (&["--dev", "--broker=mqtts://b"], "", "asks for certificates"),
            (&["--dev", "--broker=b"], "", "write mqtt://HOST[:PORT]"),
            (&["--dev", "--store=etcd:2379"], "", "--store: `etcd:2379` is no store: write `embedded`"),
            (&["--dev", "--store=etcd://a:1"], "", "name one that they share with --broker"),
            (&["--dev", "--depot=/srv"], "", "write s3://BUCKET"),
            (&["--dev", "--depot=s3://b//x"], "", "an empty part"),
            (&["--dev"], "checkpoint-quota = \"much\"", "--checkpoint-quota: `much` is not a size"),
            (&[], "dev = true\n[namespace.lab]\ncpu = \"many\"", "[namespace.lab] cpu: "),
            (&[], "dev = true\n[namespace.lab]\nweight = 0", "[namespace.lab] weight: is 0"),
            (&["--dev=10.0.0.0"], "", "write ADDRESS/BITS"),
            (&["--dev=10.0.0.0/33"], "", "write ADDRESS/BITS"),
            (&["--dev", "--listen-mqtt=0.0.0.0:1883"], "", "not on loopback"),
            (&["--dev=10.0.0.0/8", "--listen-http=11.0.0.1:1"], "", "not on loopback"),
            (&["--dev", "--listen-http=0.0.0.0:1"], "", "not on loopback"),
            (&["--dev=10.0.0.0/8", "--listen-http=0.0.0.0:7"], "", "--depot-url, such as http://10.0.0.1:7"),
            (&["--dev=fd00::/8", "--listen-http=[::]:7"], "", "--depot-url"),
        ] {
            let error = resolve(flags, file).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        for flags in
            [&["--dev", "--listen-mqtt=[::1]:1"][..], &["--dev=10.0.0.0/8", "--listen-mqtt=10.1.2.3:1"]]
        {
            resolve(flags, "").unwrap();
        }
        resolve(&["--dev", "--broker=mqtt://b", "--listen-mqtt=0.0.0.0:1883"], "").unwrap();
    }

    #[test]
    fn a_depot_out_of_reach_is_noticed() {
        let open = ["--dev=10.0.0.0/8", "--listen-mqtt=0.0.0.0:1883"];
        for (flags, hides) in [
            (&[][..], true),
            (&["--depot-url=http://h:1"], false),
            (&["--listen-http=10.0.0.1:1"], false),
            (&["--listen-http=0.0.0.0:1", "--depot-url=http://h:1"], false),
            (&["--broker=mqtt://b"], false),
        ] {
            assert_eq!(resolve(&[&open[..], flags].concat(), "").unwrap().hides_depot(), hides, "{flags:?}");
        }
        assert!(!resolve(&["--dev"], "").unwrap().hides_depot());
    }

    #[test]
    fn networks() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.1"),
            ("192.168.1.0/24", "192.168.1.7", "192.168.2.7"),
            ("0.0.0.0/0", "8.8.8.8", "::1"),
            ("fd00::/8", "fd12::1", "fe80::1"),
            ("1.2.3.4/32", "1.2.3.4", "1.2.3.5"),
        ] {
            let network = Cidr::parse(network).unwrap();
            assert!(network.contains(inside.parse().unwrap()), "{inside}");
            assert!(!network.contains(outside.parse().unwrap()), "{outside}");
        }
    }
}
