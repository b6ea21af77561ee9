//! Owns the reading of hostile tar streams (POSIX pax, ustar, GNU long names): bounded, sequential, no seeking; it
//! interprets headers and touches no file.
//!
//! The crate `tar` parses single headers here. Its iterator is not used: it reads extension records of any size
//! into memory, and splits pax records at newlines, which binary extended attributes may contain. Where readers
//! disagree about a stream, this one does as Go's archive/tar, which every other container runtime uses.

use std::io::{self, Read};
use std::ops::Range;

use tar::{EntryType, Header};

/// Of a whole path or link target: Linux' PATH_MAX, less its zero.
const PATH_BYTES_MAX: usize = 4095;
/// Of one pax record block or GNU long name: a little more than the largest extended attribute needs.
const EXTENSION_BYTES_MAX: u64 = 1 << 20;
/// Extension headers before one entry; writers use at most three.
const EXTENSIONS_MAX: u32 = 8;
const XATTRS_MAX: usize = 64;
const BLOCK_BYTES: u64 = 512;

/// Where a header has its numbers (POSIX.1-2024, pax, "ustar Interchange Format").
const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const MTIME: Range<usize> = 136..148;
const DEVICE_MAJOR: Range<usize> = 329..337;
const DEVICE_MINOR: Range<usize> = 337..345;

