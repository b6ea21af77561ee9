//! The ledger on disk: an append-only file of checksummed lines, folded into a snapshot when it has grown.
//!
//! A line is the CRC-32 of the JSON behind it, in eight hexadecimal digits, a space, the JSON of one `Record`.
//! Records are durable when `append` returns, but for those that may wait. A torn last line is what a power cut leaves: it was never acted upon.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use berth_protocol::rule::{Rule, kept};

use crate::core::ledger::{Ledger, Record};

const FILE: &str = "ledger";
const FILE_NEW: &str = "ledger.new";
/// The journal is rewritten when it is this large and at least four times what its snapshot was.
const COMPACT_BYTES_MIN: u64 = 256 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("cannot open the ledger {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("another agent uses the data directory {path}: end it, or give this one its own --data-dir")]
    Locked { path: PathBuf },
    #[error(
        "cannot write the ledger {path} (make room on its disk; if that has failed, the kernel's log says how)"
    )]
    Write { path: PathBuf, source: io::Error },
}

pub struct Journal {
    dir: PathBuf,
    file: File,
    bytes: u64,
    snapshot_bytes: u64,
    /// Held as long as the agent lives.
    _lock: File,
}

/// Writes a record as the file has it.
pub fn line(record: &Record, out: &mut Vec<u8>) -> io::Result<()> {
    let json = serde_json::to_vec(record)?;
    write!(out, "{:08x} ", crc32fast::hash(&json))?;
    out.extend_from_slice(&json);
    out.push(b'\n');
    Ok(())
}

/// The record of a line that is what was written.
pub fn parse(line: &[u8]) -> Option<Record> {
    let (crc, json) = (line.get(..8)?, line.get(9..)?);
    let crc = u32::from_str_radix(std::str::from_utf8(crc).ok()?, 16).ok()?;
    (crc32fast::hash(json) == crc || !kept(Rule::LedgerSums)).then(|| serde_json::from_slice(json).ok())?
}

/// What the whole lines of a journal say, with the number of damaged ones passed over, and the bytes of all whole ones.
pub fn read(bytes: &[u8]) -> (Ledger, usize, usize) {
    let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
    let (mut ledger, mut damaged) = (Ledger::default(), 0);
    for line in bytes[..whole].split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
        match parse(line) {
            Some(record) => ledger.apply(&record),
            None => damaged += 1,
        }
    }
    (ledger, damaged, whole)
}

