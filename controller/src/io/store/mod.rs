//! The controller's records behind one interface: everything is listed once, at the start; every later change is a
//! transaction of the one that leads. What the keys and values mean is the core's.
//!
//! `sqlite` keeps them in a file beside the controller, `etcd` where several controllers reach them.

mod choice;
mod etcd;
mod journal;
pub mod seal;
mod sqlite;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_protocol::ids::{ClusterName, StoreId, Term};
use serde::{Deserialize, Serialize};

pub use self::choice::{EtcdChoice, StoreChoice, StoreChoiceError};
pub use self::etcd::Etcd;
pub use self::sqlite::{Sqlite, lock, replace, write};
use super::random;
use crate::core::AUDIT;

#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    #[error("cannot use the data directory {dir}")]
    Directory { dir: PathBuf, source: Arc<std::io::Error> },
    #[error(
        "the data directory {dir} is in use by another berth-controller: stop that one, or choose another --data-dir"
    )]
    Locked { dir: PathBuf },
    #[error("there is no store {path}: which is its --data-dir?")]
    Missing { path: PathBuf },
    #[error("cannot {action} the store {path} (its disk has failed: the kernel's log says how)")]
    Disk { action: &'static str, path: PathBuf, source: Arc<rusqlite::Error> },
    #[error("cannot {action} the store {path}")]
    Sqlite { action: &'static str, path: PathBuf, source: Arc<rusqlite::Error> },
    #[error(
        "the store {place} is damaged ({finding}): `berth-controller fsck --repair` keeps what can be read, `berth-controller restore` puts a backup in its place"
    )]
    Damaged { place: String, finding: String },
    #[error(
        "the store {path} has layout {found}, this version reads up to {known}: run the version that wrote it"
    )]
    Layout { path: PathBuf, found: i64, known: i64 },
    #[error(
        "the store {place} was moved to {to}: start the controller there, or move the records back with migrate-store"
    )]
    Moved { place: String, to: String },
    #[error("cannot {action} etcd at {members}")]
    Etcd { action: &'static str, members: String, source: Arc<etcd_client::Error> },
    #[error("cannot read {path}, which the store's address names")]
    Certificate { path: PathBuf, source: Arc<std::io::Error> },
    #[error("the store {place} is in use: records are not put in the place of others")]
    Used { place: String },
    #[error("this controller's term {0} is over: another controller leads")]
    Deposed(Term),
    #[error("etcd has not renewed this controller's lead for {0:?}: another may lead")]
    Unrenewed(Duration),
    #[error("{0} transactions wait for the store already")]
    Busy(usize),
    #[error("the store's writer has ended")]
    Closed,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Put { key: String, value: Vec<u8> },
    Delete { key: String },
}

/// Keys, ascending, and their values; none: what is there is not what was written.
pub type Entries = Vec<(String, Option<Vec<u8>>)>;

/// What a store has been given at its creation and keeps, beside its records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub id: StoreId,
    /// Signs the depot's tokens.
    pub secret: [u8; 32],
}

impl Identity {
    fn new() -> Result<Self, StoreError> {
        let id = random::hex::<8>().map_err(no_random)?;
        let id = StoreId::parse(&id).map_err(|error| StoreError::Damaged {
            place: "being made".to_owned(),
            finding: error.to_string(),
        })?;
        Ok(Self { id, secret: random::bytes().map_err(no_random)? })
    }
}

fn no_random(source: std::io::Error) -> StoreError {
    StoreError::Directory { dir: "/dev/urandom".into(), source: Arc::new(source) }
}

/// All that a store holds, as of one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    pub identity: Identity,
    pub term: Term,
    pub entries: Entries,
}

/// What the store holds, whether or not a controller leads meanwhile.
pub async fn read(choice: &StoreChoice, dir: &Path, cluster: &ClusterName) -> Result<Contents, StoreError> {
    match choice {
        StoreChoice::Embedded => sqlite::read(&sqlite::file(dir)),
        StoreChoice::Etcd(etcd) => Etcd::open(etcd, cluster).await?.contents().await,
    }
}

/// What a store's file holds, in use or not: that of a backup as well.
pub fn read_file(file: &Path) -> Result<Contents, StoreError> {
    sqlite::read(file)
}

/// What can be read of a damaged embedded store. The caller has the directory's lock, or only looks.
pub fn salvage(dir: &Path) -> Result<Contents, StoreError> {
    sqlite::salvage(&sqlite::file(dir))
}

