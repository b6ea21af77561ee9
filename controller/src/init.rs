//! `berth-controller init`: a cluster whose members have certificates. It makes the store, whose secret is the CA's and the
//! controller's keys, the configuration, and the first admin; it overwrites nothing.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use berth_protocol::ids::UserName;
use berth_protocol::sign::{Key, SEED_BYTES};
use berth_protocol::tls::Party;
use clap::Args;

use crate::cli::identity::{ADMIN, Identity};
use crate::config::{Config, ConfigError, Flags, Setup};
use crate::core::members;
use crate::io::ca::{Ca, CaError};
use crate::io::store::{Op, Store, StoreError};
use crate::io::{clock, random};
use crate::run;

const CONFIG: &str = "/etc/berth/controller.toml";
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

fn write(path: &Path, text: &str) -> Result<(), InitError> {
    let failed = |source| InitError::Write { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(failed)?;
    }
    fs::write(path, text).map_err(failed)
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
        let mut store = Store::open(&config.store, &config.data_dir, &config.cluster).await?;
        let term = store.campaign().await?;
        if members::are_in(&store.list().await?) {
            return Err(InitError::Used(config.data_dir));
        }
        let seed: [u8; SEED_BYTES] = random::bytes().map_err(InitError::Random)?;
        let (key, party) = (Key::from_seed(&seed), Party::User(self.admin));
        let secret = store.identity().secret;
        let ca = Ca::of(&secret, &config.cluster)?;
        let signer = run::signer(&config.cluster, &secret);
        let about = run::about(&config, signer.public()).ok_or(ConfigError::NoIdentity)?;
        let membership = about.membership(&ca, &party, &key.public())?;
        let member = members::first_admin(&party, key.public(), clock::now());
        let put = member.value.map(|value| Op::Put { key: member.key, value });
        Identity::new(&self.admin_dir, membership.clone(), key).save(&seed).map_err(InitError::Admin)?;
        store.txn(term, put.into_iter().collect()).await?;
        store.resign().await;
        write(&self.config, &text)?;

        let mut told = format!(
            "cluster {}: members reach it at {} and {}\n\
             {} the configuration\n\
             {} the records, with the keys of the CA and of the controller: back it up (`berth-controller backup`)\n\
             {} the key of {}, the first admin",
            config.cluster,
            membership.broker,
            membership.url,
            self.config.display(),
            config.data_dir.display(),
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
