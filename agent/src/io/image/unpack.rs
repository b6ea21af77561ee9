//! Owns the turning of one layer's tar stream into a directory that overlayfs can take as a lower one; it writes
//! below that directory and nowhere else, whatever the stream says.
//!
//! Every path is resolved by the kernel with `openat2(RESOLVE_IN_ROOT)`, so that symbolic links in the layer lead
//! to places in the layer; the last component is never followed. `..` in a path is refused. Whiteouts (OCI image
//! specification, "layer.md") become overlayfs' own: a character device 0:0, or `trusted.overlay.opaque`.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{
    FileStat, Mode, SFlag, UtimensatFlags, fchmod, fstatat, futimens, makedev, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat};
use xattr::FileExt;

use super::error::clip;
use super::tar_stream::{Entry, Kind, TarError, TarStream};
use crate::shim::sys::time_spec;

/// Twice what the largest images in use have; each costs an inode.
const ENTRIES_MAX: u64 = 2_000_000;
const NAME_BYTES_MAX: usize = 255;
const COPY_BUFFER_BYTES: usize = 256 << 10;
/// The kernel gives EAGAIN when something was renamed anywhere while it walked a `..` in a symbolic link.
const RESOLVE_ATTEMPTS_MAX: u32 = 100;
const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// AUFS' own bookkeeping, of which only the opaque mark means something to others.
const WHITEOUT_META_PREFIX: &[u8] = b".wh..wh.";
const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";
const OPAQUE_XATTR: &str = "trusted.overlay.opaque";

