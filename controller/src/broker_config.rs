//! `berth-controller broker-config`: what a broker that is not the controller's needs to let in this cluster's members alone,
//! and each to what is its own.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use berth_protocol::ids::ClusterName;
use berth_protocol::limits::{MEMBERS_MAX, PACKET_BYTES_MAX};
use berth_protocol::sign::{Key, SEED_BYTES};
use berth_protocol::tls::Party;
use clap::{Args, ValueEnum};

use crate::config::Place;
use crate::core::members::{self, Member};
use crate::io::ca::{self, Ca, CaError};
use crate::io::random;
use crate::io::store::{self, StoreError};

const CONF: &str = "berth.conf";
const ACL: &str = "berth.acl";
const CA: &str = "ca.pem";
const CERTIFICATE: &str = "broker.pem";
const KEY: &str = "broker.key";
/// Whose the broker's processes are, on Debian.
const MOSQUITTO: &str = "mosquitto";
/// Messages that may wait for one client: the controller is to hear all agents at once.
const QUEUED_MAX: usize = 65_536;

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Broker {
    Mosquitto,
}

#[derive(Debug, Args)]
pub struct BrokerConfig {
    /// Which broker
    broker: Broker,
    #[command(flatten)]
    place: Place,
    /// A name or address by which members reach the broker, for its certificate; may be repeated
    #[arg(long = "broker-host", value_name = "HOST", required = true, value_delimiter = ',')]
    hosts: Vec<String>,
    /// Where it is to listen
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:8883")]
    listen: SocketAddr,
    /// Where the files go
    #[arg(long, value_name = "DIR", default_value = "/etc/mosquitto/berth")]
    dir: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum BrokerConfigError {
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error("the cluster has no members yet: `berth-controller init` comes first")]
    NoMembers,
    #[error("a member's record cannot be read: `berth-controller fsck` says more")]
    Member(#[source] serde_json::Error),
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot draw random numbers")]
    Random(#[source] io::Error),
}

impl BrokerConfig {
    /// What is told to the operator.
    pub async fn run(self) -> Result<String, BrokerConfigError> {
        let Self { broker: Broker::Mosquitto, place, hosts, listen, dir } = self;
        let (choice, data_dir, cluster) = place.resolve()?;
        let contents = store::read(&choice, &data_dir, &cluster).await?;
        let members = members::in_entries(&contents.entries).map_err(BrokerConfigError::Member)?;
        if members.is_empty() {
            return Err(BrokerConfigError::NoMembers);
        }
        let ca = Ca::of(&contents.identity.secret, &cluster)?;
        let files = Files::new(dir)?;
        files.write(CA, &ca.pem(), 0o644)?;
        // One that runs keeps what it has.
        if !files.has(KEY) || !files.has(CERTIFICATE) {
            let seed: [u8; SEED_BYTES] = random::bytes().map_err(BrokerConfigError::Random)?;
            let key = Key::from_seed(&seed);
            files.write(KEY, &ca::key_pem(&key)?, 0o600)?;
            files.write(CERTIFICATE, &ca.broker(&key.public(), &hosts)?, 0o644)?;
        }
        files.write(ACL, &acl(&cluster, &members), 0o600)?;
        files.write(CONF, &files.conf(listen), 0o644)?;

        let dir = files.dir.display();
        let host = &hosts[0];
        let port = listen.port();
        let count = members.len();
        Ok(format!(
            "{dir}: configuration, access rules of {count} members, certificate and key of the broker\n\
             next: let the broker read it, and the controller use the broker\n  \
             echo 'include_dir {dir}' >>/etc/mosquitto/mosquitto.conf && systemctl restart mosquitto\n  \
             broker = \"mqtts://{host}:{port}\"      in the controller's configuration\n\
             Run this again, and `systemctl reload mosquitto`, when a member has joined or has other roles: until then a new\n\
             node's live logs, and what a user may hear, are not in the rules"
        ))
    }
}

/// What goes where the broker looks.
struct Files {
    dir: PathBuf,
    /// Whose they are, where that is another.
    owner: Option<(u32, u32)>,
}

impl Files {
    fn new(dir: PathBuf) -> Result<Self, BrokerConfigError> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(&dir);
        made.map_err(|source| BrokerConfigError::Write { path: dir.clone(), source })?;
        // It gives root up before it reads its key.
        let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let mut users = users.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let owner = users
            .find(|fields| fields.first() == Some(&MOSQUITTO))
            .and_then(|fields| Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?)));
        // SAFETY: it asks, and cannot fail.
        let owner = owner.filter(|_| unsafe { libc::geteuid() } == 0);
        let dir = std::path::absolute(&dir).unwrap_or(dir);
        Ok(Self { dir, owner })
    }

    fn has(&self, name: &str) -> bool {
        self.dir.join(name).exists()
    }

    /// As a whole or not at all.
    fn write(&self, name: &str, text: &str, mode: u32) -> Result<(), BrokerConfigError> {
        let (path, new) = (self.dir.join(name), self.dir.join(format!("{name}.new")));
        let written = || {
            let mut file =
                fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
            file.write_all(text.as_bytes())?;
            if let Some((user, group)) = self.owner {
                std::os::unix::fs::chown(&new, Some(user), Some(group))?;
            }
            fs::rename(&new, &path)
        };
        written().map_err(|source| BrokerConfigError::Write { path: path.clone(), source })
    }

    fn conf(&self, listen: SocketAddr) -> String {
        let path = |name: &str| path(&self.dir, name);
        let (ca, certificate, key, acl) = (path(CA), path(CERTIFICATE), path(KEY), path(ACL));
        let (address, port) = (listen.ip(), listen.port());
        format!(
            "# Written by `berth-controller broker-config mosquitto`, and again each time it is run.\n\
             per_listener_settings true\n\
             listener {port} {address}\n\
             cafile {ca}\n\
             certfile {certificate}\n\
             keyfile {key}\n\
             tls_version tlsv1.3\n\
             require_certificate true\n\
             # A certificate's common name is who it is for: berth:controller, a node's name, user:NAME.\n\
             use_identity_as_username true\n\
             allow_anonymous false\n\
             acl_file {acl}\n\
             max_connections {MEMBERS_MAX}\n\
             max_packet_size {PACKET_BYTES_MAX}\n\
             max_queued_messages {QUEUED_MAX}\n\
             max_queued_bytes 0\n\
             set_tcp_nodelay true\n"
        )
    }
}

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).display().to_string()
}

