//! Keeps the controller's records in one SQLite file behind an interface shaped like etcd's. It alone knows SQLite;
//! what the keys and values mean is the core's.
//!
//! One thread owns the connection. It commits whatever has queued as one transaction (group commit) and waits for
//! nothing when idle. WAL with synchronous=FULL: what `txn` has answered survives a crash of the machine.

use std::fs::{DirBuilder, File, TryLockError};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;

use berth_protocol::ids::{StoreId, Term};
use rusqlite::{Connection, OptionalExtension as _, Transaction, params};
use tokio::sync::oneshot;

use super::random;

/// Transactions that one commit takes together.
const GROUP_TXNS_MAX: usize = 256;
/// Transactions that may wait for the writer.
const QUEUE_TXNS_MAX: usize = 1024;
/// SQLite's page cache. The core has everything in memory and reads only at the start.
const PAGE_CACHE_KIB: i64 = 512;
const BACKUP_PAGES_PER_STEP: i32 = 256;
/// The layout of the tables (`PRAGMA user_version`).
const LAYOUT: i64 = 1;
const FILE: &str = "store.sqlite";
const LOCK: &str = "lock";

/// A position in the store's history: each transaction that changes something takes the next.
pub type Revision = u64;

#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    #[error("cannot use the data directory {dir}")]
    Directory { dir: PathBuf, source: Arc<std::io::Error> },
    #[error(
        "the data directory {dir} is in use by another berth-controller: stop that one, or choose another --data-dir"
    )]
    Locked { dir: PathBuf },
    #[error("cannot {action} the store {path}")]
    Sqlite { action: &'static str, path: PathBuf, source: Arc<rusqlite::Error> },
    #[error("the store {path} is damaged ({finding}): put a backup in its place")]
    Damaged { path: PathBuf, finding: String },
    #[error(
        "the store {path} has layout {found}, this version reads {LAYOUT}: run the version that wrote it"
    )]
    Layout { path: PathBuf, found: i64 },
    #[error("the store refuses: {0}")]
    Conflict(Compare),
    #[error("{QUEUE_TXNS_MAX} transactions wait for the store already")]
    Busy,
    #[error("the store's writer has ended")]
    Closed,
}

/// What must hold for a transaction to happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// Nobody has campaigned since.
    Term(Term),
    /// The revision that last wrote the key; 0: it is not there.
    Revision { key: String, is: Revision },
}

impl std::fmt::Display for Compare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Compare::Term(term) => write!(f, "its term is no longer {term}, another controller leads"),
            Compare::Revision { key, is } => write!(f, "`{key}` is no longer at revision {is}"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Put { key: String, value: Vec<u8> },
    Delete { key: String },
}

/// What `list` saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    pub revision: Revision,
    /// Ascending by key.
    pub entries: Vec<(String, Vec<u8>)>,
}

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

enum Request {
    Txn { compares: Vec<Compare>, ops: Vec<Op>, reply: Reply<Revision> },
    List { prefix: String, reply: Reply<Listing> },
    Campaign { reply: Reply<Term> },
}

/// An open store. Dropping it waits for the writer and closes the file.
pub struct Store {
    /// `None` only while it is dropped.
    requests: Option<mpsc::SyncSender<Request>>,
    writer: Option<JoinHandle<()>>,
    failure: Arc<OnceLock<StoreError>>,
    path: PathBuf,
    id: StoreId,
    secret: [u8; 32],
}