fn unwritten(dir: &Path, source: io::Error) -> JournalError {
    JournalError::Write { path: dir.join(FILE), source }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

impl Journal {
    /// Opens or makes the journal in `dir`, and returns what it holds with the number of damaged lines passed over.
    pub fn open(dir: &Path) -> Result<(Self, Ledger, usize), JournalError> {
        let path = dir.join(FILE);
        let wrong = |source| JournalError::Open { path: path.clone(), source };
        std::fs::create_dir_all(dir).map_err(wrong)?;
        let lock = OpenOptions::new().create(true).append(true).open(dir.join("lock")).map_err(wrong)?;
        if lock.try_lock().is_err() {
            return Err(JournalError::Locked { path: dir.into() });
        }
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(&path).map_err(wrong)?;
        sync_dir(dir).map_err(wrong)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(wrong)?;
        let (ledger, damaged, whole) = read(&bytes);
        file.set_len(whole as u64).map_err(wrong)?;
        file.seek(SeekFrom::End(0)).map_err(wrong)?;
        let journal = Self {
            dir: dir.into(),
            file,
            bytes: whole as u64,
            snapshot_bytes: whole as u64 / 4,
            _lock: lock,
        };
        Ok((journal, ledger, damaged))
    }

    /// Makes the records durable, with all that waited. Those that may wait themselves are only written: a sync takes
    /// milliseconds, in which the agent does nothing else.
    pub fn append(&mut self, records: &[Record]) -> Result<(), JournalError> {
        if records.is_empty() {
            return Ok(());
        }
        let mut out = Vec::new();
        let mut append = || -> io::Result<()> {
            records.iter().try_for_each(|record| line(record, &mut out))?;
            self.file.write_all(&out)?;
            if !records.iter().all(Record::may_wait) {
                self.file.sync_data()?;
            }
            Ok(())
        };
        append().map_err(|source| unwritten(&self.dir, source))?;
        self.bytes += out.len() as u64;
        Ok(())
    }

    /// Rewrites the journal from `ledger` where it has grown enough for that to pay.
    pub fn compact(&mut self, ledger: &Ledger) -> Result<(), JournalError> {
        if self.bytes < COMPACT_BYTES_MIN.max(4 * self.snapshot_bytes) {
            Ok(())
        } else {
            self.rewrite(ledger)
        }
    }

    /// Puts `ledger`, and nothing else, in the place of all that was written.
    pub fn rewrite(&mut self, ledger: &Ledger) -> Result<(), JournalError> {
        let mut out = Vec::new();
        let new = self.dir.join(FILE_NEW);
        let mut rewrite = || -> io::Result<File> {
            ledger.snapshot().iter().try_for_each(|record| line(record, &mut out))?;
            let mut file = File::create(&new)?;
            file.write_all(&out)?;
            file.sync_all()?;
            std::fs::rename(&new, self.dir.join(FILE))?;
            sync_dir(&self.dir)?;
            OpenOptions::new().append(true).open(self.dir.join(FILE))
        };
        self.file = rewrite().map_err(|source| unwritten(&self.dir, source))?;
        self.bytes = out.len() as u64;
        self.snapshot_bytes = self.bytes;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_protocol::ids::{Generation, LedgerId, SessionNonce, StoreId, Term};

    fn records() -> Vec<Record> {
        vec![
            Record::Created { ledger: LedgerId::parse("l1").unwrap() },
            Record::Session { number: 1, nonce: SessionNonce::parse("n1").unwrap(), hardware: None },
            Record::Orders { store: StoreId::parse("s1").unwrap(), term: Term(3), generation: Generation(7) },
        ]
    }

    #[test]
    fn what_was_appended_is_there_again_and_a_torn_end_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _, _) = Journal::open(dir.path()).unwrap();
        journal.append(&records()).unwrap();
        drop(journal);
        let path = dir.path().join(FILE);
        let whole = std::fs::read(&path).unwrap();
        let lines: Vec<usize> =
            whole.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(at, _)| at + 1).collect();
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut journal, ledger, damaged) = Journal::open(dir.path()).unwrap();
            let kept = lines.iter().filter(|end| **end <= cut).count();
            let mut expect = Ledger::default();
            records()[..kept].iter().for_each(|record| expect.apply(record));
            assert_eq!((ledger, damaged), (expect, 0), "cut at {cut}");
            // What comes next is not glued to the torn end.
            journal.append(&records()[2..]).unwrap();
            drop(journal);
            assert_eq!(Journal::open(dir.path()).unwrap().1.generation, Generation(7));
        }
    }

    #[test]
    fn a_damaged_record_is_counted_and_the_rest_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _, _) = Journal::open(dir.path()).unwrap();
        journal.append(&records()).unwrap();
        drop(journal);
        let path = dir.path().join(FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[20] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let (_journal, ledger, damaged) = Journal::open(dir.path()).unwrap();
        assert_eq!((ledger.id, ledger.session, damaged), (None, 1, 1));
    }

    #[test]
    fn a_compacted_journal_holds_the_same_ledger() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, mut ledger, _) = Journal::open(dir.path()).unwrap();
        let mut generation = 0;
        while journal.bytes < COMPACT_BYTES_MIN {
            generation += 1;
            let mut batch = records();
            batch[2] = Record::Orders {
                store: StoreId::parse("s1").unwrap(),
                term: Term(3),
                generation: Generation(generation),
            };
            batch.iter().for_each(|record| ledger.apply(record));
            journal.append(&batch).unwrap();
        }
        journal.compact(&ledger).unwrap();
        assert!(journal.bytes < 1024);
        journal.append(&records()).unwrap();
        drop(journal);
        records().iter().for_each(|record| ledger.apply(record));
        assert_eq!(Journal::open(dir.path()).unwrap().1, ledger);
    }

    #[test]
    fn two_agents_cannot_share_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Journal::open(dir.path()).unwrap();
        assert!(matches!(Journal::open(dir.path()), Err(JournalError::Locked { .. })));
    }
}
