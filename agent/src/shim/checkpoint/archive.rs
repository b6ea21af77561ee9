//! Directories as archives: written and unpacked by the system's `tar`, which CRIU needs as well, in processes beside
//! the shim's loop.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::unistd::Pid;

use super::super::sys;

/// A `tar` at work; its end is reaped by the loop.
pub struct Archiver {
    pub pid: Pid,
    pub pidfd: OwnedFd,
    /// Once it has ended.
    pub code: Option<u8>,
}

fn tar() -> Command {
    let mut command = Command::new("tar");
    command.args(["--numeric-owner", "--xattrs", "--xattrs-include=*"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: nothing is done. But with it the library forks: its quicker way, a child that shares the memory of its parent,
    // is refused (EINVAL) by kernels before 6.2 once children are to be in another time namespace.
    unsafe { command.pre_exec(|| Ok(())) };
    command
}

/// Begins to write `dir` into `archive`: owners, modes, links, devices, holes and extended attributes, this file
/// system alone.
pub fn pack(dir: &Path, archive: &Path) -> io::Result<Archiver> {
    let mut command = tar();
    command.args(["--create", "--sparse", "--one-file-system", "--warning=no-file-ignored", "--file"]);
    let child = command.arg(archive).arg("--directory").arg(dir).arg(".").spawn()?;
    let pid = child.id() as i32;
    Ok(Archiver { pid: Pid::from_raw(pid), pidfd: sys::pidfd(pid)?, code: None })
}

/// Unpacks into `dir`, and waits.
pub fn unpack(archive: &Path, dir: &Path) -> io::Result<()> {
    File::open(archive)?;
    let mut command = tar();
    command.args([
        "--extract",
        "--same-owner",
        "--preserve-permissions",
        "--delay-directory-restore",
        "--file",
    ]);
    let mut child: Child = command.arg(archive).arg("--directory").arg(dir).spawn()?;
    match child.wait()? {
        status if status.success() => Ok(()),
        status => Err(io::Error::other(format!("tar cannot unpack {}: {status}", archive.display()))),
    }
}
