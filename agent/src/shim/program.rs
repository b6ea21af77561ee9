//! berth-agent's own file, seen through a mount that nobody can write through.
//!
//! Until its exec a container's first process runs this program, and a command may name `/proc/self/exe`: from within
//! the pod that link leads to the file on the host, which root may write unless the link's own mount forbids it. That a
//! file in use cannot be written is not enough: it ends with the last process, and some kernels (6.11, 6.12) allow it.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::sys::statvfs::{FsFlags, statvfs};

use super::sys;

const OWN: &str = "/proc/self/exe";

/// What to start shims from, so that they need not seal themselves: that costs one exec more.
pub fn path() -> PathBuf {
    static SEALED: OnceLock<Option<OwnedFd>> = OnceLock::new();
    match SEALED.get_or_init(|| open_read_only().ok()) {
        Some(file) => format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        None => OWN.into(),
    }
}

/// Becomes the same program through a read-only mount, unless it is that. Before any thread.
pub fn seal() -> io::Result<()> {
    if statvfs(Path::new(OWN))?.flags().contains(FsFlags::ST_RDONLY) {
        return Ok(());
    }
    let file = open_read_only()?;
    let c = |text: &std::ffi::OsStr| CString::new(text.as_bytes()).map_err(io::Error::other);
    let args = std::env::args_os().map(|arg| c(&arg)).collect::<io::Result<Vec<_>>>()?;
    let pair = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        c(std::ffi::OsStr::from_bytes(&[name.as_bytes(), b"=", value.as_bytes()].concat()))
    };
    let env = std::env::vars_os().map(pair).collect::<io::Result<Vec<_>>>()?;
    match nix::unistd::fexecve(file, &args, &env) {
        Err(errno) => Err(errno.into()),
    }
}

/// The file on a mount of its own that is in nobody's tree, so that nobody can make it writable again.
fn open_read_only() -> io::Result<OwnedFd> {
    let file = sys::clone_mount(Path::new(OWN))?;
    // SAFETY: plain integers; zero is valid for each.
    let mut attr: libc::mount_attr = unsafe { std::mem::zeroed() };
    attr.attr_set = libc::MOUNT_ATTR_RDONLY;
    sys::set_mounts(&file, &attr)?;
    Ok(file)
}
