//! `berth-controller init`: a cluster whose members have certificates. It makes the store, whose secret is the CA's and the
//! controller's keys, the root, the configuration, and the first admin; it overwrites nothing.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use berth_protocol::delegation::{Delegation, LIFE};
use berth_protocol::ids::{ClusterName, UserName};
use berth_protocol::sign::{Key, SEED_BYTES};
use berth_protocol::tls::Party;
use clap::Args;
use tokio::sync::watch;

use crate::cli::identity::{ADMIN, Identity};
use crate::cli::root;
use crate::config::{Config, ConfigError, Flags, Setup};
use crate::core::keys::{self, SigningKey};
use crate::core::{Write, members};
use crate::io::ca::{Ca, CaError};
use crate::io::store::{Op, Store, StoreError};
use crate::io::vault::Vault;
use crate::io::{clock, random};
use crate::run;

const CONFIG: &str = "/etc/berth/controller.toml";
/// Beside it.
const ROOT: &str = "root.key";
/// What the package puts there, for one person's machine.
const SAMPLE: &str = include_str!("../../systemd/controller.toml");
/// The package's unit lets nobody but this machine in.
const DROP_IN: &str = "/etc/systemd/system/berth-controller.service.d/cluster.conf";
const DROP_IN_TEXT: &str = "# Written by `berth-controller init`: members of the cluster come over the network, with certificates.\n[Service]\nIPAddressAllow=any\n";

#[derive(Debug, Args)]
pub struct Init {
    #[command(flatten)]
    setup: Setup,
    /// The configuration to write
    #[arg(long, value_name = "FILE", default_value = CONFIG)]
    config: PathBuf,
    /// The first admin: a user of the machine that can read the directory below
    #[arg(long, value_name = "NAME", default_value = "admin")]
    admin: UserName,
    /// Where the first admin's key goes; root's `berth` finds it where it is by default
    #[arg(long, value_name = "DIR", default_value = ADMIN)]
    admin_dir: PathBuf,
    /// Where the root goes, which names the controller's keys: to be moved off this machine [default: root.key beside the
    /// configuration]
    #[arg(long, value_name = "FILE")]
    root: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error(
        "{0} is there already, and nothing was changed: a cluster is set up once. To begin anew, stop the controller and move \
         it, the data directory and {ADMIN} away"
    )]
    Exists(PathBuf),
    #[error(
        "the store in {0} has a cluster's members already, and nothing was changed: to begin anew, stop the controller and \
         move it away"
    )]
    Used(PathBuf),
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot draw random numbers")]
    Random(#[source] io::Error),
    #[error("cannot write the admin's key: {0:#}")]
    Admin(anyhow::Error),
}

/// The directory that a file goes into.
fn make_way(path: &Path) -> Result<(), InitError> {
    let Some(parent) = path.parent().filter(|parent| *parent != Path::new("")) else { return Ok(()) };
    let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(parent);
    made.map_err(|source| InitError::Write { path: path.to_owned(), source })
}

fn write(path: &Path, text: &str) -> Result<(), InitError> {
    make_way(path)?;
    fs::write(path, text).map_err(|source| InitError::Write { path: path.to_owned(), source })
}

/// The first key that signs orders, as this root names it.
fn named(
    cluster: &ClusterName,
    secret: &[u8; 32],
    root: &[u8; SEED_BYTES],
    signing: &[u8; SEED_BYTES],
) -> io::Result<SigningKey> {
    let (root, key) = (Key::from_seed(root), Key::from_seed(signing).public());
    let delegation = Delegation::new(&root, cluster, key, None, clock::now().wall, LIFE);
    Ok(SigningKey { root: root.public(), delegation, sealed: Vault::of(secret).seal_seed(signing)? })
}

impl Init {
    /// What is told to the operator.
    pub async fn run(self) -> Result<String, InitError> {
        let text = self.setup.file();
        // What a controller would find wrong with it is found before anything is made.
        let config = Config::resolve(Flags::of(self.setup))?;
        let taken = fs::read_to_string(&self.config).is_ok_and(|text| text != SAMPLE);
        if taken {
            return Err(InitError::Exists(self.config));
        }
        if self.admin_dir.exists() {
            return Err(InitError::Exists(self.admin_dir));
        }
        let root_file = self.root.unwrap_or_else(|| self.config.with_file_name(ROOT));
        if root_file.exists() {
            return Err(InitError::Exists(root_file));
        }
        let mut store = Store::open(&config.store, &config.data_dir, &config.cluster).await?;
        let term = store.campaign().await?;
        if members::are_in(&store.list().await?) {
            return Err(InitError::Used(config.data_dir));
        }
        let seed: [u8; SEED_BYTES] = random::bytes().map_err(InitError::Random)?;
        let (key, party) = (Key::from_seed(&seed), Party::User(self.admin));
        let secret = store.identity().secret;
        let ca = Ca::of(&secret, &config.cluster)?;
        let (root, signing): ([u8; SEED_BYTES], [u8; SEED_BYTES]) =
            (random::bytes().map_err(InitError::Random)?, random::bytes().map_err(InitError::Random)?);
        let signing_key = named(&config.cluster, &secret, &root, &signing).map_err(InitError::Random)?;
        let told = watch::channel(Some(signing_key.delegation.clone())).1;
        let about = run::about(&config, signing_key.root, told).ok_or(ConfigError::NoIdentity)?;
        let membership = about.membership(&ca, &party, &key.public())?;
        let records = [members::first_admin(&party, key.public(), clock::now()), keys::stored(&signing_key)];
        let put = |record: Write| record.value.map(|value| Op::Put { key: record.key, value });
        Identity::new(&self.admin_dir, membership.clone(), key).save(&seed).map_err(InitError::Admin)?;
        make_way(&root_file)?;
        root::save(&root_file, &config.cluster, root)
            .map_err(|source| InitError::Write { path: root_file.clone(), source })?;
        store.txn(term, records.into_iter().filter_map(put).collect()).await?;
        store.resign().await;
        write(&self.config, &text)?;

        let mut told = format!(
            "cluster {}: members reach it at {} and {}\n\
             {} the configuration\n\
             {} the records, with the keys of the CA and of the controller: back it up (`berth-controller backup`)\n\
             {} the root, by which members know the controller's key, and in no backup of the store: move it to a stick or a \
             machine that is switched off, and copy it to a second one; it is needed to replace that key, before {}\n\
             {} the key of {}, the first admin",
            config.cluster,
            membership.broker,
            membership.url,
            self.config.display(),
            config.data_dir.display(),
            root_file.display(),
            signing_key.delegation.expires,
            self.admin_dir.display(),
            party.to_string().trim_start_matches("user:"),
        );
        if self.config == Path::new(CONFIG) && Path::new("/run/systemd/system").exists() {
            write(Path::new(DROP_IN), DROP_IN_TEXT)?;
            let _ = write!(
                told,
                "\n{DROP_IN} lets the network reach the service\n\
                 next: systemctl daemon-reload && systemctl enable --now berth-controller && berth node token"
            );
        } else {
            let _ = write!(told, "\nnext: berth-controller --config {}", self.config.display());
        }
        Ok(told)
    }
}
