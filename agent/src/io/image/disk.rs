//! Owns the store's directory: where layers, records, locks and half-made things lie, and what makes each change
//! of it whole or absent.
//!
//! ```text
//! layers/<diff id>/tree/       an unpacked layer, complete from the moment it has this name
//! layers/<diff id>/meta.json   its size; the file's modification time is the layer's last use
//! records/<key>.json           an image; written after its layers, modification time is its last use
//! locks/<diff id>              flock: exclusive to make or remove the layer, shared to rely on it
//! tmp/<worker>/                flock on the directory itself: whoever holds it is alive
//! ```

use std::cmp::Reverse;
use std::fs::{self, DirBuilder, File, FileTimes};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use berth_protocol::image::Images;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::{Digest, ImageRecord, ImageRef};
use crate::shim::sys::wide;

/// A record has at most 128 KiB of configuration and 127 layers; JSON may escape each byte into six.
const RECORD_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, Clone)]
pub(super) struct Disk {
    root: PathBuf,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct LayerMeta {
    pub bytes: u64,
    pub entries: u64,
}

/// Held while a layer is made, removed (exclusive) or relied on (shared). The kernel lets go of it with the process.
pub(super) type LayerLock = Flock<File>;

impl Disk {
    /// Opens the store at `root`, making what is missing. Only root may enter: layers hold set-id programs and
    /// device nodes.
    pub fn open(root: &Path) -> io::Result<Disk> {
        for directory in ["layers", "records", "locks", "tmp"] {
            DirBuilder::new().recursive(true).mode(0o700).create(root.join(directory))?;
        }
        Ok(Disk { root: root.to_owned() })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn layer(&self, layer: &Digest) -> PathBuf {
        self.root.join("layers").join(layer.hex())
    }

    pub fn layer_tree(&self, layer: &Digest) -> PathBuf {
        self.layer(layer).join("tree")
    }

    fn layer_meta_path(&self, layer: &Digest) -> PathBuf {
        self.layer(layer).join("meta.json")
    }

    /// Size of a layer; `None` if it is not here.
    pub fn layer_meta(&self, layer: &Digest) -> io::Result<Option<LayerMeta>> {
        match fs::read(self.layer_meta_path(layer)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub fn layer_used_ms(&self, layer: &Digest) -> io::Result<u64> {
        Ok(unix_ms(fs::metadata(self.layer_meta_path(layer))?.modified()?))
    }

    pub fn layers(&self) -> io::Result<Vec<Digest>> {
        let names = entries(&self.root.join("layers"))?;
        Ok(names.iter().filter_map(|name| Digest::from_hex(name).ok()).collect())
    }

    fn record_path(&self, reference: &ImageRef) -> PathBuf {
        let key = Digest::of(reference.to_string().as_bytes()).hex();
        self.root.join("records").join(key + ".json")
    }

    /// The record of an image whose layers are all here. A record that cannot be read counts as missing: the image
    /// is pulled again and the record replaced.
    pub fn record(&self, reference: &ImageRef) -> io::Result<Option<ImageRecord>> {
        let record = read_record(&self.record_path(reference))?;
        Ok(record.filter(|record| record.reference == *reference && self.is_complete(record)))
    }

    fn is_complete(&self, record: &ImageRecord) -> bool {
        record.layers.iter().all(|layer| self.layer_tree(layer).is_dir())
    }

    /// Of the images whose layers are all here the most recently used.
    pub fn images(&self) -> io::Result<Images> {
        let mut records = self.records()?;
        records.sort_by_key(|record| Reverse(record.last_used_ms));
        let complete = records.iter().filter(|record| self.is_complete(record));
        Ok(Images::cut(complete.map(|record| record.reference.name())))
    }

    /// All images here.
    pub fn records(&self) -> io::Result<Vec<ImageRecord>> {
        let directory = self.root.join("records");
        let mut records = Vec::new();
        for name in entries(&directory)?.iter().filter(|name| name.ends_with(".json")) {
            records.extend(read_record(&directory.join(name))?);
        }
        Ok(records)
    }

    pub fn write_record(&self, record: &ImageRecord, work: &WorkDir) -> io::Result<()> {
        let half = work.path().join("record.json");
        write_durably(&half, &serde_json::to_vec(record)?)?;
        let path = self.record_path(&record.reference);
        fs::rename(half, &path)?;
        sync_directory(&self.root.join("records"))
    }

    /// Marks an image and its layers as used now; false if the image has just been removed.
    pub fn touch(&self, record: &ImageRecord, now_ms: u64) -> io::Result<bool> {
        let times = FileTimes::new().set_modified(UNIX_EPOCH + Duration::from_millis(now_ms));
        let path = self.record_path(&record.reference);
        let touch = |path: &Path| {
            let file = File::options().append(true).open(path)?;
            file.set_times(times)?;
            file.metadata()
        };
        let touched = || {
            let inode = touch(&path)?.ino();
            for layer in &record.layers {
                touch(&self.layer_meta_path(layer))?;
            }
            // Whoever removes a record takes its name away first and looks at its time after: see `remove_record`.
            Ok(fs::metadata(&path)?.ino() == inode)
        };
        touched().or_else(|error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Ok(false),
            _ => Err(error),
        })
    }

    /// Removes a record that has not been used since `unused_since_ms`; false if it was.
    pub fn remove_record(&self, record: &ImageRecord, unused_since_ms: u64) -> io::Result<bool> {
        let path = self.record_path(&record.reference);
        let aside = path.with_extension("removing");
        fs::rename(&path, &aside)?;
        if unix_ms(fs::metadata(&aside)?.modified()?) > unused_since_ms {
            fs::rename(&aside, &path)?;
            return Ok(false);
        }
        fs::remove_file(&aside)?;
        Ok(true)
    }

    /// Locks a layer if nobody else has it.
    ///
    /// A lock file is removed together with its layer, by whoever has it exclusively; so after getting a lock, what
    /// was locked must still be what has the name.
    pub fn try_lock(&self, layer: &Digest, exclusive: bool) -> io::Result<Option<LayerLock>> {
        let path = self.root.join("locks").join(layer.hex());
        let how = if exclusive { FlockArg::LockExclusiveNonblock } else { FlockArg::LockSharedNonblock };
        loop {
            let file = File::options().create(true).truncate(false).write(true).open(&path)?;
            let inode = file.metadata()?.ino();
            match Flock::lock(file, how) {
                Ok(lock) if fs::metadata(&path).is_ok_and(|metadata| metadata.ino() == inode) => {
                    return Ok(Some(lock));
                }
                Ok(_) => {}
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Ok(None),
                Err((_, errno)) => return Err(errno.into()),
            }
        }
    }

    /// Takes the lock's file away; only under the exclusive lock.
    fn remove_lock(&self, layer: &Digest, _exclusive: &LayerLock) -> io::Result<()> {
        fs::remove_file(self.root.join("locks").join(layer.hex()))
    }

    /// Makes an unpacked layer, a directory of `work` with `tree` in it, the store's.
    pub fn commit_layer(
        &self,
        layer: &Digest,
        half: &Path,
        meta: LayerMeta,
        _exclusive: &LayerLock,
    ) -> io::Result<()> {
        write_durably(&half.join("meta.json"), &serde_json::to_vec(&meta)?)?;
        // One call for perhaps 100,000 files; it also reports what could not be written back.
        nix::unistd::syncfs(File::open(half)?)?;
        fs::rename(half, self.layer(layer))?;
        sync_directory(&self.root.join("layers"))
    }

    /// Removes a layer; it is gone at once, its files within this call.
    pub fn remove_layer(&self, layer: &Digest, work: &WorkDir, exclusive: &LayerLock) -> io::Result<()> {
        let aside = work.path().join(layer.hex());
        fs::rename(self.layer(layer), &aside)?;
        self.remove_lock(layer, exclusive)?;
        fs::remove_dir_all(aside)
    }

    /// A directory for half-made things, removed when dropped, or by [`Disk::sweep`] after its owner's death.
    pub fn work_dir(&self) -> io::Result<WorkDir> {
        loop {
            let name = format!("{}-{}", std::process::id(), unix_ns());
            let path = self.root.join("tmp").join(name);
            DirBuilder::new().mode(0o700).create(&path)?;
            // Between making and locking it a sweep may take it for a dead worker's.
            match lock_directory(&path)? {
                Some(lock) => return Ok(WorkDir { path, _lock: lock }),
                None => continue,
            }
        }
    }

    /// Removes what dead workers left behind; returns how many things that were.
    pub fn sweep(&self) -> io::Result<u32> {
        let mut removed = 0;
        for name in entries(&self.root.join("tmp"))? {
            let path = self.root.join("tmp").join(name);
            if let Some(_lock) = lock_directory(&path)? {
                fs::remove_dir_all(&path)?;
                removed += 1;
            }
        }
        for name in entries(&self.root.join("locks"))? {
            let Ok(layer) = Digest::from_hex(&name) else { continue };
            if let Some(lock) = self.try_lock(&layer, true)?
                && !self.layer(&layer).exists()
            {
                self.remove_lock(&layer, &lock)?;
            }
        }
        for name in entries(&self.root.join("records"))?.iter().filter(|name| name.ends_with(".removing")) {
            fs::remove_file(self.root.join("records").join(name))?;
            removed += 1;
        }
        Ok(removed)
    }

    /// Per mille of the file system that is taken, as `df` counts.
    pub fn used_permille(&self) -> io::Result<u64> {
        let stat = nix::sys::statvfs::statvfs(&self.root)?;
        let used = wide(stat.blocks()) - wide(stat.blocks_free());
        let usable = used + wide(stat.blocks_available());
        Ok(used * 1000 / usable.max(1))
    }
}

/// A worker's own directory for half-made things.
pub(super) struct WorkDir {
    path: PathBuf,
    _lock: Flock<File>,
}

impl WorkDir {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        // What remains is removed by the next sweep.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The lock on a directory, `None` if somebody has it or the directory went away meanwhile.
fn lock_directory(path: &Path) -> io::Result<Option<Flock<File>>> {
    let lock = || {
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) if fs::metadata(path)?.ino() == inode => Ok(Some(lock)),
            Ok(_) | Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(errno.into()),
        }
    };
    lock().or_else(|error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Ok(None),
        _ => Err(error),
    })
}

fn read_record(path: &Path) -> io::Result<Option<ImageRecord>> {
    let read = || {
        let metadata = fs::metadata(path)?;
        if metadata.len() > RECORD_BYTES_MAX {
            return Ok(None);
        }
        let record: Option<ImageRecord> = serde_json::from_slice(&fs::read(path)?).ok();
        let last_used_ms = unix_ms(metadata.modified()?);
        Ok(record.map(|record| ImageRecord { last_used_ms, ..record }))
    };
    read().or_else(|error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Ok(None),
        _ => Err(error),
    })
}

fn entries(directory: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(directory)?
        .filter_map(|entry| entry.map(|entry| entry.file_name().into_string().ok()).transpose())
        .collect()
}

fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn unix_ms(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn unix_ns() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos())
}

/// Unix time in ms.
pub(super) fn now_ms() -> u64 {
    unix_ms(SystemTime::now())
}
