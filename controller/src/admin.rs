//! What an operator does with a store: check it, back it up, put a backup in its place, move its records.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use berth_protocol::ids::{ClusterName, Term};
use clap::{Args, Subcommand};

use crate::broker_config::{BrokerConfig, BrokerConfigError};
use crate::config::{ConfigError, Place};
use crate::core::{LoadError, SetAside, keys, restored};
use crate::init::{Init, InitError};
use crate::io::clock;
use crate::io::store::{self, Contents, Op, Store, StoreChoice, StoreError};

#[derive(Debug, Subcommand)]
pub enum Admin {
    /// Set up a cluster whose members have certificates: keys, configuration, the first admin
    Init(Box<Init>),
    /// Write what a broker that is not the controller's needs to let members in: configuration, access rules, certificate
    BrokerConfig(Box<BrokerConfig>),
    /// Check every record of the store; it may be in use
    Fsck {
        #[command(flatten)]
        place: Place,
        /// Give up what cannot be read, and whole jobs with it; the controller must be stopped
        #[arg(long)]
        repair: bool,
    },
    /// Copy the store, as of one moment, to a new file; it may be in use
    Backup {
        #[command(flatten)]
        place: Place,
        file: PathBuf,
    },
    /// Put a backup in the store's place, which is kept beside it; the controller must be stopped
    Restore {
        #[command(flatten)]
        place: Place,
        file: PathBuf,
    },
    /// Move the records to another store, `embedded` or etcd://…; the controller must be stopped
    MigrateStore(Migration),
}

#[derive(Debug, Args)]
pub struct Migration {
    #[command(flatten)]
    place: Place,
    /// Where to: `embedded`, in the data directory, or etcd://HOST:PORT[,HOST:PORT…]
    #[arg(long, value_name = "STORE")]
    to: String,
}

#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error(transparent)]
    Init(#[from] InitError),
    #[error(transparent)]
    BrokerConfig(#[from] BrokerConfigError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the records cannot be understood")]
    Load(#[from] LoadError),
    #[error("there is no file {0}")]
    NotThere(PathBuf),
    #[error(
        "{file} is no backup that `berth-controller backup` has written whole ({finding}): name another; nothing was changed"
    )]
    NoBackup { file: PathBuf, finding: String },
    #[error("{0} is there already: name a file that is not")]
    Exists(PathBuf),
    #[error("the records are in {0} already")]
    Same(StoreChoice),
    #[error(
        "{0} records of the store are damaged, and would be left behind: `berth-controller fsck` says which"
    )]
    Damaged(usize),
    #[error(
        "a backup takes the place of an embedded store alone: restore it there, then move it by migrate-store"
    )]
    NotEmbedded,
}

impl Admin {
    /// What is told to the operator; false: the store needs attention.
    pub async fn run(self) -> Result<(String, bool), AdminError> {
        match self {
            Self::Init(init) => Ok((init.run().await?, true)),
            Self::BrokerConfig(config) => Ok((config.run().await?, true)),
            Self::Fsck { place, repair } => {
                let (choice, dir, cluster) = place.resolve()?;
                if repair { fix(&choice, &dir, &cluster).await } else { check(&choice, &dir, &cluster).await }
            }
            Self::Backup { place, file } => {
                let (choice, dir, cluster) = place.resolve()?;
                backup(&choice, &dir, &cluster, &file).await
            }
            Self::Restore { place, file } => {
                let (choice, dir, _) = place.resolve()?;
                if choice != StoreChoice::Embedded {
                    return Err(AdminError::NotEmbedded);
                }
                restore(&dir, &file)
            }
            Self::MigrateStore(Migration { place, to }) => {
                let (from, dir, cluster) = place.resolve()?;
                let to = StoreChoice::parse(&to).map_err(ConfigError::from)?;
                migrate(&from, &to, &dir, &cluster).await
            }
        }
    }
}

async fn check(
    choice: &StoreChoice,
    dir: &Path,
    cluster: &ClusterName,
) -> Result<(String, bool), AdminError> {
    let structure = match choice {
        StoreChoice::Embedded => store::structure(dir)?,
        StoreChoice::Etcd(_) => Vec::new(),
    };
    let mut told: Vec<String> =
        structure.iter().map(|finding| format!("the file's structure: {finding}")).collect();
    let contents =
        if structure.is_empty() { store::read(choice, dir, cluster).await? } else { store::salvage(dir)? };
    let aside = SetAside::of(&contents.entries, clock::now())?;
    told.extend(aside.damaged.iter().map(|key| format!("damaged: {key}")));
    told.extend(aside.jobs.iter().map(|uid| format!("set aside: {}", named(uid.as_str(), &contents))));
    let sound = told.is_empty();
    let count = contents.entries.len();
    told.push(if sound {
        format!("{count} records, all sound; store {}, term {}", contents.identity.id, contents.term)
    } else {
        format!(
            "{count} records could be read or named; put a backup in their place with `berth-controller restore`, or \
             give up what is damaged with `berth-controller fsck --repair`"
        )
    });
    Ok((told.join("\n"), sound))
}

