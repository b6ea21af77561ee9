//! The working directory on its way to another node: an archive, without what `.berthignore` names.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read, Seek as _, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use berth_protocol::ids::{Digest, Namespace};
use berth_protocol::limits::WORKSPACE_BYTES_MAX;
use berth_protocol::units::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use ignore::gitignore::{Gitignore, GitignoreBuilder};
use sha2::{Digest as _, Sha256};

use super::connect::Session;
use super::depot::Depot;
use super::render;

/// Files and directories at most.
const ENTRIES_MAX: usize = 100_000;
pub const IGNORE_FILE: &str = ".berthignore";

/// A packed directory.
pub struct Packed {
    pub digest: Digest,
    pub bytes: Bytes,
    file: File,
}

/// Packs `dir` and brings it to the depot, where it is not there already.
pub async fn take_along(session: &mut Session, namespace: &Namespace, dir: &Path) -> anyhow::Result<Packed> {
    let progress = Progress::new();
    let packed = pack(dir, WORKSPACE_BYTES_MAX, &progress)?;
    let depot = Depot::of(session, namespace).await?;
    let Packed { digest, bytes, mut file } = packed;
    // Beside the runtime's thread, which keeps the session with the broker alive meanwhile.
    let (progress, file) = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        if !depot.has(&digest)? {
            file.rewind()?;
            depot.put(&digest, bytes.0, progress.reader(&mut file, bytes))?;
        }
        Ok((progress, file))
    })
    .await??;
    progress.clear();
    Ok(Packed { digest, bytes, file })
}

/// Makes the archive, of `bytes_max` at most, in an unnamed file.
fn pack(dir: &Path, bytes_max: u64, progress: &Progress) -> anyhow::Result<Packed> {
    let too_much = || {
        anyhow!(
            "{} is too much to take along ({} packed, {ENTRIES_MAX} files at most): name in {IGNORE_FILE} what the \
             job does not need, or use --no-workspace",
            dir.display(),
            render::size(Bytes(bytes_max))
        )
    };
    let rules = rules(dir)?;
    let mut entries = Vec::new();
    list(dir, &rules, &mut entries).with_context(|| format!("cannot read {}", dir.display()))?;
    if entries.len() > ENTRIES_MAX {
        return Err(too_much());
    }
    let sink = Sink { file: tempfile::tempfile()?, hash: Sha256::new(), bytes: 0, bytes_max };
    let mut archive = tar::Builder::new(GzEncoder::new(sink, Compression::fast()));
    archive.follow_symlinks(false);
    for relative in entries {
        progress.show("packing", Bytes(archive.get_ref().get_ref().bytes), None);
        let path = dir.join(&relative);
        match append(&mut archive, &path, &relative) {
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => return Err(too_much()),
            result => result.with_context(|| format!("cannot pack {}", path.display()))?,
        }
    }
    let finished = archive.into_inner().and_then(GzEncoder::finish);
    let sink = match finished {
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => return Err(too_much()),
        result => result?,
    };
    let hex: String = sink.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Packed { digest: Digest::parse(&format!("sha256:{hex}"))?, bytes: Bytes(sink.bytes), file: sink.file })
}

fn rules(dir: &Path) -> anyhow::Result<Gitignore> {
    let path = dir.join(IGNORE_FILE);
    let mut builder = GitignoreBuilder::new(dir);
    if path.exists()
        && let Some(error) = builder.add(&path)
    {
        return Err(super::Usage::new(format!("{}: {error}", path.display())).into());
    }
    Ok(builder.build()?)
}

/// Everything below `dir` that goes along, relative to it, sorted, directories before what they hold.
fn list(dir: &Path, rules: &Gitignore, entries: &mut Vec<PathBuf>) -> io::Result<()> {
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let mut names: Vec<_> = std::fs::read_dir(dir.join(&relative))?.collect::<Result<_, _>>()?;
        names.sort_by_key(std::fs::DirEntry::file_name);
        for entry in names {
            let path = relative.join(entry.file_name());
            let kind = entry.file_type()?;
            // Sockets, pipes and devices mean nothing elsewhere.
            let travels = kind.is_dir() || kind.is_file() || kind.is_symlink();
            if !travels || rules.matched(&path, kind.is_dir()).is_ignore() {
                continue;
            }
            if kind.is_dir() {
                pending.push(path.clone());
            }
            entries.push(path);
            if entries.len() > ENTRIES_MAX {
                return Ok(());
            }
        }
    }
    entries.sort();
    Ok(())
}