#[derive(Debug, thiserror::Error)]
pub(super) enum UnpackError {
    #[error("{0}")]
    Malformed(String),
    #[error("{entry}: {why}")]
    Entry { entry: String, why: String },
    /// The layer could not be read.
    #[error("{0}")]
    Read(#[source] io::Error),
    /// This machine could not write it.
    #[error("{entry}: {source}")]
    Write { entry: String, source: io::Error },
}

impl From<TarError> for UnpackError {
    fn from(error: TarError) -> UnpackError {
        match error {
            TarError::Malformed(why) => UnpackError::Malformed(why),
            TarError::Read(error) => UnpackError::Read(error),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unpacked {
    /// Sum of the sizes of files.
    pub bytes: u64,
    pub entries: u64,
}

/// Unpacks `layer`, an uncompressed tar stream, to its very end into `root`, an existing empty directory.
///
/// How much may be read is the reader's to bound. After an error the directory holds a part of the layer.
pub(super) fn unpack(layer: impl Read, root: &Path) -> Result<Unpacked, UnpackError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = nix::fcntl::open(root, flags, Mode::empty())
        .map_err(|errno| UnpackError::Write { entry: root.display().to_string(), source: errno.into() })?;
    let mut tree =
        Tree { root: Rc::new(root.into()), parent: None, directory_times: Vec::new(), buffer: Vec::new() };
    tree.buffer.resize(COPY_BUFFER_BYTES, 0);
    let mut tar = TarStream::new(layer);
    let mut unpacked = Unpacked { bytes: 0, entries: 0 };
    while let Some(entry) = tar.next_entry()? {
        unpacked.entries += 1;
        unpacked.bytes = unpacked.bytes.saturating_add(entry.size);
        if unpacked.entries > ENTRIES_MAX {
            return Err(UnpackError::Malformed(format!("it has more than {ENTRIES_MAX} entries")));
        }
        tree.place(&entry, &mut tar).map_err(|error| error.of(&entry))?;
    }
    tree.set_directory_times();
    tar.finish().map_err(UnpackError::Read)?;
    Ok(unpacked)
}

/// An error before it is known to which entry it belongs.
#[derive(Debug)]
enum PlaceError {
    Hostile(&'static str),
    Read(io::Error),
    Write(io::Error),
}

impl PlaceError {
    fn of(self, entry: &Entry) -> UnpackError {
        let entry = clip(&String::from_utf8_lossy(&entry.path));
        match self {
            PlaceError::Hostile(why) => UnpackError::Entry { entry, why: why.to_owned() },
            PlaceError::Read(error) => UnpackError::Read(error),
            PlaceError::Write(source) => UnpackError::Write { entry, source },
        }
    }
}

impl From<Errno> for PlaceError {
    fn from(errno: Errno) -> PlaceError {
        match errno {
            // What a path can do to us by its own shape; anything else is this machine's fault.
            Errno::ELOOP => PlaceError::Hostile("its path has a loop of symbolic links"),
            Errno::ENOTDIR => PlaceError::Hostile("a part of its path is not a directory"),
            Errno::ENAMETOOLONG => PlaceError::Hostile("its path is too long"),
            Errno::EMLINK => PlaceError::Hostile("its file has too many hard links"),
            errno => PlaceError::Write(errno.into()),
        }
    }
}

impl From<io::Error> for PlaceError {
    fn from(error: io::Error) -> PlaceError {
        PlaceError::Write(error)
    }
}

/// What was at a name before an entry took it.
#[derive(PartialEq, Eq)]
enum Before {
    Nothing,
    Whiteout,
    Directory,
}

struct Tree {
    root: Rc<File>,
    /// The directory of the last entry: streams list directories in one piece.
    parent: Option<(Vec<u8>, Rc<File>)>,
    /// Set at the end, since every entry made in a directory changes the directory's time.
    directory_times: Vec<(Vec<u8>, TimeSpec)>,
    buffer: Vec<u8>,
}

impl Tree {
    fn place(&mut self, entry: &Entry, data: &mut impl Read) -> Result<(), PlaceError> {
        let components = components(&entry.path)?;
        let Some((name, parents)) = components.split_last() else {
            return match entry.kind {
                Kind::Directory => self.dress_directory(&self.root.clone(), entry, b""),
                _ => Err(PlaceError::Hostile("it would replace the root directory")),
            };
        };
        if components.iter().any(|part| part.starts_with(WHITEOUT_META_PREFIX) && *part != WHITEOUT_OPAQUE) {
            return Ok(());
        }
        if parents.iter().any(|part| part.starts_with(WHITEOUT_PREFIX)) {
            return Err(PlaceError::Hostile("it lies below a whiteout"));
        }
        let path = parents.join(&b'/');
        let parent = self.parent(&path, parents)?;
        if *name == WHITEOUT_OPAQUE {
            return Ok(parent.set_xattr(OPAQUE_XATTR, b"y")?);
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT_PREFIX) {
            return self.white_out(&parent, hidden);
        }
        self.make(&parent, name, entry, &components, data)
    }

    fn make(
        &mut self,
        parent: &Rc<File>,
        name: &[u8],
        entry: &Entry,
        components: &[&[u8]],
        data: &mut impl Read,
    ) -> Result<(), PlaceError> {
        let owner = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
        let no_follow = AtFlags::AT_SYMLINK_NOFOLLOW;
        match entry.kind {
            Kind::Directory => {
                let before = self.make_room(parent, name, true)?;
                if before != Before::Directory {
                    mkdirat(parent, name, Mode::S_IRWXU)?;
                }
                let directory = open_child_directory(parent, name)?;
                if before == Before::Whiteout {
                    directory.set_xattr(OPAQUE_XATTR, b"y")?;
                }
                return self.dress_directory(&directory, entry, &components.join(&b'/'));
            }
            Kind::File => {
                self.make_room(parent, name, false)?;
                let flags =
                    OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let mut file = File::from(openat(parent, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
                self.copy(data, &mut file)?;
                // Changing the owner clears capabilities and set-id bits, hence the order.
                fchown(&file, owner.0, owner.1)?;
                for (key, value) in kept_xattrs(entry) {
                    unless_unsupported(file.set_xattr(key, value))?;
                }
                fchmod(&file, Mode::from_bits_truncate(entry.mode))?;
                futimens(&file, &mtime(entry), &mtime(entry))?;
                return Ok(());
            }
            Kind::HardLink => {
                let target = hard_link_target(&self.root, &entry.link)?;
                self.make_room(parent, name, false)?;
                let (directory, target) = target;
                return match linkat(&directory, target, parent, name, AtFlags::empty()) {
                    Err(Errno::ENOENT) => {
                        Err(PlaceError::Hostile("it is a hard link to nothing in this layer"))
                    }
                    Err(Errno::EPERM) => Err(PlaceError::Hostile("it is a hard link to a directory")),
                    other => Ok(other?),
                };
            }
            Kind::Symlink => {
                if entry.link.is_empty() {
                    return Err(PlaceError::Hostile("it is a symbolic link without a target"));
                }
                self.make_room(parent, name, false)?;
                symlinkat(&entry.link[..], parent, name)?;
            }
            Kind::CharDevice(..) | Kind::BlockDevice(..) | Kind::Fifo => {
                self.make_room(parent, name, false)?;
                let (kind, device) = match entry.kind {
                    Kind::CharDevice(major, minor) => (SFlag::S_IFCHR, (major, minor)),
                    Kind::BlockDevice(major, minor) => (SFlag::S_IFBLK, (major, minor)),
                    _ => (SFlag::S_IFIFO, (0, 0)),
                };
                mknodat(parent, name, kind, Mode::empty(), makedev(device.0.into(), device.1.into()))?;
                // The file was made a moment ago by this process, in a directory that nobody else can enter, and
                // is no symbolic link: chmod by name is safe, which fchmodat has no flag for.
                let mode = Mode::from_bits_truncate(entry.mode);
                fchownat(parent, name, owner.0, owner.1, no_follow)?;
                nix::sys::stat::fchmodat(parent, name, mode, nix::sys::stat::FchmodatFlags::FollowSymlink)?;
            }
        }
        if entry.kind == Kind::Symlink {
            fchownat(parent, name, owner.0, owner.1, no_follow)?;
        }
        for (key, value) in kept_xattrs(entry) {
            unless_unsupported(xattr::set(child_path(parent, name), key, value))?;
        }
        utimensat(parent, name, &mtime(entry), &mtime(entry), UtimensatFlags::NoFollowSymlink)?;
        Ok(())
    }

    /// Hides `name` of the layers below. It says nothing about this layer's own files, which come first or later.
    fn white_out(&mut self, parent: &Rc<File>, name: &[u8]) -> Result<(), PlaceError> {
        if matches!(name, b"" | b"." | b"..") {
            return Err(PlaceError::Hostile("it is a whiteout of nothing"));
        }
        match look(parent, name)? {
            Some(stat) if is_kind(&stat, SFlag::S_IFDIR) => {
                Ok(open_child_directory(parent, name)?.set_xattr(OPAQUE_XATTR, b"y")?)
            }
            Some(_) => Ok(()),
            None => Ok(mknodat(parent, name, SFlag::S_IFCHR, Mode::empty(), 0)?),
        }
    }

    fn dress_directory(&mut self, directory: &File, entry: &Entry, path: &[u8]) -> Result<(), PlaceError> {
        fchown(directory, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))?;
        for (key, value) in kept_xattrs(entry) {
            unless_unsupported(directory.set_xattr(key, value))?;
        }
        fchmod(directory, Mode::from_bits_truncate(entry.mode))?;
        self.directory_times.push((path.to_vec(), mtime(entry)));
        Ok(())
    }

    fn set_directory_times(&mut self) {
        for (path, time) in std::mem::take(&mut self.directory_times) {
            // A later entry may have replaced the directory: then there is nothing to set.
            if let Ok(directory) = resolve(&self.root, &path) {
                let _ = futimens(&directory, &time, &time);
            }
        }
    }

    /// Removes what is at `name`, except a directory that another directory is to be merged into.
    fn make_room(&mut self, parent: &File, name: &[u8], for_directory: bool) -> Result<Before, PlaceError> {
        let Some(stat) = look(parent, name)? else { return Ok(Before::Nothing) };
        if is_kind(&stat, SFlag::S_IFDIR) {
            if for_directory {
                return Ok(Before::Directory);
            }
            self.parent = None;
            std::fs::remove_dir_all(child_path(parent, name))?;
            return Ok(Before::Nothing);
        }
        unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)?;
        Ok(if is_whiteout(&stat) { Before::Whiteout } else { Before::Nothing })
    }

    /// The directory at `path`, made with its parents where it is missing.
    fn parent(&mut self, path: &[u8], components: &[&[u8]]) -> Result<Rc<File>, PlaceError> {
        if let Some((last, directory)) = &self.parent
            && last == path
        {
            return Ok(directory.clone());
        }
        let directory = match resolve(&self.root, path) {
            Ok(directory) => Rc::new(directory),
            Err(Errno::ENOENT | Errno::ENOTDIR) => self.make_directories(components)?,
            Err(errno) => return Err(errno.into()),
        };
        self.parent = Some((path.to_vec(), directory.clone()));
        Ok(directory)
    }

    fn make_directories(&mut self, components: &[&[u8]]) -> Result<Rc<File>, PlaceError> {
        let mut directory = self.root.clone();
        let mut path = Vec::new();
        for name in components {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            directory = match resolve(&self.root, &path) {
                Ok(child) => Rc::new(child),
                Err(Errno::ENOENT) => Rc::new(make_plain_directory(&directory, name)?),
                Err(Errno::ENOTDIR) if look(&directory, name)?.is_some_and(|stat| is_whiteout(&stat)) => {
                    unlinkat(&directory, *name, UnlinkatFlags::NoRemoveDir)?;
                    let child = make_plain_directory(&directory, name)?;
                    child.set_xattr(OPAQUE_XATTR, b"y")?;
                    Rc::new(child)
                }
                Err(errno) => return Err(errno.into()),
            };
        }
        Ok(directory)
    }

    fn copy(&mut self, data: &mut impl Read, file: &mut File) -> Result<(), PlaceError> {
        loop {
            match data.read(&mut self.buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => file.write_all(&self.buffer[..n])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(PlaceError::Read(error)),
            }
        }
    }
}

/// The parts of a path; none for the root itself.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, PlaceError> {
    let mut parts = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(PlaceError::Hostile("its path leads upwards by \"..\"")),
            _ if part.len() > NAME_BYTES_MAX => {
                return Err(PlaceError::Hostile("a part of its path is too long"));
            }
            _ => parts.push(part),
        }
    }
    Ok(parts)
}

fn hard_link_target<'a>(root: &File, link: &'a [u8]) -> Result<(File, &'a [u8]), PlaceError> {
    let components = components(link)?;
    let (name, parents) =
        components.split_last().ok_or(PlaceError::Hostile("it is a hard link to the root directory"))?;
    match resolve(root, &parents.join(&b'/')) {
        Ok(directory) => Ok((directory, name)),
        Err(Errno::ENOENT) => Err(PlaceError::Hostile("it is a hard link to nothing in this layer")),
        Err(errno) => Err(errno.into()),
    }
}

