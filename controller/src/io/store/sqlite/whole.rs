//! A store's file as a whole: read beside its controller, written anew, put in another's place, looked into where it is
//! damaged.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use berth_protocol::ids::Term;

use super::super::seal::unseal;
use super::super::{Contents, StoreError, may_replace};
use super::{
    FILE, LAYOUT, check_layout, connect, create, damaged, existing, file, identity, list, moved, open, put,
    sqlite, term, unusable,
};

/// What a store's file holds, read beside whoever writes to it.
pub fn read(path: &Path) -> Result<Contents, StoreError> {
    let failed = |source| sqlite("read", path, source);
    let mut connection = existing(path)?;
    check_layout(&connection, path, |found| found == LAYOUT)?;
    // One transaction: one moment.
    let transaction = connection.transaction().map_err(failed)?;
    if let Some(to) = moved(&transaction, path)? {
        return Err(StoreError::Moved { place: path.display().to_string(), to });
    }
    let identity = identity(&transaction, path)?;
    let term = term(&transaction).map_err(failed)?.ok_or_else(|| damaged(path, "its term is unreadable"))?;
    Ok(Contents { identity, term, entries: list(&transaction).map_err(failed)? })
}

/// A new file with these contents. What is damaged in them is left out.
pub fn write(path: &Path, contents: &Contents) -> Result<(), StoreError> {
    let failed = |source| sqlite("write", path, source);
    let mut connection = connect(path)?;
    let transaction = connection.transaction().map_err(failed)?;
    create(&transaction, &contents.identity, contents.term).map_err(failed)?;
    for (key, value) in &contents.entries {
        let Some(value) = value else { continue };
        put(&transaction, "entry", key, value).map_err(failed)?;
    }
    transaction.commit().map_err(failed)?;
    // Everything into the one file: what is copied or renamed next is whole.
    connection.pragma_update(None, "journal_mode", "DELETE").map_err(failed)
}

/// Puts `contents` in the place of a store that `may_replace` them. The caller has the directory's lock.
pub fn fill(dir: &Path, contents: &Contents) -> Result<(), StoreError> {
    let path = file(dir);
    if path.exists() {
        let connection = open(&path)?;
        let term =
            term(&connection).map_err(|source| sqlite("read", &path, source))?.unwrap_or(Term(u64::MAX));
        let moved = moved(&connection, &path)?.is_some();
        if !may_replace(&identity(&connection, &path)?, term, moved, contents) {
            return Err(StoreError::Used { place: path.display().to_string() });
        }
    }
    replace(dir, contents).map(drop)
}

/// What can be read of a damaged file. The caller has the directory's lock.
pub fn salvage(path: &Path) -> Result<Contents, StoreError> {
    let failed = |source| sqlite("read", path, source);
    let connection = existing(path)?;
    check_layout(&connection, path, |found| found == LAYOUT)?;
    let identity = identity(&connection, path)?;
    let term = term(&connection).map_err(failed)?.ok_or_else(|| damaged(path, "its term is unreadable"))?;
    // From both ends up to the first page that cannot be read.
    let mut entries = std::collections::BTreeMap::new();
    for order in ["ASC", "DESC"] {
        let mut statement = connection
            .prepare(&format!("SELECT key, value FROM entry ORDER BY key {order}"))
            .map_err(failed)?;
        let mut rows = statement.query([]).map_err(failed)?;
        while let Ok(Some(row)) = rows.next() {
            let (Ok(key), Ok(stored)) = (row.get::<_, String>(0), row.get_ref(1)) else { continue };
            let value = stored.as_bytes().ok().and_then(|stored| unseal(&key, stored));
            entries.insert(key, value);
        }
    }
    Ok(Contents { identity, term, entries: entries.into_iter().collect() })
}

/// The findings of SQLite's own check of the file's structure; none where it is sound.
pub fn structure(path: &Path) -> Result<Vec<String>, StoreError> {
    let failed = |source| sqlite("check", path, source);
    let connection = existing(path)?;
    let mut statement = connection.prepare("PRAGMA integrity_check(20)").map_err(failed)?;
    let found: Result<Vec<String>, _> = statement.query_map([], |row| row.get(0)).map_err(failed)?.collect();
    match found {
        Ok(findings) => Ok(findings.into_iter().filter(|finding| finding != "ok").collect()),
        Err(source) => Ok(vec![source.to_string()]),
    }
}

/// A file with these contents takes the place of the one that is there, which is kept under the name returned. The
/// caller has the directory's lock.
pub fn replace(dir: &Path, contents: &Contents) -> Result<Option<PathBuf>, StoreError> {
    let (path, new) = (file(dir), dir.join("store.sqlite.new"));
    let io = |source| unusable(dir, source);
    if new.exists() {
        std::fs::remove_file(&new).map_err(io)?;
    }
    write(&new, contents)?;
    // Whoever restores may be root, and the controller another user.
    let owner = std::fs::metadata(dir).map_err(io)?;
    std::os::unix::fs::chown(&new, Some(owner.uid()), Some(owner.gid())).map_err(io)?;
    let seconds =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    let kept = format!("{FILE}.before-{seconds}");
    // With its journal, which would be taken for the new one's.
    for suffix in ["-wal", "-shm", ""] {
        let from = dir.join(format!("{FILE}{suffix}"));
        if from.exists() {
            std::fs::rename(from, dir.join(format!("{kept}{suffix}"))).map_err(io)?;
        }
    }
    std::fs::rename(&new, &path).map_err(io)?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io)?;
    let kept = dir.join(kept);
    Ok(kept.exists().then_some(kept))
}