#[derive(Debug, thiserror::Error)]
pub(super) enum TarError {
    #[error("{0}")]
    Malformed(String),
    #[error(transparent)]
    Read(#[from] io::Error),
}

fn malformed(why: impl Into<String>) -> TarError {
    TarError::Malformed(why.into())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    Symlink,
    HardLink,
    /// Major and minor number.
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// One member of an archive, as it claims to be.
#[derive(Debug)]
pub(super) struct Entry {
    /// As written: it may be absolute, have `..`, or be empty; it has no zero byte.
    pub path: Vec<u8>,
    /// Target of a symbolic or hard link; no zero byte.
    pub link: Vec<u8>,
    pub kind: Kind,
    /// Permission bits with set-id and sticky, nothing else.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Unix time in seconds, and nanoseconds.
    pub mtime: (i64, u32),
    /// Bytes of data that follow; 0 unless a file.
    pub size: u64,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Walks a tar stream; as a [`Read`] it yields the data of the entry last returned.
pub(super) struct TarStream<R> {
    inner: R,
    /// Data of the current entry not read yet.
    data_left: u64,
    padding: u64,
    position: u64,
}

impl<R: Read> TarStream<R> {
    pub fn new(inner: R) -> TarStream<R> {
        TarStream { inner, data_left: 0, padding: 0, position: 0 }
    }

    /// How many bytes of the stream have been consumed.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next entry, `None` at the end of the archive.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip(self.data_left + self.padding)?;
        (self.data_left, self.padding) = (0, 0);
        let mut extensions = Extensions::default();
        for _ in 0..=EXTENSIONS_MAX {
            let Some(header) = self.header()? else {
                return if extensions.any {
                    Err(malformed("the archive ends after an extension header"))
                } else {
                    Ok(None)
                };
            };
            let size = field(&header, SIZE)?;
            match header.entry_type() {
                EntryType::GNULongName => extensions.long_name = Some(until_zero(self.extension(size)?)),
                EntryType::GNULongLink => extensions.long_link = Some(until_zero(self.extension(size)?)),
                EntryType::XHeader => extensions.pax(&self.extension(size)?)?,
                // Global records describe the archive (git puts a comment there); docker ignores them too.
                EntryType::XGlobalHeader => {
                    self.extension(size)?;
                    continue;
                }
                kind => return self.entry(&header, kind, size, extensions).map(Some),
            }
            extensions.any = true;
        }
        Err(malformed("too many extension headers before one entry"))
    }

    /// Reads what is left of the stream, so that a digest covers all of it.
    pub fn finish(mut self) -> io::Result<()> {
        io::copy(&mut self.inner, &mut io::sink()).map(drop)
    }

    fn entry(
        &mut self,
        header: &Header,
        kind: EntryType,
        header_size: u64,
        extensions: Extensions,
    ) -> Result<Entry, TarError> {
        let path =
            extensions.path.or(extensions.long_name).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extensions
            .link
            .or(extensions.long_link)
            .or_else(|| header.link_name_bytes().map(|link| link.into_owned()))
            .unwrap_or_default();
        if path.len() > PATH_BYTES_MAX || link.len() > PATH_BYTES_MAX {
            return Err(malformed(format!("a path is longer than {PATH_BYTES_MAX} bytes")));
        }
        if path.contains(&0) || link.contains(&0) {
            return Err(malformed("a path contains a zero byte"));
        }
        let device = || {
            let number = |range| {
                u32::try_from(field(header, range)?).map_err(|_| malformed("a device number is out of range"))
            };
            Ok::<_, TarError>((number(DEVICE_MAJOR)?, number(DEVICE_MINOR)?))
        };
        let kind = match kind {
            // Before POSIX a directory was a file whose name ends with a slash.
            EntryType::Regular if path.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous => Kind::File,
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Link => Kind::HardLink,
            EntryType::Fifo => Kind::Fifo,
            EntryType::Char => device().map(|(major, minor)| Kind::CharDevice(major, minor))?,
            EntryType::Block => device().map(|(major, minor)| Kind::BlockDevice(major, minor))?,
            other => {
                return Err(malformed(format!(
                    "entry type {:?} is not supported",
                    char::from(other.as_byte())
                )));
            }
        };
        // Only files have data, whatever the header says of its size: so reads Go.
        let size = if kind == Kind::File { extensions.size.unwrap_or(header_size) } else { 0 };
        self.data_left = size;
        self.padding = size.wrapping_neg() % BLOCK_BYTES;
        size.checked_add(self.padding).ok_or_else(|| malformed("a size is out of range"))?;
        let id = |pax: Option<u64>, range| {
            let id = pax.map_or_else(|| field(header, range), Ok)?;
            // The last one means "leave it" to chown.
            u32::try_from(id)
                .ok()
                .filter(|id| *id != u32::MAX)
                .ok_or_else(|| malformed("an owner's id is out of range"))
        };
        Ok(Entry {
            uid: id(extensions.uid, UID)?,
            gid: id(extensions.gid, GID)?,
            mode: (field(header, MODE)? & 0o7777) as u32,
            mtime: match extensions.mtime {
                Some(time) => time,
                None => (i64::try_from(field(header, MTIME)?).unwrap_or(0), 0),
            },
            xattrs: extensions.xattrs,
            path,
            link,
            kind,
            size,
        })
    }

    /// A header block; `None` for the end mark, or where the stream ends without one.
    fn header(&mut self) -> Result<Option<Header>, TarError> {
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        let mut filled = 0;
        while filled < block.len() {
            match self.inner.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(malformed("the archive ends within a header")),
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.position += BLOCK_BYTES;
        let bytes = header.as_bytes();
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sum = |range: &[u8]| range.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        let expected = sum(&bytes[..148]) + 8 * u32::from(b' ') + sum(&bytes[156..]);
        match header.cksum() {
            Ok(sum) if sum == expected => Ok(Some(header)),
            _ => Err(malformed("a header's checksum is wrong; this is not a tar archive or it is damaged")),
        }
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > EXTENSION_BYTES_MAX {
            return Err(malformed(format!(
                "an extension header has {size} bytes, at most {EXTENSION_BYTES_MAX} are allowed"
            )));
        }
        let mut bytes = vec![0; size as usize];
        self.inner.read_exact(&mut bytes)?;
        self.position += size;
        self.skip(size.wrapping_neg() % BLOCK_BYTES)?;
        Ok(bytes)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), TarError> {
        let skipped = io::copy(&mut (&mut self.inner).take(bytes), &mut io::sink())?;
        self.position += skipped;
        if skipped == bytes { Ok(()) } else { Err(malformed("the archive ends within an entry")) }
    }
}

impl<R: Read> Read for TarStream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.data_left).unwrap_or(usize::MAX));
        if wanted == 0 {
            return Ok(0);
        }
        let n = self.inner.read(&mut buffer[..wanted])?;
        if n == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive ends within a file"));
        }
        self.data_left -= n as u64;
        self.position += n as u64;
        Ok(n)
    }
}

