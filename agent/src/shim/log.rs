//! A pod's log on disk: written by its shim, read by the daemon. Segments of records in `log/`, each named by the
//! seq of its first record; the seq goes on over the runs of an epoch, and the oldest segments go first.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use berth_protocol::ids::ContainerName;
use berth_protocol::limits::LOG_RECORD_BYTES_MAX;
use berth_protocol::log::{Record, RecordError, Stream, read_record};
use berth_protocol::units::{Bytes, Timestamp};

/// A log is cut into this many segments, so that dropping the oldest loses little.
const SEGMENTS: u64 = 8;
const SEGMENT_BYTES_MIN: u64 = 64 * 1024;
const SEGMENT_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// What the reader holds at once: a record and its header fit.
const READ_BYTES: usize = 4 * LOG_RECORD_BYTES_MAX;

/// Appends records; one writer a log, the shim that holds the pod's lock.
pub struct Writer {
    dir: PathBuf,
    file: File,
    bytes: u64,
    segment_bytes_max: u64,
    total_bytes_max: u64,
    next_seq: u64,
    line: Vec<u8>,
    /// Bytes that could not be written, and why not: said where the log goes on.
    lost: Option<(u64, io::Error)>,
}

impl Writer {
    /// Opens the log to go on behind its last whole record; a torn end is cut off.
    pub fn open(dir: &Path, total: Bytes) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let (path, next_seq, bytes) = match segments(dir)?.last() {
            None => (segment(dir, 1), 1, 0),
            Some((first, path)) => {
                let (count, bytes) = whole_records(path)?;
                OpenOptions::new().write(true).open(path)?.set_len(bytes)?;
                (path.clone(), first.saturating_add(count).max(1), bytes)
            }
        };
        Ok(Self {
            dir: dir.to_owned(),
            file: OpenOptions::new().create(true).append(true).open(path)?,
            bytes,
            segment_bytes_max: (total.0 / SEGMENTS).clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX),
            total_bytes_max: total.0,
            next_seq,
            line: Vec::new(),
            lost: None,
        })
    }

    /// The seq of the last record; 0 before the first.
    pub fn last_seq(&self) -> u64 {
        self.next_seq - 1
    }

    /// Writes one record of at most `LOG_RECORD_BYTES_MAX` bytes. What cannot be written, as on a full disk, is lost, and
    /// the log says so as soon as it can.
    pub fn append(&mut self, at: Timestamp, container: &ContainerName, stream: Stream, bytes: &[u8]) {
        if let Some((lost, why)) = &self.lost {
            let note = format!("berth: {lost} bytes of output are missing here: {why}\n");
            if self.write(at, container, Stream::Stderr, note.as_bytes()).is_ok() {
                self.lost = None;
            }
        }
        if self.lost.is_none() {
            match self.write(at, container, stream, bytes) {
                Ok(()) => return,
                Err(why) => self.lost = Some((0, why)),
            }
        }
        if let Some((lost, _)) = &mut self.lost {
            *lost += bytes.len() as u64;
        }
    }

    fn write(
        &mut self,
        at: Timestamp,
        container: &ContainerName,
        stream: Stream,
        bytes: &[u8],
    ) -> io::Result<()> {
        if self.bytes >= self.segment_bytes_max {
            self.rotate()?;
        }
        self.line.clear();
        Record { seq: self.next_seq, at, stream, container: container.clone(), bytes }.write(&mut self.line);
        if let Err(e) = self.file.write_all(&self.line) {
            // A record that a full disk cut short would make all that follow unreadable.
            let _ = self.file.set_len(self.bytes);
            return Err(e);
        }
        self.bytes += self.line.len() as u64;
        self.next_seq = self.next_seq.saturating_add(1);
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.file = OpenOptions::new().create(true).append(true).open(segment(&self.dir, self.next_seq))?;
        self.bytes = 0;
        let mut kept = self.segment_bytes_max;
        for (first, path) in
            segments(&self.dir)?.into_iter().rev().filter(|(first, _)| *first < self.next_seq)
        {
            kept += fs::metadata(&path)?.len();
            if kept > self.total_bytes_max && first != self.next_seq {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// Frees the buffer that a long record has left.
    pub fn shrink(&mut self) {
        self.line = Vec::new();
    }
}

fn segment(dir: &Path, first: u64) -> PathBuf {
    // Names sort as their numbers do.
    dir.join(format!("{first:020}.log"))
}

/// The segments, ascending, each with the seq of its first record.
fn segments(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let first =
            path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".log")?.parse().ok());
        all.extend(first.map(|first| (first, path)));
    }
    all.sort();
    Ok(all)
}

