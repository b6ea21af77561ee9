//! The records in one SQLite file. It alone knows SQLite.
//!
//! One thread owns the connection. It commits whatever has queued as one transaction (group commit) and waits for
//! nothing when idle. WAL with synchronous=FULL: what `txn` has answered survives a crash of the machine.

mod whole;

use std::fs::{DirBuilder, File, TryLockError};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;

use berth_protocol::ids::Term;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Transaction, params};
use tokio::sync::oneshot;

pub use self::whole::{fill, read, replace, salvage, structure, write};
use super::seal::{seal, unseal};
use super::{AUDIT, Entries, Identity, Op, StoreError};

/// Transactions that one commit takes together.
const GROUP_TXNS_MAX: usize = 256;
/// Transactions that may wait for the writer.
const QUEUE_TXNS_MAX: usize = 1024;
/// SQLite's page cache. The core has everything in memory and reads only at the start.
const PAGE_CACHE_KIB: i64 = 512;
/// The layout of the tables (`PRAGMA user_version`). 1 had no checksums.
const LAYOUT: i64 = 2;
const FILE: &str = "store.sqlite";
const LOCK: &str = "lock";
/// What is not needed to lead: it is read in pages, by those who ask.
const NOT_AUDIT: &str = "key < 'audit/' OR key >= 'audit0'";
/// Old entries that go at a time.
const TRIMMED_MAX: usize = 10_000;
/// Keys of `meta`.
const IDENTITY: &str = "identity";
const TERM: &str = "term";
const MOVED: &str = "moved";

pub fn file(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

enum Request {
    Txn { term: Term, ops: Vec<Op>, reply: Reply<()> },
    List { reply: Reply<Entries> },
    Audit { before: String, limit: usize, reply: Reply<Vec<(String, Vec<u8>)>> },
    TrimAudit { before: String, reply: Reply<()> },
    Campaign { reply: Reply<Term> },
    Retire { term: Term, to: String, reply: Reply<()> },
}

/// An open store. Dropping it waits for the writer and closes the file.
pub struct Sqlite {
    /// `None` only while it is dropped.
    requests: Option<mpsc::SyncSender<Request>>,
    writer: Option<JoinHandle<()>>,
    failure: Arc<OnceLock<StoreError>>,
    identity: Identity,
}

impl Sqlite {
    /// Opens the store in `dir`, which is made where missing, and locks the directory against a second controller.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let lock = lock(dir)?;
        let path = file(dir);
        let connection = open(&path)?;
        if let Some(to) = moved(&connection, &path)? {
            return Err(StoreError::Moved { place: path.display().to_string(), to });
        }
        let identity = identity(&connection, &path)?;
        let (requests, queue) = mpsc::sync_channel(QUEUE_TXNS_MAX);
        let failure = Arc::new(OnceLock::new());
        let writer = Writer { connection, path, failure: failure.clone(), _lock: lock };
        let writer = std::thread::Builder::new()
            .name("store".to_owned())
            .stack_size(256 * 1024)
            .spawn(move || writer.run(&queue))
            .map_err(|source| unusable(dir, source))?;
        Ok(Self { requests: Some(requests), writer: Some(writer), failure, identity })
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub async fn list(&self) -> Result<Entries, StoreError> {
        self.ask(|reply| Request::List { reply }).await
    }

    pub async fn audit(&self, before: &str, limit: usize) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        self.ask(|reply| Request::Audit { before: before.to_owned(), limit, reply }).await
    }

    pub async fn trim_audit(&self, before: &str) -> Result<(), StoreError> {
        self.ask(|reply| Request::TrimAudit { before: before.to_owned(), reply }).await
    }

    pub async fn txn(&self, term: Term, ops: Vec<Op>) -> Result<(), StoreError> {
        self.ask(|reply| Request::Txn { term, ops, reply }).await
    }

    pub async fn campaign(&self) -> Result<Term, StoreError> {
        self.ask(|reply| Request::Campaign { reply }).await
    }

    pub async fn retire(&self, term: Term, to: &str) -> Result<(), StoreError> {
        self.ask(|reply| Request::Retire { term, to: to.to_owned(), reply }).await
    }

    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let Some(requests) = &self.requests else { return Err(self.closed()) };
        match requests.try_send(request(reply)) {
            Err(mpsc::TrySendError::Full(_)) => Err(StoreError::Busy(QUEUE_TXNS_MAX)),
            Err(mpsc::TrySendError::Disconnected(_)) => Err(self.closed()),
            Ok(()) => answer.await.unwrap_or_else(|_| Err(self.closed())),
        }
    }

    /// Why the writer has ended. It drops what it cannot answer a moment before it says so.
    fn closed(&self) -> StoreError {
        self.failure.wait().clone()
    }
}