/// What extension headers say about the entry that follows them.
#[derive(Default)]
struct Extensions {
    any: bool,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Extensions {
    /// Takes in pax records (`<length> <key>=<value>\n`, the length counting all of it).
    fn pax(&mut self, mut block: &[u8]) -> Result<(), TarError> {
        let broken = || malformed("a pax record is malformed");
        while !block.is_empty() {
            let space = block.iter().take(20).position(|byte| *byte == b' ').ok_or_else(broken)?;
            let length = decimal(&block[..space])
                .and_then(|length| usize::try_from(length).ok())
                .ok_or_else(broken)?;
            // The shortest record is "5 a=\n".
            if length < space + 4 || length > block.len() || block[length - 1] != b'\n' {
                return Err(broken());
            }
            let record = &block[space + 1..length - 1];
            block = &block[length..];
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(broken)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            let number = || decimal(value).ok_or_else(broken);
            match key {
                b"path" => self.path = Some(value.to_vec()).filter(|value| !value.is_empty()),
                b"linkpath" => self.link = Some(value.to_vec()).filter(|value| !value.is_empty()),
                b"size" => self.size = Some(number()?),
                b"uid" => self.uid = Some(number()?),
                b"gid" => self.gid = Some(number()?),
                b"mtime" => self.mtime = Some(timestamp(value).ok_or_else(broken)?),
                _ if key.starts_with(b"GNU.sparse.") => {
                    return Err(malformed("sparse entries are not supported"));
                }
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        self.xattrs.retain(|(known, _)| known != name);
                        self.xattrs.push((name.to_vec(), value.to_vec()));
                        if self.xattrs.len() > XATTRS_MAX {
                            return Err(malformed(format!(
                                "an entry has more than {XATTRS_MAX} extended attributes"
                            )));
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// A number of a header: octal digits, or GNU's base 256 for what is too large for them. An empty field is 0: the
/// crate `tar` calls that an error, and real archives have it.
fn field(header: &Header, range: Range<usize>) -> Result<u64, TarError> {
    let bytes = &header.as_bytes()[range];
    let number = if bytes[0] & 0x80 != 0 {
        // The next bit is the sign; a time before 1970 is the only negative number in use, and counts as 1970.
        match bytes[0] & 0x40 {
            0 => bytes[1..].iter().try_fold(u64::from(bytes[0] & 0x3f), |sum, byte| {
                sum.checked_mul(256).map(|sum| sum | u64::from(*byte))
            }),
            _ => Some(0),
        }
    } else {
        let digits = bytes.split(|byte| *byte == 0).next().unwrap_or_default().trim_ascii();
        let digit = |byte: &u8| matches!(byte, b'0'..=b'7').then(|| u64::from(byte - b'0'));
        digits.iter().try_fold(0_u64, |sum, byte| sum.checked_mul(8)?.checked_add(digit(byte)?))
    };
    number.ok_or_else(|| malformed("a number in a header is malformed"))
}

fn until_zero(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
    bytes
}

fn decimal(digits: &[u8]) -> Option<u64> {
    let plain = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    plain.then(|| std::str::from_utf8(digits).ok()?.parse().ok()).flatten()
}

/// `[-]seconds[.fraction]`, as pax writes times.
fn timestamp(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(text) => (true, text),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or(b"");
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    Some(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block(kind: EntryType, name: &str, size: u64) -> Vec<u8> {
        let mut header = Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o100644);
        header.set_cksum();
        header.as_bytes().to_vec()
    }

    fn padded(bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    fn pax(key: &[u8], value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let length = (1..).find(|digits| (body + digits).to_string().len() == *digits).unwrap() + body;
        [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
    }

    #[test]
    fn pax_records_may_hold_newlines() {
        let value = b"\x01\n5 a=\n\x00\n";
        let records =
            [pax(b"SCHILY.xattr.user.x", value), pax(b"path", b"real/name"), pax(b"mtime", b"-1.25")]
                .concat();
        let stream = [
            block(EntryType::XHeader, "x", records.len() as u64),
            padded(&records),
            block(EntryType::Regular, "short", 3),
            padded(b"abc"),
            vec![0; 1024],
        ]
        .concat();
        let mut tar = TarStream::new(&stream[..]);
        let entry = tar.next_entry().unwrap().unwrap();
        assert_eq!(entry.path, b"real/name");
        assert_eq!(entry.xattrs, [(b"user.x".to_vec(), value.to_vec())]);
        assert_eq!(entry.mtime, (-2, 750_000_000));
        assert_eq!(entry.mode, 0o644);
        let mut data = String::new();
        tar.read_to_string(&mut data).unwrap();
        assert_eq!(data, "abc");
        assert!(tar.next_entry().unwrap().is_none());
    }

    #[test]
    fn refuses_the_unbounded() {
        let huge = [block(EntryType::GNULongName, "x", 1 << 40), vec![b'a'; 4096]].concat();
        assert!(TarStream::new(&huge[..]).next_entry().is_err());
        let endless = [block(EntryType::GNULongName, "x", 1), padded(b"a")].concat().repeat(20);
        assert!(TarStream::new(&endless[..]).next_entry().is_err());
        let long =
            [block(EntryType::GNULongName, "x", 8192), vec![b'a'; 8192], block(EntryType::Regular, "a", 0)]
                .concat();
        assert!(TarStream::new(&long[..]).next_entry().is_err());
        let cut = block(EntryType::Regular, "a", 4096);
        let mut tar = TarStream::new(&cut[..]);
        assert_eq!(tar.next_entry().unwrap().unwrap().size, 4096);
        assert!(tar.next_entry().is_err());
        for sparse in [EntryType::GNUSparse, EntryType::new(b'V')] {
            assert!(TarStream::new(&block(sparse, "a", 0)[..]).next_entry().is_err());
        }
    }

    #[test]
    fn a_link_has_no_data_whatever_it_says() {
        let stream = [block(EntryType::Link, "a", 512), block(EntryType::Regular, "b", 0)].concat();
        let mut tar = TarStream::new(&stream[..]);
        assert_eq!(tar.next_entry().unwrap().unwrap().kind, Kind::HardLink);
        assert_eq!(tar.next_entry().unwrap().unwrap().path, b"b");
    }

    proptest! {
        #[test]
        fn garbage_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..2048), kind in any::<u8>()) {
            if bytes.len() >= 512 {
                bytes[156] = kind;
                let mut header = Header::from_byte_slice(&bytes[..512]).clone();
                header.set_cksum();
                bytes[..512].copy_from_slice(header.as_bytes());
            }
            let mut tar = TarStream::new(&bytes[..]);
            while let Ok(Some(_)) = tar.next_entry() {}
        }

        #[test]
        fn pax_never_panics(bytes in "[0-9]{0,3} ?[a-z=\n]{0,20}[0-9]{0,2} ?[a-zA-Z.=\n]{0,20}") {
            let _ = Extensions::default().pax(bytes.as_bytes());
        }

        #[test]
        fn pax_round_trips(key in "[a-z]{1,9}", value in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut extensions = Extensions::default();
            extensions.pax(&pax(format!("SCHILY.xattr.{key}").as_bytes(), &value)).unwrap();
            prop_assert_eq!(extensions.xattrs, vec![(key.into_bytes(), value)]);
        }
    }
}