/// Puts all of a log on disk. An end of the machine that comes later takes nothing of it; the names of new segments
/// outlast it with their content, as in `sys::write_durably`.
pub fn sync(dir: &Path) -> io::Result<()> {
    segment_paths(dir).into_iter().try_for_each(|path| match File::open(path) {
        Ok(segment) => segment.sync_data(),
        // Dropped in this moment.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    })
}

/// The files of a log, oldest first, each with the length of its whole records: behind them is one on its way in, or what
/// an end of the machine has left there.
pub fn whole(dir: &Path) -> io::Result<Vec<(File, u64)>> {
    let mut all = Vec::new();
    for path in segment_paths(dir) {
        match Segment::open(&path) {
            Ok(mut segment) => {
                while segment.next(|_| ())?.is_some() {}
                segment.file.rewind()?;
                all.push((segment.file, segment.offset));
            }
            // Dropped in this moment.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(all)
}

fn segment_paths(dir: &Path) -> Vec<PathBuf> {
    segments(dir).unwrap_or_default().into_iter().map(|(_, path)| path).collect()
}

/// The seq of the last whole record of a log that nobody writes; 0 where there is none.
pub fn last_seq(dir: &Path) -> io::Result<u64> {
    let all = match segments(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        all => all?,
    };
    match all.last() {
        None => Ok(0),
        Some((first, path)) => Ok(first.saturating_add(whole_records(path)?.0).saturating_sub(1)),
    }
}

/// Takes back all records behind the first `records` of a log that nobody writes: they will be said again.
pub fn cut(dir: &Path, records: u64) -> io::Result<()> {
    let all = match segments(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        all => all?,
    };
    for (first, path) in all.into_iter().rev() {
        if first <= records + 1 {
            let (_, bytes) = count_records(&path, records + 1 - first)?;
            return OpenOptions::new().write(true).open(path)?.set_len(bytes);
        }
        fs::remove_file(path)?;
    }
    // By a segment's name the next record has its number.
    File::create(segment(dir, records + 1)).map(drop)
}

/// Counts the whole records of a segment, and their bytes.
fn whole_records(path: &Path) -> io::Result<(u64, u64)> {
    count_records(path, u64::MAX)
}

/// Of the first `most` records.
fn count_records(path: &Path, most: u64) -> io::Result<(u64, u64)> {
    let mut segment = Segment::open(path)?;
    let mut count = 0;
    while count < most && segment.next(|_| ())?.is_some() {
        count += 1;
    }
    Ok((count, segment.offset))
}

/// A segment being read; what is behind `offset` is not yet read, or torn.
struct Segment {
    file: File,
    buffer: Vec<u8>,
    used: usize,
    offset: u64,
}

impl Segment {
    fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { file: File::open(path)?, buffer: Vec::new(), used: 0, offset: 0 })
    }

    /// The next whole record; `None` at the end, which may grow later.
    fn next<T>(&mut self, take: impl FnOnce(Record<'_>) -> T) -> io::Result<Option<T>> {
        loop {
            match read_record(&self.buffer[self.used..]) {
                Ok((record, length)) => {
                    self.used += length;
                    self.offset += length as u64;
                    return Ok(Some(take(record)));
                }
                Err(RecordError::Torn) => {
                    if !self.fill()? {
                        return Ok(None);
                    }
                }
                Err(RecordError::Header(_)) => return Ok(None),
            }
        }
    }

    fn fill(&mut self) -> io::Result<bool> {
        self.buffer.drain(..self.used);
        self.used = 0;
        self.file.seek(SeekFrom::Start(self.offset + self.buffer.len() as u64))?;
        Ok((&mut self.file).take(READ_BYTES as u64).read_to_end(&mut self.buffer)? > 0)
    }
}

/// A record that owns its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedRecord {
    pub seq: u64,
    pub at: Timestamp,
    pub stream: Stream,
    pub container: ContainerName,
    pub bytes: Vec<u8>,
}

/// Reads a log while its shim may be writing it. An end is no end: ask again when the shim reports more.
pub struct Reader {
    dir: PathBuf,
    /// With the seq of its first record.
    current: Option<(u64, Segment)>,
    next_seq: u64,
}

/// Records from `seq` on, or from the oldest kept after it.
pub fn read_from(dir: &Path, seq: u64) -> Reader {
    Reader { dir: dir.to_owned(), current: None, next_seq: seq.max(1) }
}

impl Iterator for Reader {
    type Item = io::Result<OwnedRecord>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

impl Reader {
    fn read(&mut self) -> io::Result<Option<OwnedRecord>> {
        loop {
            let (first, segment) = match &mut self.current {
                Some(current) => current,
                None => match self.open_next()? {
                    Some(opened) => self.current.insert(opened),
                    None => return Ok(None),
                },
            };
            let wanted = self.next_seq;
            let owned = |r: Record<'_>| {
                let Record { seq, at, stream, container, bytes } = r;
                (seq >= wanted).then(|| OwnedRecord { seq, at, stream, container, bytes: bytes.to_vec() })
            };
            match segment.next(owned) {
                Ok(Some(Some(record))) => {
                    self.next_seq = record.seq.saturating_add(1);
                    return Ok(Some(record));
                }
                Ok(Some(None)) => {}
                end @ (Ok(None) | Err(_)) => {
                    // The writer begins a segment only behind a whole record: a later one means that this is read, and
                    // where records lack between the two, or there are none, a damaged disk has lost them.
                    let later = |other: &u64| *other > *first;
                    let Some(next) = segments(&self.dir)?.into_iter().map(|(other, _)| other).find(later)
                    else {
                        return end.map(|_| None);
                    };
                    self.next_seq = wanted.max(next);
                    self.current = None;
                }
            }
        }
    }

    /// The segment that holds `next_seq`, or the oldest behind it.
    fn open_next(&self) -> io::Result<Option<(u64, Segment)>> {
        let all = match segments(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            all => all?,
        };
        let holder = all.iter().rposition(|(first, _)| *first <= self.next_seq).unwrap_or(0);
        let Some((first, path)) = all.get(holder) else { return Ok(None) };
        match Segment::open(path) {
            Ok(segment) => Ok(Some((*first, segment))),
            // Dropped in this moment: a newer one is the oldest now.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn name() -> ContainerName {
        ContainerName::parse("main").unwrap()
    }

    fn put(writer: &mut Writer, text: &str) {
        writer.append(Timestamp(5), &name(), Stream::Stdout, text.as_bytes());
    }

    fn all(dir: &Path, from: u64) -> Vec<(u64, String)> {
        let text = |record: OwnedRecord| (record.seq, String::from_utf8(record.bytes).unwrap());
        read_from(dir, from).map(|record| text(record.unwrap())).collect()
    }

    #[test]
    fn what_a_full_disk_did_not_take_is_told_where_the_log_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path(), Bytes(1 << 20)).unwrap();
        put(&mut writer, "one\n");
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let file = std::mem::replace(&mut writer.file, full);
        put(&mut writer, "two\n");
        put(&mut writer, "three\n");
        writer.file = file;
        put(&mut writer, "four\n");
        put(&mut writer, "five\n");
        let told = "berth: 10 bytes of output are missing here: No space left on device (os error 28)\n";
        let all = all(dir.path(), 1);
        let want = [(1, "one\n"), (2, told), (3, "four\n"), (4, "five\n")];
        assert_eq!(all, want.map(|(seq, text)| (seq, text.to_owned())));
    }

    #[test]
    fn the_seq_goes_on_over_runs_and_a_torn_end_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path(), Bytes(1 << 20)).unwrap();
        put(&mut writer, "one\n");
        put(&mut writer, "two\n");
        drop(writer);
        let mut file = OpenOptions::new().append(true).open(segment(dir.path(), 1)).unwrap();
        file.write_all(b"3 5 o main 100\nhalf").unwrap();
        let mut writer = Writer::open(dir.path(), Bytes(1 << 20)).unwrap();
        assert_eq!(writer.last_seq(), 2);
        put(&mut writer, "three\n");
        let expect: Vec<(u64, String)> =
            [(1, "one\n"), (2, "two\n"), (3, "three\n")].map(|(n, t)| (n, t.to_owned())).into();
        assert_eq!(all(dir.path(), 0), expect);
        assert_eq!(all(dir.path(), 3), expect[2..]);
    }

    /// ext4 knows a file's new length before it has written what is in it.
    #[test]
    fn of_what_a_power_cut_has_left_records_alone_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path(), Bytes(SEGMENTS * SEGMENT_BYTES_MIN)).unwrap();
        let text = "x".repeat(1000);
        (1..=100).for_each(|_| put(&mut writer, &text));
        let (_, last) = segments(dir.path()).unwrap().pop().unwrap();
        let bytes = fs::metadata(&last).unwrap().len();
        let file = OpenOptions::new().append(true).open(&last).unwrap();
        for torn in [0, 1, 300, 4096] {
            file.set_len(bytes + torn).unwrap();
            let mut taken = Vec::new();
            for (file, whole) in super::whole(dir.path()).unwrap() {
                file.take(whole).read_to_end(&mut taken).unwrap();
            }
            let mut records = 0;
            let mut rest = taken.as_slice();
            while let Ok((_, length)) = read_record(rest) {
                (records, rest) = (records + 1, &rest[length..]);
            }
            assert_eq!((records, rest), (100, &[][..]), "{torn} bytes more");
        }
    }

    #[test]
    fn a_reader_gets_past_what_a_damaged_disk_has_lost() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path(), Bytes(SEGMENTS * SEGMENT_BYTES_MIN)).unwrap();
        let text = "x".repeat(1000);
        (1..=100).for_each(|_| put(&mut writer, &text));
        let (_, path) = segments(dir.path()).unwrap().remove(0);
        let file = OpenOptions::new().write(true).open(path).unwrap();
        let half = file.metadata().unwrap().len() / 2;
        let seqs = || -> Vec<u64> { all(dir.path(), 1).into_iter().map(|(seq, _)| seq).collect() };
        // Bytes that are no record, then none at all.
        file.write_all_at(&b"?? no record\n".repeat(200), half).unwrap();
        let noise = seqs();
        file.set_len(half).unwrap();
        for seqs in [noise, seqs()] {
            assert!(seqs.is_sorted() && seqs.len() < 90, "{seqs:?}");
            assert_eq!((seqs[0], *seqs.last().unwrap()), (1, 100));
        }
    }

    #[test]
    fn what_will_be_said_again_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let total = Bytes(SEGMENTS * SEGMENT_BYTES_MIN);
        let mut writer = Writer::open(dir.path(), total).unwrap();
        let text = "x".repeat(1000);
        (1..=200).for_each(|_| put(&mut writer, &text));
        drop(writer);
        for last in [500, 150, 64, 3, 0] {
            cut(dir.path(), last).unwrap();
            let left = last_seq(dir.path()).unwrap();
            assert_eq!(left, last.min(200));
            assert_eq!(all(dir.path(), 1).len() as u64, left);
        }
        let mut writer = Writer::open(dir.path(), total).unwrap();
        put(&mut writer, "again\n");
        assert_eq!(all(dir.path(), 1), [(1, "again\n".to_owned())]);
        cut(&dir.path().join("none"), 1).unwrap();
        // The records before were dropped with their segment.
        fs::rename(segment(dir.path(), 1), segment(dir.path(), 50)).unwrap();
        cut(dir.path(), 20).unwrap();
        assert_eq!(Writer::open(dir.path(), total).unwrap().last_seq(), 20);
    }

    #[test]
    fn old_segments_go_and_a_reader_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let total = SEGMENTS * SEGMENT_BYTES_MIN;
        let mut writer = Writer::open(dir.path(), Bytes(total)).unwrap();
        let text = "x".repeat(1000);
        let mut reader = read_from(dir.path(), 1);
        for seq in 1..=2000 {
            put(&mut writer, &text);
            assert_eq!(reader.next().map(|r| r.unwrap().seq), Some(seq));
            assert!(reader.next().is_none());
        }
        let kept = all(dir.path(), 1);
        assert_eq!(kept.last().unwrap().0, 2000);
        assert!(kept[0].0 > 1, "nothing was dropped");
        assert!(kept.windows(2).all(|pair| pair[0].0 + 1 == pair[1].0));
        let bytes: u64 =
            segments(dir.path()).unwrap().iter().map(|(_, path)| fs::metadata(path).unwrap().len()).sum();
        assert!(bytes <= total, "{bytes} > {total}");
    }
}