/// Opens the directory at `path` as if `root` were the root of the file system.
fn resolve(root: &File, path: &[u8]) -> nix::Result<File> {
    let how = OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC).resolve(
        ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS | ResolveFlag::RESOLVE_NO_XDEV,
    );
    let path = if path.is_empty() { b"." } else { path };
    let mut attempts = 1;
    loop {
        match openat2(root, path, how) {
            Err(Errno::EAGAIN) if attempts < RESOLVE_ATTEMPTS_MAX => attempts += 1,
            result => return result.map(File::from),
        }
    }
}

fn open_child_directory(parent: &File, name: &[u8]) -> nix::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(parent, name, flags, Mode::empty()).map(File::from)
}

/// A parent that the layer does not mention: root's, readable by all.
fn make_plain_directory(parent: &File, name: &[u8]) -> Result<File, PlaceError> {
    match mkdirat(parent, name, Mode::S_IRWXU) {
        Err(Errno::EEXIST) => return Err(PlaceError::Hostile("its path has a symbolic link to nothing")),
        other => other?,
    }
    let directory = open_child_directory(parent, name)?;
    fchmod(&directory, Mode::from_bits_truncate(0o755))?;
    Ok(directory)
}

fn look(parent: &File, name: &[u8]) -> nix::Result<Option<FileStat>> {
    match fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn is_kind(stat: &FileStat, kind: SFlag) -> bool {
    stat.st_mode & SFlag::S_IFMT.bits() == kind.bits()
}

fn is_whiteout(stat: &FileStat) -> bool {
    is_kind(stat, SFlag::S_IFCHR) && stat.st_rdev == 0
}

/// A path to a child of an open directory, for calls that take only paths and do not follow the last component.
fn child_path(parent: &impl AsFd, name: &[u8]) -> PathBuf {
    let directory = format!("/proc/self/fd/{}", parent.as_fd().as_raw_fd());
    Path::new(&directory).join(OsStr::from_bytes(name))
}

/// The extended attributes that an image may set: not those by which overlayfs, or this machine's security
/// modules, could be told things.
fn kept_xattrs(entry: &Entry) -> impl Iterator<Item = (&OsStr, &[u8])> {
    let kept = |name: &[u8]| {
        (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
            || matches!(
                name,
                b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default"
            )
    };
    let all = entry.xattrs.iter().filter(move |(name, _)| kept(name) && !name.contains(&0));
    all.map(|(name, value)| (OsStr::from_bytes(name), &value[..]))
}

/// As every other runtime does: where the file system has no such attributes, or for such a file, go without.
fn unless_unsupported(result: io::Result<()>) -> io::Result<()> {
    match result.as_ref().map_err(io::Error::raw_os_error) {
        Err(Some(libc::EOPNOTSUPP | libc::EPERM)) => Ok(()),
        _ => result,
    }
}

fn mtime(entry: &Entry) -> TimeSpec {
    time_spec(entry.mtime.0, entry.mtime.1)
}

#[cfg(test)]
mod tests;