impl Store {
    /// Opens the store in `dir`, which is made where missing, and locks the directory against a second controller.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let directory = |source| StoreError::Directory { dir: dir.to_owned(), source: Arc::new(source) };
        // The store holds the depot's secret, and both hold what jobs were told and said.
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(directory)?;
        let lock = File::create(dir.join(LOCK)).map_err(directory)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => StoreError::Locked { dir: dir.to_owned() },
            TryLockError::Error(source) => directory(source),
        })?;
        let path = dir.join(FILE);
        let (connection, id, secret) = open(&path)?;
        let (requests, queue) = mpsc::sync_channel(QUEUE_TXNS_MAX);
        let failure = Arc::new(OnceLock::new());
        let writer = Writer { connection, path: path.clone(), failure: failure.clone(), _lock: lock };
        let writer = std::thread::Builder::new()
            .name("store".to_owned())
            .stack_size(256 * 1024)
            .spawn(move || writer.run(&queue))
            .map_err(directory)?;
        Ok(Self { requests: Some(requests), writer: Some(writer), failure, path, id, secret })
    }

    /// Made with the store, and never changed.
    pub fn id(&self) -> &StoreId {
        &self.id
    }

    /// Signs the depot's tokens. Made with the store.
    pub fn secret(&self) -> &[u8; 32] {
        &self.secret
    }

    /// Everything whose key begins with `prefix`.
    pub async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.ask(|reply| Request::List { prefix: prefix.to_owned(), reply }).await
    }

    /// Applies all `ops`, or none where a compare does not hold (`Conflict`); durable when it returns.
    pub async fn txn(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<Revision, StoreError> {
        self.ask(|reply| Request::Txn { compares, ops, reply }).await
    }

    /// Takes the lead: every `Compare::Term` of an earlier leader fails from here on.
    pub async fn campaign(&self) -> Result<Term, StoreError> {
        self.ask(|reply| Request::Campaign { reply }).await
    }

    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let Some(requests) = &self.requests else { return Err(self.closed()) };
        match requests.try_send(request(reply)) {
            Err(mpsc::TrySendError::Full(_)) => Err(StoreError::Busy),
            Err(mpsc::TrySendError::Disconnected(_)) => Err(self.closed()),
            Ok(()) => answer.await.unwrap_or_else(|_| Err(self.closed())),
        }
    }

    /// Why the writer has ended. It drops what it cannot answer a moment before it says so.
    fn closed(&self) -> StoreError {
        self.failure.wait().clone()
    }

    /// Copies the store, as of one moment, to a new file while it is in use. Blocks: call it off the runtime.
    pub fn backup(&self, to: &Path) -> Result<(), StoreError> {
        let failed = |source| sqlite("back up", to, source);
        let from = Connection::open(&self.path).map_err(failed)?;
        let mut into = Connection::open(to).map_err(failed)?;
        let backup = rusqlite::backup::Backup::new(&from, &mut into).map_err(failed)?;
        backup.run_to_completion(BACKUP_PAGES_PER_STEP, std::time::Duration::ZERO, None).map_err(failed)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        drop(self.requests.take());
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

fn sqlite(action: &'static str, path: &Path, source: rusqlite::Error) -> StoreError {
    StoreError::Sqlite { action, path: path.to_owned(), source: Arc::new(source) }
}

fn open(path: &Path) -> Result<(Connection, StoreId, [u8; 32]), StoreError> {
    let failed = |source| sqlite("open", path, source);
    let mut connection = Connection::open(path).map_err(failed)?;
    connection.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
    connection.pragma_update(None, "cache_size", -PAGE_CACHE_KIB).map_err(failed)?;
    connection.pragma_update(None, "mmap_size", 0).map_err(failed)?;
    let finding: String =
        connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(failed)?;
    if finding != "ok" {
        return Err(StoreError::Damaged { path: path.to_owned(), finding });
    }
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed)?;
    if found == 0 {
        create(&mut connection, path)?;
    } else if found != LAYOUT {
        return Err(StoreError::Layout { path: path.to_owned(), found });
    }
    let (id, secret): (String, [u8; 32]) = connection
        .query_row("SELECT store, secret FROM leader", [], |row| Ok((row.get(0)?, row.get(1)?)))
        .map_err(failed)?;
    let id = StoreId::parse(&id)
        .map_err(|error| StoreError::Damaged { path: path.to_owned(), finding: error.to_string() })?;
    Ok((connection, id, secret))
}

fn create(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let failed = |source| sqlite("create", path, source);
    let no_random = |source| StoreError::Directory { dir: "/dev/urandom".into(), source: Arc::new(source) };
    let id = random::hex::<8>().map_err(no_random)?;
    let secret = random::bytes::<32>().map_err(no_random)?;
    let transaction = connection.transaction().map_err(failed)?;
    transaction
        .execute_batch(
            "CREATE TABLE entry (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
             CREATE TABLE leader (store TEXT NOT NULL, secret BLOB NOT NULL, term INTEGER NOT NULL, revision INTEGER NOT NULL);",
        )
        .map_err(failed)?;
    transaction.execute("INSERT INTO leader VALUES (?1, ?2, 0, 0)", params![id, secret]).map_err(failed)?;
    transaction.pragma_update(None, "user_version", LAYOUT).map_err(failed)?;
    transaction.commit().map_err(failed)
}