impl Drop for Sqlite {
    fn drop(&mut self) {
        drop(self.requests.take());
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// Locks the data directory, which is made where missing.
pub fn lock(dir: &Path) -> Result<File, StoreError> {
    // The store holds the keys, and both hold what jobs were told and said. What is above is for everybody to pass through.
    let above = dir.parent().map_or(Ok(()), std::fs::create_dir_all);
    let made = above.and_then(|()| DirBuilder::new().recursive(true).mode(0o700).create(dir));
    made.map_err(|source| unusable(dir, source))?;
    let lock = File::create(dir.join(LOCK)).map_err(|source| unusable(dir, source))?;
    lock.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => StoreError::Locked { dir: dir.to_owned() },
        TryLockError::Error(source) => unusable(dir, source),
    })?;
    Ok(lock)
}

fn unusable(dir: &Path, source: std::io::Error) -> StoreError {
    StoreError::Directory { dir: dir.to_owned(), source: Arc::new(source) }
}

fn sqlite(action: &'static str, path: &Path, source: rusqlite::Error) -> StoreError {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase, SystemIoFailure};
    match source.sqlite_error_code() {
        Some(DatabaseCorrupt | NotADatabase) => damaged(path, &source.to_string()),
        Some(SystemIoFailure) => StoreError::Disk { action, path: path.to_owned(), source: Arc::new(source) },
        _ => StoreError::Sqlite { action, path: path.to_owned(), source: Arc::new(source) },
    }
}

fn damaged(path: &Path, finding: &str) -> StoreError {
    StoreError::Damaged { place: path.display().to_string(), finding: finding.to_owned() }
}

/// Beside whoever writes to it; one that is not there is not made.
fn existing(path: &Path) -> Result<Connection, StoreError> {
    if !path.exists() {
        return Err(StoreError::Missing { path: path.to_owned() });
    }
    let opened = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE);
    opened.map_err(|source| sqlite("open", path, source))
}

fn connect(path: &Path) -> Result<Connection, StoreError> {
    let failed = |source| sqlite("open", path, source);
    let connection = Connection::open(path).map_err(failed)?;
    connection.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
    connection.pragma_update(None, "cache_size", -PAGE_CACHE_KIB).map_err(failed)?;
    connection.pragma_update(None, "mmap_size", 0).map_err(failed)?;
    Ok(connection)
}

/// Opens the file, made where missing, in the present layout.
fn open(path: &Path) -> Result<Connection, StoreError> {
    let mut connection = connect(path)?;
    match check_layout(&connection, path, |found| (0..=LAYOUT).contains(&found))? {
        LAYOUT => {}
        found => {
            let failed = |source| sqlite("create", path, source);
            let transaction = connection.transaction().map_err(failed)?;
            if found == 0 {
                create(&transaction, &Identity::new()?, Term(0)).map_err(failed)?;
            } else {
                add_checksums(&transaction, path)?;
            }
            transaction.commit().map_err(failed)?;
        }
    }
    Ok(connection)
}

fn check_layout(
    connection: &Connection,
    path: &Path,
    readable: impl Fn(i64) -> bool,
) -> Result<i64, StoreError> {
    let found: i64 = connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(|source| sqlite("open", path, source))?;
    if readable(found) {
        return Ok(found);
    }
    Err(StoreError::Layout { path: path.to_owned(), found, known: LAYOUT })
}

fn create(transaction: &Transaction<'_>, identity: &Identity, term: Term) -> rusqlite::Result<()> {
    transaction.execute_batch(
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
         CREATE TABLE entry (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;",
    )?;
    put(transaction, "meta", IDENTITY, &serde_json::to_vec(identity).unwrap_or_default())?;
    put(transaction, "meta", TERM, term.0.to_string().as_bytes())?;
    transaction.pragma_update(None, "user_version", LAYOUT)
}

/// From layout 1.
fn add_checksums(transaction: &Transaction<'_>, path: &Path) -> Result<(), StoreError> {
    let failed = |source| sqlite("bring up to date", path, source);
    let (id, secret, term): (String, [u8; 32], u64) = transaction
        .query_row("SELECT store, secret, term FROM leader", [], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })
        .map_err(failed)?;
    let id = id.parse().map_err(|_| damaged(path, "its id is none"))?;
    let move_over = || {
        transaction.execute_batch("ALTER TABLE entry RENAME TO old; DROP TABLE leader;")?;
        create(transaction, &Identity { id, secret }, Term(term))?;
        let mut old = transaction.prepare("SELECT key, value FROM old")?;
        let mut rows = old.query([])?;
        while let Some(row) = rows.next()? {
            put(transaction, "entry", &row.get::<_, String>(0)?, &row.get::<_, Vec<u8>>(1)?)?;
        }
        drop(rows);
        drop(old);
        transaction.execute_batch("DROP TABLE old")
    };
    move_over().map_err(failed)
}

fn identity(connection: &Connection, path: &Path) -> Result<Identity, StoreError> {
    let stored = meta(connection, IDENTITY).map_err(|source| sqlite("open", path, source))?;
    let identity = stored.flatten().and_then(|value| serde_json::from_slice(&value).ok());
    identity.ok_or_else(|| damaged(path, "its identity is unreadable"))
}

