//! What an operator sets: flags, then `BERTH_…`, then the file, then defaults. Parsed here once and for all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use berth_protocol::broker::BrokerUrl;
use berth_protocol::ids::{ClusterName, NodeId};
use berth_protocol::join::Membership;
use berth_protocol::limits::{LABEL_BYTES_MAX, LABELS_PER_NODE_MAX};
use berth_protocol::units::{Bytes, MilliCpu, Millis};
use clap::Parser;
use serde::Deserialize;

use crate::io::departure::Source;
use crate::io::identity;
use crate::io::network::Reach;
use crate::policy::{self, NodePolicy};

const EXAMPLES: &str = "Examples:
  berth-agent join b1c0ffee…@ctl.example.org:7420            belong to a cluster, once: the line of `berth node token`
  berth-agent --dev                                          one person's machine: the broker on loopback, host images
  berth-agent --config /etc/berth/agent.toml                 as the service does
  berth-agent --dev --node a2 --data-dir /tmp/a2 --capacity cpu=2,memory=4Gi
                                                             a second agent beside the first, with a part of the machine
  berth-agent --dev=10.0.0.0/8 --broker mqtt://10.0.0.5:1883 --label rack=r7 --taint spot
                                                             a machine of a test network
  berth-agent doctor --dev                                   what this machine lacks, and how to get it

`berth-agent doctor`, with the agent's own flags, starts nothing: it says what this machine has and what is missing for
running and saving pods, and ends with 1 where anything is.";