/// What each may say and hear: by patterns what is every node's own, by name what depends on who it is. Names hold letters,
/// digits and `-` alone, so that none is a wildcard (CVE-2017-7650); the file is never empty (CVE-2018-12550).
fn acl<'a>(cluster: &ClusterName, members: impl IntoIterator<Item = (&'a Party, &'a Member)>) -> String {
    let top = format!("berth/v1/{cluster}");
    let mut text = String::from(
        "# Written by `berth-controller broker-config mosquitto`, and again each time it is run.\n\n\
         # A node: what is its own. %u is the name in its certificate.\n",
    );
    for (access, kinds) in
        [("write", ["hello", "heartbeat", "event", "bye"]), ("read", ["desired", "spec", "request", "lease"])]
    {
        for kind in kinds {
            let _ = writeln!(text, "pattern {access} {top}/nodes/%u/{kind}");
        }
    }
    let _ = write!(
        text,
        "\n# Whoever asks for something signs it: the controller knows who may what. Replies are for those who know the\n\
         # name of the client that asked (%c), which is not to be guessed.\n\
         pattern write {top}/jobs/+/+/submit\n\
         pattern write {top}/jobs/+/+/command\n\
         pattern write {top}/query/+/request\n\
         pattern read {top}/query/%c/reply\n\
         pattern read {top}/state/nodes/+\n\
         \nuser {}\ntopic readwrite {top}/#\n",
        Party::Controller
    );
    for (party, member) in members {
        let _ = writeln!(text, "\nuser {party}");
        match party {
            Party::Node(_) => drop(writeln!(text, "topic write {top}/logs/+/+/+")),
            Party::User(_) if member.admin => {
                for topics in ["jobs/+/+/answer", "jobs/+/+/status", "logs/+/+/+"] {
                    let _ = writeln!(text, "topic read {top}/{topics}");
                }
            }
            Party::User(_) => {
                for namespace in member.roles.keys() {
                    let _ = write!(
                        text,
                        "topic read {top}/jobs/{namespace}/+/answer\n\
                         topic read {top}/jobs/{namespace}/+/status\n\
                         topic read {top}/logs/{namespace}/+/+\n"
                    );
                }
            }
            Party::Controller | Party::Broker => {}
        }
    }
    text
}