fn append<W: Write>(archive: &mut tar::Builder<W>, path: &Path, relative: &Path) -> io::Result<()> {
    let meta = std::fs::symlink_metadata(path)?;
    let mut header = tar::Header::new_gnu();
    header.set_mode(meta.mode() & 0o7777);
    header.set_mtime(u64::try_from(meta.mtime()).unwrap_or_default());
    // Ids of this machine's users mean nothing elsewhere.
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    if meta.is_symlink() {
        header.set_entry_type(tar::EntryType::Symlink);
        return archive.append_link(&mut header, relative, std::fs::read_link(path)?);
    }
    if meta.is_dir() {
        header.set_entry_type(tar::EntryType::Directory);
        return archive.append_data(&mut header, relative, io::empty());
    }
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(meta.len());
    // A file that changes meanwhile keeps the length that its header has promised.
    let content = File::open(path)?.chain(io::repeat(0)).take(meta.len());
    archive.append_data(&mut header, relative, content)
}

/// Counts, digests and bounds what is written.
struct Sink {
    file: File,
    hash: Sha256,
    bytes: u64,
    bytes_max: u64,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.bytes += written as u64;
        if self.bytes > self.bytes_max {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One line on stderr, where that is a terminal.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    terminal: bool,
}

impl Progress {
    pub fn new() -> Self {
        Self { terminal: io::stderr().is_terminal() }
    }

    fn show(self, what: &str, done: Bytes, all: Option<Bytes>) {
        if self.terminal {
            let all = all.map(|all| format!(" of {}", render::size(all))).unwrap_or_default();
            eprint!("\r\x1b[K{what}: {}{all}", render::size(done));
        }
    }

    pub fn clear(self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }

    pub fn reader<R: Read>(self, inner: R, all: Bytes) -> impl Read {
        Counted { inner, done: 0, all, progress: self }
    }
}

struct Counted<R> {
    inner: R,
    done: u64,
    all: Bytes,
    progress: Progress,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        let before = self.done;
        self.done += read as u64;
        // A line a megabyte is plenty.
        if before >> 20 != self.done >> 20 {
            self.progress.show("copying", Bytes(self.done), Some(self.all));
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn unpacked(packed: &mut Packed) -> BTreeMap<String, (u32, String)> {
        packed.file.rewind().unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(&mut packed.file));
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            if let Some(link) = entry.link_name().unwrap() {
                text = format!("-> {}", link.display());
            }
            (path, (entry.header().mode().unwrap(), text))
        });
        entries.collect()
    }

    #[test]
    fn what_goes_along() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write(".berthignore", "*.log\n/data\n!keep.log\n");
        write("train.py", "print()");
        write("a.log", "x");
        write("keep.log", "y");
        write("data/big", "z");
        write("src/data/small", "w");
        write(&format!("{}/deep", "long".repeat(40)), "v");
        std::os::unix::fs::symlink("train.py", dir.path().join("main.py")).unwrap();
        std::fs::set_permissions(
            dir.path().join("train.py"),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();

        let progress = Progress { terminal: false };
        let mut packed = pack(dir.path(), WORKSPACE_BYTES_MAX, &progress).unwrap();
        let files = unpacked(&mut packed);
        let names: Vec<&str> =
            files.keys().map(String::as_str).filter(|name| !name.starts_with("long")).collect();
        let want = [".berthignore", "keep.log", "main.py", "src", "src/data", "src/data/small", "train.py"];
        assert_eq!(names, want);
        assert_eq!(files["train.py"], (0o755, "print()".into()));
        assert_eq!(files["main.py"].1, "-> train.py");
        assert_eq!(files[&format!("{}/deep", "long".repeat(40))].1, "v");
        // The same directory is the same blob: it travels once.
        assert_eq!(pack(dir.path(), WORKSPACE_BYTES_MAX, &progress).unwrap().digest, packed.digest);
        packed.file.rewind().unwrap();
        let mut bytes = Vec::new();
        packed.file.read_to_end(&mut bytes).unwrap();
        assert_eq!((Digest::of(&bytes), bytes.len() as u64), (packed.digest, packed.bytes.0));
    }

    #[test]
    fn too_much_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = File::create(dir.path().join("noise")).unwrap();
        // Noise does not compress: a linear congruential generator is enough of it.
        let mut state = 1u64;
        let mut block = vec![0u8; 1 << 20];
        for _ in 0..2 {
            for chunk in block.chunks_exact_mut(8) {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                chunk.copy_from_slice(&(state ^ state >> 29).wrapping_mul(0x9E3779B97F4A7C15).to_le_bytes());
            }
            file.write_all(&block).unwrap();
        }
        let error = pack(dir.path(), 1 << 20, &Progress { terminal: false }).err().unwrap().to_string();
        assert!(error.contains("1Mi packed") && error.contains("--no-workspace"), "{error}");
    }
}