/// The node daemon of berth: runs containers as the controller directs.
#[derive(Parser, Debug)]
#[command(name = "berth-agent", version, after_help = EXAMPLES)]
pub struct Args {
    /// Configuration file (TOML, the same names as the flags)
    #[arg(long, env = "BERTH_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

pub const DATA_DIR: &str = "/var/lib/berth/agent";
/// The shortest that clouds give.
const NOTICE_WITHIN: Millis = Millis::from_secs(30);
const SHUTDOWN_GRACE: Millis = Millis::from_secs(60);

/// Everything that may be set in all three places.
#[derive(clap::Args, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct Settings {
    /// Where the agent keeps its ledger, pods and images [default: /var/lib/berth/agent]
    #[arg(long, env = "BERTH_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The fleet to belong to [default: default]
    #[arg(long, env = "BERTH_CLUSTER", value_name = "NAME")]
    cluster: Option<String>,
    /// The broker, or with commas between them several of one cluster, any of which will do [default:
    /// mqtt://127.0.0.1:1883]
    #[arg(long, env = "BERTH_BROKER", value_name = "URL")]
    broker: Option<String>,
    /// This node's name [default: the host's]
    #[arg(long, env = "BERTH_NODE", value_name = "NAME")]
    node: Option<String>,
    /// A label, as `zone=lab`; may be repeated
    #[arg(long = "label", env = "BERTH_LABEL", value_name = "K=V", value_delimiter = ',')]
    #[serde(rename = "label")]
    labels: Option<Vec<String>>,
    /// A taint that only pods tolerating it ignore; may be repeated
    #[arg(long = "taint", env = "BERTH_TAINT", value_name = "NAME", value_delimiter = ',')]
    #[serde(rename = "taint")]
    taints: Option<Vec<String>>,
    /// What this machine lets pods have, whoever orders it (TOML); root's own, writable by nobody else. It is the whole policy:
    /// the --allow-… flags cannot stand beside it [default: /etc/berth/policy.toml where there is one]
    #[arg(long, env = "BERTH_POLICY", value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Let jobs run on a copy-on-write view of this machine's own files (`image: host`)
    #[arg(long, env = "BERTH_ALLOW_HOST_IMAGE", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    allow_host_image: Option<bool>,
    /// A directory whose files jobs may mount (`volumes: [{host: …}]`); may be repeated
    #[arg(
        long = "allow-host-path",
        env = "BERTH_ALLOW_HOST_PATH",
        value_name = "DIR",
        value_delimiter = ','
    )]
    #[serde(rename = "allow-host-path")]
    host_paths: Option<Vec<PathBuf>>,
    /// A directory whose files may be images (`oci:/…`, `docker-archive:/…`) [default: none, with --dev all]; may be
    /// repeated
    #[arg(
        long = "allow-image-path",
        env = "BERTH_ALLOW_IMAGE_PATH",
        value_name = "DIR",
        value_delimiter = ','
    )]
    #[serde(rename = "allow-image-path")]
    image_paths: Option<Vec<PathBuf>>,
    /// A capability that jobs may have beyond the default set, as `NET_ADMIN`; may be repeated
    #[arg(
        long = "allow-capability",
        env = "BERTH_ALLOW_CAPABILITY",
        value_name = "NAME",
        value_delimiter = ','
    )]
    #[serde(rename = "allow-capability")]
    capabilities: Option<Vec<String>>,
    /// Let jobs share this machine's own network (`network: host`): its loopback, and all that listens there [default: no,
    /// with --dev yes]
    #[arg(long, env = "BERTH_ALLOW_HOST_NETWORK", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    allow_host_network: Option<bool>,
    /// Let pods on the bridge reach the addresses at which a cloud gives this machine its keys (169.254.169.254 and others)
    #[arg(long, env = "BERTH_ALLOW_METADATA", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    allow_metadata: Option<bool>,
    /// A TCP port of this machine that pods on the bridge may reach [default: none]; may be repeated
    #[arg(
        long = "allow-node-port",
        env = "BERTH_ALLOW_NODE_PORT",
        value_name = "PORT",
        value_delimiter = ','
    )]
    #[serde(rename = "allow-node-port")]
    node_ports: Option<Vec<u16>>,
    /// The CRIU to use [default: the first that works of criu/criu beside this program, /usr/lib/berth/criu/criu, PATH]
    #[arg(long, env = "BERTH_CRIU", value_name = "PATH")]
    criu: Option<PathBuf>,
    /// Give pods users of their own, where docs/security.md does not say otherwise [default: true]
    #[arg(long, env = "BERTH_USER_NAMESPACES", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    user_namespaces: Option<bool>,
    /// Offer this much instead of the whole machine, as `cpu=2,memory=4Gi`
    #[arg(long, env = "BERTH_CAPACITY", value_name = "AMOUNTS")]
    capacity: Option<String>,
    /// Keep this much for the system, as `cpu=100m,memory=256Mi`
    #[arg(long, env = "BERTH_RESERVED", value_name = "AMOUNTS")]
    reserved: Option<String>,
    /// Mirrors of a registry, as `docker.io=http://mirror:5000`; may be repeated
    #[arg(
        long = "registry-mirror",
        env = "BERTH_REGISTRY_MIRROR",
        value_name = "HOST=URL",
        value_delimiter = ','
    )]
    #[serde(rename = "registry-mirror")]
    mirrors: Option<Vec<String>>,
    /// A registry reached over plain HTTP (loopback always is); may be repeated
    #[arg(
        long = "registry-insecure",
        env = "BERTH_REGISTRY_INSECURE",
        value_name = "HOST",
        value_delimiter = ','
    )]
    #[serde(rename = "registry-insecure")]
    insecure: Option<Vec<String>>,
    /// Credentials for registries, in the form of docker's config.json
    #[arg(long, env = "BERTH_REGISTRY_AUTH", value_name = "FILE")]
    registry_auth: Option<PathBuf>,
    /// Log of one pod at most; the oldest part goes first [default: 16Mi]
    #[arg(long, env = "BERTH_LOG_MAX", value_name = "SIZE")]
    log_max: Option<String>,
    /// Bytes a second that each transfer of a checkpoint may take of the network, as `100Mi` [default: no bound]
    #[arg(long, env = "BERTH_CHECKPOINT_RATE", value_name = "SIZE")]
    checkpoint_rate: Option<String>,
    /// Give other nodes there what this one keeps of checkpoints, so that a move need not fetch it from the depot [default:
    /// nowhere]
    #[arg(long, env = "BERTH_LISTEN_CHUNKS", value_name = "ADDRESS:PORT")]
    listen_chunks: Option<SocketAddr>,
    /// All that a pod may write outside its volumes, on the node's disk [default: no bound]
    #[arg(long, env = "BERTH_SCRATCH_MAX", value_name = "SIZE")]
    scratch_max: Option<String>,
    /// A file whose being there says that this machine is about to go, as a spot instance does: its pods are saved and go
    /// elsewhere. It may hold a time (RFC 3339) or a span (`90s`), as text or as JSON's `time`
    #[arg(long, env = "BERTH_NOTICE_FILE", value_name = "PATH")]
    notice_file: Option<PathBuf>,
    /// An address (http://…) that says the same by answering 200 with anything but nothing, FALSE or NONE
    #[arg(long, env = "BERTH_NOTICE_URL", value_name = "URL")]
    notice_url: Option<String>,
    /// How soon the machine goes where the notice does not say [default: 30s]
    #[arg(long, env = "BERTH_NOTICE_WITHIN", value_name = "SPAN")]
    notice_within: Option<String>,
    /// How long a shutdown of the machine may wait for pods to be saved; 0s: not at all [default: 60s]
    #[arg(long, env = "BERTH_SHUTDOWN_GRACE", value_name = "SPAN")]
    shutdown_grace: Option<String>,
    /// For one person's machine and for tests: no certificates, host images allowed, the broker on loopback; with a CIDR the
    /// broker in that test network
    #[arg(
        long,
        env = "BERTH_DEV",
        value_name = "CIDR",
        num_args = 0..=1,
        default_missing_value = "true",
        require_equals = true
    )]
    #[serde(deserialize_with = "switch_or_text")]
    dev: Option<String>,
}