/// Findings about the structure of an embedded store's file.
pub fn structure(dir: &Path) -> Result<Vec<String>, StoreError> {
    sqlite::structure(&sqlite::file(dir))
}

/// Puts `contents` in the place of the store that is there, and of no store that has a history of its own. The caller
/// has the data directory's lock.
pub async fn fill(
    choice: &StoreChoice,
    dir: &Path,
    cluster: &ClusterName,
    contents: &Contents,
) -> Result<(), StoreError> {
    match choice {
        StoreChoice::Embedded => sqlite::fill(dir, contents),
        StoreChoice::Etcd(choice) => etcd::fill(choice, cluster, contents).await,
    }
}

/// May `contents` take a store's place? It never had a leader, its records were moved elsewhere, or they are the same
/// store's and no newer.
fn may_replace(identity: &Identity, term: Term, moved: bool, contents: &Contents) -> bool {
    term == Term(0) || moved || *identity == contents.identity && term <= contents.term
}

/// An open store.
pub enum Store {
    Embedded(Sqlite),
    /// With the data directory's lock.
    Etcd(Box<Etcd>, File),
}

impl Store {
    /// `dir` is the data directory, made where missing and locked against a second controller on it.
    pub async fn open(choice: &StoreChoice, dir: &Path, cluster: &ClusterName) -> Result<Self, StoreError> {
        Ok(match choice {
            StoreChoice::Embedded => Self::Embedded(Sqlite::open(dir)?),
            StoreChoice::Etcd(etcd) => {
                let lock = sqlite::lock(dir)?;
                Self::Etcd(Box::new(Etcd::open(etcd, cluster).await?), lock)
            }
        })
    }

    pub fn identity(&self) -> &Identity {
        match self {
            Self::Embedded(store) => store.identity(),
            Self::Etcd(store, _) => store.identity(),
        }
    }

    /// All records but the audit log.
    pub async fn list(&self) -> Result<Entries, StoreError> {
        match self {
            Self::Embedded(store) => store.list().await,
            Self::Etcd(store, _) => store.list().await,
        }
    }

    /// Entries of the audit log before a key, from the latest on, at most so many. One that is damaged is empty.
    pub async fn audit(
        &self,
        before: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        // `0` comes after `/`.
        let before = before.filter(|key| key.starts_with(AUDIT)).unwrap_or("audit0");
        match self {
            Self::Embedded(store) => store.audit(before, limit).await,
            Self::Etcd(store, _) => store.audit(before, limit).await,
        }
    }

    /// Lets entries of the audit log before a key go, not necessarily all at once.
    pub async fn trim_audit(&self, before: &str) -> Result<(), StoreError> {
        match self {
            Self::Embedded(store) => store.trim_audit(before).await,
            Self::Etcd(store, _) => store.trim_audit(before).await,
        }
    }

    /// Applies all `ops`, each on another key, or none where `term` is over (`Deposed`); durable when it returns.
    pub async fn txn(&self, term: Term, ops: Vec<Op>) -> Result<(), StoreError> {
        match self {
            Self::Embedded(store) => store.txn(term, ops).await,
            Self::Etcd(store, _) => store.txn(term, ops).await,
        }
    }

    /// Takes the lead once nobody else has it: every transaction of an earlier leader fails from here on.
    pub async fn campaign(&mut self) -> Result<Term, StoreError> {
        match self {
            Self::Embedded(store) => store.campaign().await,
            Self::Etcd(store, _) => store.campaign().await,
        }
    }

    /// Waits until no other controller can have taken the lead by now, where one can.
    pub async fn leads(&self) -> Result<(), StoreError> {
        match self {
            // The lock on its directory keeps others out.
            Self::Embedded(_) => Ok(()),
            Self::Etcd(store, _) => store.leads().await,
        }
    }

    /// Ends once the lead is another's to take.
    pub async fn deposed(&self) -> StoreError {
        match self {
            Self::Embedded(_) => std::future::pending().await,
            Self::Etcd(store, _) => store.deposed().await,
        }
    }

    /// Gives the lead up, so that another need not wait for it to run out.
    pub async fn resign(&self) {
        if let Self::Etcd(store, _) = self {
            store.resign().await;
        }
    }

    /// From here on it refuses to be opened, and says where its records went. The caller leads.
    pub async fn retire(&self, term: Term, to: &str) -> Result<(), StoreError> {
        match self {
            Self::Embedded(store) => store.retire(term, to).await,
            Self::Etcd(store, _) => store.retire(term, to).await,
        }
    }
}