/// A job as its user calls it, where its file can be read.
fn named(uid: &str, contents: &Contents) -> String {
    let key = format!("job/{uid}");
    let file = contents.entries.iter().find(|(other, _)| *other == key).and_then(|(_, value)| value.as_ref());
    let file: Option<serde_json::Value> = file.and_then(|value| serde_json::from_slice(value).ok());
    let text = |field: &str| file.as_ref()?.get("spec")?.get(field)?.as_str().map(str::to_owned);
    match (text("namespace"), text("name")) {
        (Some(namespace), Some(name)) => format!("job {namespace}/{name} (uid {uid})"),
        _ => format!("the job with uid {uid}, whose file cannot be read"),
    }
}

async fn fix(choice: &StoreChoice, dir: &Path, cluster: &ClusterName) -> Result<(String, bool), AdminError> {
    let mut told = Vec::new();
    if *choice == StoreChoice::Embedded && !store::structure(dir)?.is_empty() {
        let _lock = store::lock(dir)?;
        let kept = store::replace(dir, &store::salvage(dir)?)?;
        let kept = kept.unwrap_or_default();
        told.push(format!("what could be read is in a new file; the damaged one is {}", kept.display()));
    }
    let mut open = Store::open(choice, dir, cluster).await?;
    let term = open.campaign().await?;
    let entries = open.list().await?;
    let aside = SetAside::of(&entries, clock::now())?;
    let contents = Contents { identity: open.identity().clone(), term, entries };
    told.extend(aside.jobs.iter().map(|uid| format!("given up: {}", named(uid.as_str(), &contents))));
    let lost: BTreeSet<&String> = aside.damaged.iter().collect();
    let goes = |key: &String| {
        let (kind, name) = key.split_once('/').unwrap_or((key, ""));
        let uid = name.split_once('/').map_or(name, |(uid, _)| uid);
        match kind {
            "job" | "run" | "pod" => aside.jobs.iter().any(|job| job.as_str() == uid),
            // The node's next hello writes it anew; until then it says that pods are there. Without the key that signs orders
            // members would be told of another root.
            "node" | "key" => false,
            _ => lost.contains(key),
        }
    };
    let ops: Vec<Op> = contents
        .entries
        .iter()
        .filter(|(key, _)| goes(key))
        .map(|(key, _)| Op::Delete { key: key.clone() })
        .collect();
    told.push(format!("{} records removed, {} kept", ops.len(), contents.entries.len() - ops.len()));
    open.txn(term, ops).await?;
    open.resign().await;
    Ok((told.join("\n"), true))
}

async fn backup(
    choice: &StoreChoice,
    dir: &Path,
    cluster: &ClusterName,
    file: &Path,
) -> Result<(String, bool), AdminError> {
    if file.exists() {
        return Err(AdminError::Exists(file.to_owned()));
    }
    let contents = store::read(choice, dir, cluster).await?;
    let damaged = contents.entries.iter().filter(|(_, value)| value.is_none()).count();
    store::write(file, &contents)?;
    let whole = contents.entries.len() - damaged;
    let told = format!("{whole} records of store {} in {}", contents.identity.id, file.display());
    if damaged == 0 {
        return Ok((told, true));
    }
    Ok((format!("{told}\n{damaged} damaged ones were left out: `berth-controller fsck` says which"), false))
}

fn restore(dir: &Path, file: &Path) -> Result<(String, bool), AdminError> {
    let mut contents = store::read_file(file).map_err(|error| match error {
        StoreError::Damaged { finding, .. } => AdminError::NoBackup { file: file.to_owned(), finding },
        StoreError::Missing { path } => AdminError::NotThere(path),
        other => other.into(),
    })?;
    contents.term = Term(contents.term.0 + restored::TERMS);
    let (key, value) = restored::entry(&contents.entries, clock::now())?;
    contents.entries.retain(|(known, _)| *known != key);
    contents.entries.push((key, Some(value)));
    let _lock = store::lock(dir)?;
    let kept = store::replace(dir, &contents)?;
    let mut told = vec![format!("{} records restored", contents.entries.len())];
    told.extend(kept.map(|kept| format!("what was there is kept as {}", kept.display())));
    told.push(
        "what happened since the backup they do not know: nodes tell what they hold as they say hello, and nothing is placed \
         for a minute after the controller's start"
            .to_owned(),
    );
    if keys::in_entries(&contents.entries).is_ok_and(|key| key.is_some()) {
        told.push(
            "if the controller's key was rotated since, nodes refuse the one that is back: `berth keys rotate` once more"
                .to_owned(),
        );
    }
    Ok((told.join("\n"), true))
}

async fn migrate(
    from: &StoreChoice,
    to: &StoreChoice,
    dir: &Path,
    cluster: &ClusterName,
) -> Result<(String, bool), AdminError> {
    if from == to {
        return Err(AdminError::Same(to.clone()));
    }
    // It has the data directory's lock, whichever of the two lives there.
    let mut source = Store::open(from, dir, cluster).await?;
    let term = source.campaign().await?;
    let contents = Contents { identity: source.identity().clone(), term, entries: source.list().await? };
    let damaged = contents.entries.iter().filter(|(_, value)| value.is_none()).count();
    if damaged > 0 {
        return Err(AdminError::Damaged(damaged));
    }
    // Broken off here, it is done again: the source is what it was.
    store::fill(to, dir, cluster, &contents).await?;
    source.retire(term, &to.to_string()).await?;
    source.resign().await;
    Ok((
        format!(
            "{} records moved from {from} to {to}; start the controller with --store {to}",
            contents.entries.len()
        ),
        true,
    ))
}