#[derive(Debug, Clone)]
pub struct Config {
    pub data_dir: PathBuf,
    /// Of the cluster that this node joined; none with `--dev`.
    pub membership: Option<Membership>,
    pub cluster: ClusterName,
    pub broker: BrokerUrl,
    pub node: NodeId,
    pub labels: BTreeMap<String, String>,
    pub taints: BTreeSet<String>,
    /// What no order can widen.
    pub policy: NodePolicy,
    pub reach: Reach,
    pub criu: Option<PathBuf>,
    /// Pods may have users of their own.
    pub user_namespaces: bool,
    pub capacity: Amounts,
    pub reserved: Amounts,
    pub mirrors: BTreeMap<String, Vec<String>>,
    pub insecure: Vec<String>,
    pub registry_auth: Option<PathBuf>,
    pub log_bytes_max: Bytes,
    /// Zero: no bound.
    pub checkpoint_rate: Bytes,
    /// Where other nodes are given chunks.
    pub listen_chunks: Option<SocketAddr>,
    /// Zero: no bound.
    pub scratch_bytes_max: Bytes,
    /// What says that the machine is about to go.
    pub notices: Vec<Source>,
    /// What a notice without a time means.
    pub notice_within: Millis,
    /// Zero: pods are not saved when the machine shuts down.
    pub shutdown_grace: Millis,
}

/// `true`, `false` or a text, in a file.
fn switch_or_text<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Switch(bool),
        Text(String),
    }
    Ok(Some(match Either::deserialize(from)? {
        Either::Switch(on) => on.to_string(),
        Either::Text(text) => text,
    }))
}

/// CPU and memory, each where it was named.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amounts {
    pub cpu: Option<MilliCpu>,
    pub memory: Option<Bytes>,
}

impl Amounts {
    fn parse(text: &str) -> Result<Self> {
        let mut amounts = Self::default();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            match part.split_once('=') {
                Some(("cpu", value)) => amounts.cpu = Some(MilliCpu::parse(value)?),
                Some(("memory", value)) => amounts.memory = Some(Bytes::parse(value)?),
                _ => bail!("`{part}` is not an amount: write cpu=2,memory=4Gi"),
            }
        }
        Ok(amounts)
    }
}

/// This machine's name as a node's.
pub fn host_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    node_name(host.trim())
}

/// The host's name as a node's: lowercased, other characters become `-`.
fn node_name(host: &str) -> String {
    let name: String = host
        .chars()
        .map(|c| c.to_ascii_lowercase())
        .map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' })
        .take(63)
        .collect();
    let name = name.trim_matches('-');
    if name.is_empty() { "node".into() } else { name.into() }
}

fn pairs(what: &str, items: Vec<String>) -> Result<Vec<(String, String)>> {
    items
        .into_iter()
        .map(|item| match item.split_once('=') {
            Some((key, value)) if !key.is_empty() && item.len() <= LABEL_BYTES_MAX => {
                Ok((key.to_owned(), value.to_owned()))
            }
            _ => bail!("`{item}` is not a {what}: write NAME=VALUE, at most {LABEL_BYTES_MAX} bytes"),
        })
        .collect()
}

/// The network of `--dev=CIDR`, as a test of addresses.
fn dev_network(cidr: &str) -> Result<impl Fn(Ipv4Addr) -> bool> {
    let (network, bits) = cidr.split_once('/').unwrap_or((cidr, "32"));
    let network: Ipv4Addr = network.parse().with_context(|| format!("--dev={cidr}: not a network"))?;
    let bits: u32 = bits.parse().ok().filter(|bits| *bits <= 32).context("--dev: a prefix is 0 to 32")?;
    let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
    Ok(move |ip: Ipv4Addr| u32::from(ip) & mask == u32::from(network) & mask)
}