struct Writer {
    connection: Connection,
    path: PathBuf,
    /// Why the writer ended, for those whose requests it can no longer answer.
    failure: Arc<OnceLock<StoreError>>,
    /// Held as long as the connection is.
    _lock: File,
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.failure.set(StoreError::Closed);
    }
}

/// Tells an asker what came of the request, once that is durable.
type Answer = Box<dyn FnOnce()>;

impl Writer {
    fn run(mut self, queue: &mpsc::Receiver<Request>) {
        while let Ok(first) = queue.recv() {
            let group = std::iter::once(first).chain(queue.try_iter()).take(GROUP_TXNS_MAX);
            match commit(&mut self.connection, group) {
                Ok(answers) => answers.into_iter().for_each(|answer| answer()),
                Err(source) => {
                    // What the file holds is uncertain from here on: nobody may be told anything more.
                    let _ = self.failure.set(sqlite("write to", &self.path, source));
                    return;
                }
            }
        }
    }
}

fn commit(
    connection: &mut Connection,
    group: impl Iterator<Item = Request>,
) -> rusqlite::Result<Vec<Answer>> {
    let transaction = connection.transaction()?;
    let answers = group.map(|request| carry_out(&transaction, request)).collect::<Result<_, _>>()?;
    transaction.commit()?;
    Ok(answers)
}

fn carry_out(transaction: &Transaction<'_>, request: Request) -> rusqlite::Result<Answer> {
    fn answer<T: 'static>(reply: Reply<T>, outcome: Result<T, StoreError>) -> Answer {
        // An asker that has gone is no error.
        Box::new(move || drop(reply.send(outcome)))
    }
    Ok(match request {
        Request::Txn { compares, ops, reply } => answer(reply, txn(transaction, &compares, ops)?),
        Request::List { prefix, reply } => answer(reply, Ok(list(transaction, &prefix)?)),
        Request::Campaign { reply } => answer(reply, Ok(campaign(transaction)?)),
    })
}

fn txn(
    transaction: &Transaction<'_>,
    compares: &[Compare],
    ops: Vec<Op>,
) -> rusqlite::Result<Result<Revision, StoreError>> {
    for compare in compares {
        let holds = match compare {
            Compare::Term(expected) => {
                let (term, _) = leader(transaction)?;
                term == *expected
            }
            Compare::Revision { key, is } => {
                let revision: Option<Revision> = transaction
                    .prepare_cached("SELECT revision FROM entry WHERE key = ?1")?
                    .query_row([key], |row| row.get(0))
                    .optional()?;
                revision.unwrap_or(0) == *is
            }
        };
        if !holds {
            return Ok(Err(StoreError::Conflict(compare.clone())));
        }
    }
    let (_, revision) = leader(transaction)?;
    if ops.is_empty() {
        return Ok(Ok(revision));
    }
    let revision = revision + 1;
    for op in ops {
        match op {
            Op::Put { key, value } => transaction
                .prepare_cached("INSERT OR REPLACE INTO entry VALUES (?1, ?2, ?3)")?
                .execute(params![key, value, revision])?,
            Op::Delete { key } => {
                transaction.prepare_cached("DELETE FROM entry WHERE key = ?1")?.execute([key])?
            }
        };
    }
    transaction.prepare_cached("UPDATE leader SET revision = ?1")?.execute([revision])?;
    Ok(Ok(revision))
}

fn leader(transaction: &Transaction<'_>) -> rusqlite::Result<(Term, Revision)> {
    transaction
        .prepare_cached("SELECT term, revision FROM leader")?
        .query_row([], |row| Ok((Term(row.get(0)?), row.get(1)?)))
}

fn list(transaction: &Transaction<'_>, prefix: &str) -> rusqlite::Result<Listing> {
    let (_, revision) = leader(transaction)?;
    // SQLite orders text by its bytes, and no character sorts behind the last of Unicode.
    let end = format!("{prefix}{}", char::MAX);
    let entries = transaction
        .prepare_cached("SELECT key, value FROM entry WHERE key >= ?1 AND key < ?2 ORDER BY key")?
        .query_map([prefix, &end], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    Ok(Listing { revision, entries })
}

fn campaign(transaction: &Transaction<'_>) -> rusqlite::Result<Term> {
    let term = leader(transaction)?.0.next();
    transaction.execute("UPDATE leader SET term = ?1", [term.0])?;
    Ok(term)
}