/// Where the records were moved to, where they were.
fn moved(connection: &Connection, path: &Path) -> Result<Option<String>, StoreError> {
    let stored = meta(connection, MOVED).map_err(|source| sqlite("open", path, source))?;
    Ok(stored.map(|value| String::from_utf8_lossy(&value.unwrap_or_default()).into_owned()))
}

/// None: it is damaged.
fn term(connection: &Connection) -> rusqlite::Result<Option<Term>> {
    let stored = meta(connection, TERM)?.flatten();
    Ok(stored.and_then(|value| std::str::from_utf8(&value).ok()?.parse().ok().map(Term)))
}

fn meta(connection: &Connection, key: &str) -> rusqlite::Result<Option<Option<Vec<u8>>>> {
    let stored: Option<Vec<u8>> = connection
        .prepare_cached("SELECT value FROM meta WHERE key = ?1")?
        .query_row([key], |row| row.get(0))
        .optional()?;
    Ok(stored.map(|stored| unseal(key, &stored)))
}

fn put(transaction: &Transaction<'_>, table: &str, key: &str, value: &[u8]) -> rusqlite::Result<()> {
    transaction
        .prepare_cached(&format!("INSERT OR REPLACE INTO {table} VALUES (?1, ?2)"))?
        .execute(params![key, seal(key, value)])
        .map(drop)
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
    let leads = |claimed| term(transaction).map(|term| term == Some(claimed));
    Ok(match request {
        Request::Txn { term, reply, .. } | Request::Retire { term, reply, .. } if !leads(term)? => {
            answer(reply, Err(StoreError::Deposed(term)))
        }
        Request::Txn { ops, reply, .. } => {
            apply(transaction, ops)?;
            answer(reply, Ok(()))
        }
        Request::List { reply } => answer(reply, Ok(select(transaction, NOT_AUDIT)?)),
        Request::Audit { before, limit, reply } => answer(reply, Ok(audit(transaction, &before, limit)?)),
        Request::TrimAudit { before, reply } => {
            let old =
                format!("SELECT key FROM entry WHERE key >= '{AUDIT}' AND key < ?1 LIMIT {TRIMMED_MAX}");
            transaction
                .prepare_cached(&format!("DELETE FROM entry WHERE key IN ({old})"))?
                .execute([before])?;
            answer(reply, Ok(()))
        }
        Request::Campaign { reply } => answer(reply, campaign(transaction)?),
        Request::Retire { to, reply, .. } => {
            put(transaction, "meta", MOVED, to.as_bytes())?;
            answer(reply, Ok(()))
        }
    })
}

fn apply(transaction: &Transaction<'_>, ops: Vec<Op>) -> rusqlite::Result<()> {
    for op in ops {
        match op {
            Op::Put { key, value } => put(transaction, "entry", &key, &value)?,
            Op::Delete { key } => {
                transaction.prepare_cached("DELETE FROM entry WHERE key = ?1")?.execute([key])?;
            }
        }
    }
    Ok(())
}

/// Everything, in the order of the keys.
fn list(transaction: &Transaction<'_>) -> rusqlite::Result<Entries> {
    select(transaction, "TRUE")
}

/// From the latest on.
fn audit(
    transaction: &Transaction<'_>,
    before: &str,
    limit: usize,
) -> rusqlite::Result<Vec<(String, Vec<u8>)>> {
    let mut statement = transaction.prepare_cached(&format!(
        "SELECT key, value FROM entry WHERE key >= '{AUDIT}' AND key < ?1 ORDER BY key DESC LIMIT ?2"
    ))?;
    let rows = statement.query_map(params![before, limit], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let rows: Vec<(String, Vec<u8>)> = rows.collect::<Result<_, _>>()?;
    // One that is damaged stands there as it is, and says nothing.
    let unsealed = |(key, stored): (String, Vec<u8>)| {
        let value = unseal(&key, &stored).unwrap_or_default();
        (key, value)
    };
    Ok(rows.into_iter().map(unsealed).collect())
}

fn select(transaction: &Transaction<'_>, which: &str) -> rusqlite::Result<Entries> {
    let mut statement =
        transaction.prepare_cached(&format!("SELECT key, value FROM entry WHERE {which} ORDER BY key"))?;
    let mut rows = statement.query([])?;
    let mut entries = Vec::new();
    while let Some(row) = rows.next()? {
        let key: String = row.get(0)?;
        let value = row.get_ref(1)?.as_bytes().ok().and_then(|stored| unseal(&key, stored));
        entries.push((key, value));
    }
    Ok(entries)
}

fn campaign(transaction: &Transaction<'_>) -> rusqlite::Result<Result<Term, StoreError>> {
    // Begun anew it would give agents orders that they have heard before.
    let Some(last) = term(transaction)? else {
        let (place, finding) = ("in use".to_owned(), "its term is unreadable".to_owned());
        return Ok(Err(StoreError::Damaged { place, finding }));
    };
    let term = last.next();
    put(transaction, "meta", TERM, term.0.to_string().as_bytes())?;
    Ok(Ok(term))
}