/// Why a broker's address is not one that `--dev` may use.
fn check_dev(cidr: &str, broker: &BrokerUrl) -> Result<()> {
    let inside = dev_network(cidr)?;
    let near = |host: &str| matches!(host, "localhost" | "::1") || host.parse().is_ok_and(&inside);
    if broker.hosts().iter().all(|(host, _)| near(host)) {
        return Ok(());
    }
    bail!(
        "--dev trusts whoever reaches the broker, so it is for loopback only; {broker} is not in {cidr} \
         (for a test network: --dev=CIDR)"
    )
}

/// Why chunks may not be served there.
fn check_dev_listens(cidr: &str, address: SocketAddr) -> Result<()> {
    let inside = match address.ip() {
        IpAddr::V4(ip) => dev_network(cidr)?(ip),
        IpAddr::V6(ip) => ip.is_loopback(),
    };
    if inside && !address.ip().is_unspecified() {
        return Ok(());
    }
    bail!("--listen-chunks {address} is not an address of this machine in {cidr}, where --dev may listen")
}

impl Config {
    pub fn from_args(args: Args) -> Result<Self> {
        let file = match &args.config {
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                toml::from_str(&text).with_context(|| format!("{} is not valid", path.display()))?
            }
            None => Settings::default(),
        };
        let set = args.settings;
        macro_rules! pick {
            ($name:ident) => {
                set.$name.or(file.$name)
            };
        }
        let broker = pick!(broker).as_deref().map(BrokerUrl::parse).transpose()?;
        let dev = match pick!(dev).as_deref() {
            None | Some("false") => None,
            Some("true") => Some("127.0.0.0/8".to_owned()),
            Some(cidr) => Some(cidr.to_owned()),
        };
        let data_dir = pick!(data_dir).unwrap_or_else(|| DATA_DIR.into());
        let membership = identity::membership(&data_dir)?;
        let (cluster, node) = (pick!(cluster), pick!(node));
        let (broker, cluster, node) = match (&dev, &membership) {
            (Some(_), Some(membership)) => bail!(
                "this machine has joined the cluster {}, and --dev (or dev = true in the configuration) would let everybody \
                 direct it: take that away",
                membership.cluster
            ),
            (Some(cidr), None) => {
                let broker = broker.unwrap_or_default();
                check_dev(cidr, &broker)?;
                (broker, cluster.unwrap_or_else(|| "default".into()), node.unwrap_or_else(host_name))
            }
            (None, None) => bail!(
                "this machine belongs to no cluster: run the line that `berth node token` prints at the controller \
                 (`berth-agent join …`); for one person's machine pass --dev, which trusts whoever reaches the broker"
            ),
            (None, Some(membership)) => {
                let (joined, own) = (membership.cluster.to_string(), membership.party.to_string());
                for (flag, said, is) in [("--cluster", &cluster, &joined), ("--node", &node, &own)] {
                    if let Some(said) = said.as_ref().filter(|said| *said != is) {
                        bail!("{flag} {said}: this machine has joined as {own} of the cluster {joined}");
                    }
                }
                let broker = broker.map_or_else(|| BrokerUrl::parse(&membership.broker), Ok)?;
                if !broker.is_tls() {
                    bail!("--broker {broker} speaks in plain: write mqtts://HOST:PORT");
                }
                (broker, joined, own)
            }
        };
        let labels: BTreeMap<_, _> = pairs("label", pick!(labels).unwrap_or_default())?.into_iter().collect();
        let taints: BTreeSet<_> = pick!(taints).unwrap_or_default().into_iter().collect();
        if labels.len() + taints.len() > LABELS_PER_NODE_MAX {
            bail!("at most {LABELS_PER_NODE_MAX} labels and taints together");
        }
        let mut mirrors = BTreeMap::<String, Vec<String>>::new();
        for (host, url) in pairs("mirror", pick!(mirrors).unwrap_or_default())? {
            mirrors.entry(host).or_default().push(url);
        }
        let span = |text: Option<String>, default| text.map_or(Ok(default), |text| Millis::parse(&text));
        let mut notices: Vec<Source> = pick!(notice_file).map(Source::File).into_iter().collect();
        if let Some(url) = pick!(notice_url) {
            notices.push(Source::url(&url).map_err(|why| anyhow::anyhow!("--notice-url {url}: {why}"))?);
        }
        let listen_chunks = pick!(listen_chunks);
        if let (Some(address), Some(cidr)) = (listen_chunks, &dev) {
            check_dev_listens(cidr, address)?;
        }
        let allowed = policy::Flags {
            host_image: pick!(allow_host_image),
            host_paths: pick!(host_paths),
            image_paths: pick!(image_paths),
            capabilities: pick!(capabilities),
            host_network: pick!(allow_host_network),
        };
        let policy = policy::choose(pick!(policy), Path::new(policy::FILE), allowed, dev.is_some())?;
        let log_max = pick!(log_max).unwrap_or_else(|| "16Mi".into());
        Ok(Self {
            data_dir,
            membership,
            cluster: ClusterName::parse(&cluster)?,
            broker,
            node: NodeId::parse(&node).context("--node")?,
            labels,
            taints,
            policy,
            reach: Reach {
                metadata: pick!(allow_metadata).unwrap_or(false),
                node_ports: pick!(node_ports).unwrap_or_default(),
            },
            criu: pick!(criu),
            user_namespaces: pick!(user_namespaces).unwrap_or(true),
            capacity: Amounts::parse(&pick!(capacity).unwrap_or_default()).context("--capacity")?,
            reserved: Amounts::parse(&pick!(reserved).unwrap_or_default()).context("--reserved")?,
            mirrors,
            insecure: pick!(insecure).unwrap_or_default(),
            registry_auth: pick!(registry_auth),
            log_bytes_max: Bytes::parse(&log_max).context("--log-max")?,
            checkpoint_rate: match pick!(checkpoint_rate) {
                Some(rate) => Bytes::parse(&rate).context("--checkpoint-rate")?,
                None => Bytes::ZERO,
            },
            listen_chunks,
            scratch_bytes_max: pick!(scratch_max)
                .map_or(Ok(Bytes::ZERO), |size| Bytes::parse(&size))
                .context("--scratch-max")?,
            notices,
            notice_within: span(pick!(notice_within), NOTICE_WITHIN).context("--notice-within")?,
            shutdown_grace: span(pick!(shutdown_grace), SHUTDOWN_GRACE).context("--shutdown-grace")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(args: &[&str]) -> Result<Config> {
        Config::from_args(Args::parse_from(std::iter::once(&"berth-agent").chain(args)))
    }

    #[test]
    fn host_names_become_node_names() {
        for (host, node) in [("Box.lab", "box-lab"), ("_x_", "x"), ("", "node"), ("a", "a")] {
            assert_eq!(node_name(host), node);
        }
    }

    #[test]
    fn dev_stays_on_loopback() {
        assert!(config(&["--dev"]).is_ok());
        assert!(config(&["--dev", "--broker", "mqtt://localhost:1883"]).is_ok());
        assert!(config(&["--dev", "--broker", "mqtt://10.0.0.1:1883"]).is_err());
        assert!(config(&["--dev=10.0.0.0/8", "--broker", "mqtt://10.0.0.1:1883"]).is_ok());
        for (flag, serves) in
            [("--dev", "127.0.0.1:0"), ("--dev", "[::1]:1"), ("--dev=10.0.0.0/8", "10.1.2.3:7421")]
        {
            let config = config(&[flag, "--broker", "mqtt://localhost", "--listen-chunks", serves]).unwrap();
            assert_eq!(config.listen_chunks, Some(serves.parse().unwrap()));
        }
        for (flag, serves) in [("--dev", "10.1.2.3:1"), ("--dev=0.0.0.0/0", "0.0.0.0:1"), ("--dev", "[::]:1")]
        {
            assert!(config(&[flag, "--listen-chunks", serves]).is_err(), "{serves}");
        }
        let refused = config(&[]).unwrap_err().to_string();
        assert!(refused.contains("--dev"), "{refused}");
    }

    #[test]
    fn flags_go_before_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        std::fs::write(
            &path,
            "node = \"one\"\nlabel = [\"a=b\"]\ncapacity = \"cpu=2,memory=4Gi\"\ndev = true\n",
        )
        .unwrap();
        let path = path.to_str().unwrap();
        let got = config(&["--config", path, "--node", "two"]).unwrap();
        assert_eq!(got.node.as_str(), "two");
        assert_eq!(got.labels["a"], "b");
        assert_eq!(got.capacity.cpu, Some(MilliCpu(2000)));
        std::fs::write(path, "nodes = \"one\"").unwrap();
        let wrong = format!("{:#}", config(&["--config", path]).unwrap_err());
        assert!(wrong.contains("nodes") && wrong.contains("node"), "{wrong}");
    }
}
