//! The pod's own init: pid 1 of its pid namespace and keeper of the namespaces that its containers share. It reaps
//! orphans and ends with its shim; with it the kernel ends every process of the pod.
//!
//! The pod's programs see it as process 1, so it keeps nothing that could serve them: no capability, no file system, no
//! system call beyond its loop's.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use super::users::{Range, Users};
use super::{seccomp, sys};

/// A pod's init, the shim's child.
pub struct Init {
    pub pid: Pid,
    pub pidfd: OwnedFd,
    /// The user namespace that owns the others, where the pod has its own.
    pub users: Option<Users>,
}

impl Init {
    /// Makes the pod's namespaces (pid, ipc, uts, time; net with `network`, user with a range of numbers for it) and
    /// their first process. The calling process must be single-threaded. `nothing` is an empty directory, its root.
    /// Returns once all is as it shall be.
    pub fn spawn(hostname: &str, network: bool, range: Option<Range>, nothing: &Path) -> io::Result<Self> {
        // Children alone enter it, init and containers alike. Kernels before 5.6 have none.
        // SAFETY: no pointers.
        let time = unsafe { libc::unshare(libc::CLONE_NEWTIME) };
        if time != 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
            return Err(io::Error::last_os_error());
        }
        let shim = sys::pidfd(nix::unistd::getpid().as_raw())?;
        let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC);
        let ((ready, done), (mapped, map)) = (pipe()?, pipe()?);
        let mut flags = libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        if network {
            flags |= libc::CLONE_NEWNET;
        }
        if range.is_some() {
            flags |= libc::CLONE_NEWUSER;
        }
        match fork_into(flags)? {
            0 => {
                drop(map);
                let mapped = range.is_some().then_some(mapped);
                let code = match live(hostname, &shim, mapped, done, nothing) {
                    Ok(()) => 0,
                    Err(e) => e.raw_os_error().unwrap_or(libc::EIO),
                };
                // SAFETY: ends the child without running what belongs to the shim.
                unsafe { libc::_exit(code) }
            }
            pid => {
                drop((done, mapped));
                let mut init = Self { pid: Pid::from_raw(pid), pidfd: sys::pidfd(pid)?, users: None };
                if let Some(range) = range {
                    range.map(init.pid)?;
                    nix::unistd::write(&map, b".")?;
                    init.users = Some(Users::of(init.pid, range)?);
                }
                match nix::unistd::read(&ready, &mut [0])? {
                    0 => Err(init.why_it_ended()),
                    _ => Ok(init),
                }
            }
        }
    }

    /// Of one that has not come to be ready.
    fn why_it_ended(&self) -> io::Error {
        // It stays one to be waited for: whoever drops this would kill whatever has its number.
        match waitid(Id::Pid(self.pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Ok(WaitStatus::Exited(_, errno)) => io::Error::from_raw_os_error(errno),
            _ => io::Error::other("the pod's init ended before it was ready"),
        }
    }

    pub fn namespace(&self, kind: &str) -> String {
        format!("/proc/{}/ns/{kind}", self.pid)
    }

    /// Kills it, and thereby all that lives in its pid namespace; frozen processes once they thaw.
    pub fn kill(&self) {
        let _ = nix::sys::signal::kill(self.pid, Signal::SIGKILL);
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        self.kill();
    }
}

/// As fork, into new namespaces.
fn fork_into(flags: i32) -> io::Result<i32> {
    // SAFETY: without CLONE_VM and with a null stack this is a fork; the process has one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid as i32) }
}

/// What init does for ever. It holds no descriptor but these, and allocates nothing worth speaking of. `mapped` speaks
/// once its user namespace has numbers.
fn live(
    hostname: &str,
    shim: &OwnedFd,
    mapped: Option<OwnedFd>,
    done: OwnedFd,
    nothing: &Path,
) -> io::Result<()> {
    // SAFETY: a plain prctl call with a C string.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"berth-init".as_ptr()) };
    // Only who it is as yet can reach it.
    nix::unistd::chroot(nothing)?;
    nix::unistd::chdir("/")?;
    if let Some(mapped) = mapped {
        if nix::unistd::read(&mapped, &mut [0])? == 0 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        // Its pod's root, no longer the machine's.
        let (uid, gid) = (nix::unistd::Uid::from_raw(0), nix::unistd::Gid::from_raw(0));
        nix::unistd::setgroups(&[])?;
        nix::unistd::setresgid(gid, gid, gid)?;
        nix::unistd::setresuid(uid, uid, uid)?;
        try_file_systems()?;
    }
    // A change of user undoes it.
    // SAFETY: a plain prctl call with constants.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let name = sys::c_string(hostname)?;
    // SAFETY: the pointer and the length belong together.
    if unsafe { libc::sethostname(name.as_ptr(), name.as_bytes().len()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block()?;
    let children = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    sys::keep_capabilities(0)?;
    // Last: whoever has no more rights than this process could look into it otherwise, and hold it.
    sys::keep_memory_private()?;
    nix::unistd::write(&done, b".")?;
    drop(done);
    let kept = [sys::dup_to(shim.as_raw_fd(), KEPT)?, sys::dup_to(children_fd(&children), KEPT + 1)?];
    sys::close_from(KEPT as u32 + 2)?;
    sys::close_below(KEPT as u32)?;
    // Closed by number just now.
    std::mem::forget(children);
    // SAFETY: just made by dup_to, and owned by nobody.
    let (shim, children) = unsafe { (OwnedFd::from_raw_fd(kept[0]), OwnedFd::from_raw_fd(kept[1])) };
    seccomp::install(&seccomp::only(&CALLS))?;
    loop {
        let mut fds = [sys::want(&shim, libc::POLLIN), sys::want(&children, libc::POLLIN)];
        sys::poll(&mut fds, None)?;
        if fds[0].revents != 0 {
            return Ok(());
        }
        let mut buffer = [0; size_of::<libc::signalfd_siginfo>()];
        while nix::unistd::read(&children, &mut buffer).is_ok() {}
        // SAFETY: a null status is allowed.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
    }
}

/// Can processes of the pod's users have a /proc and a /sys? The kernel refuses both where the machine's own are covered in
/// part, as in some containers.
fn try_file_systems() -> io::Result<()> {
    match fork_into(libc::CLONE_NEWNS)? {
        0 => {
            let (root, none) = (Path::new("/"), None::<&str>);
            let try_one = |kind| mount(Some(kind), root, Some(kind), MsFlags::empty(), none);
            // SAFETY: ends the child without running what belongs to the shim.
            unsafe {
                libc::_exit(try_one("proc").and_then(|()| try_one("sysfs")).map_or_else(|e| e as i32, |()| 0))
            }
        }
        pid => match waitpid(Pid::from_raw(pid), None)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            WaitStatus::Exited(_, errno) => Err(io::Error::from_raw_os_error(errno)),
            _ => Err(io::ErrorKind::Interrupted.into()),
        },
    }
}

/// All that the loop and its end ask of the kernel, whichever way the C library does so.
const CALLS: [libc::c_long; 9] = [
    #[cfg(not(any(target_arch = "aarch64", target_arch = "riscv64")))]
    libc::SYS_poll,
    #[cfg(any(target_arch = "aarch64", target_arch = "riscv64"))]
    libc::SYS_pselect6,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_wait4,
    libc::SYS_close,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Descriptors are moved here, so that two calls close all the others.
const KEPT: RawFd = 100;

fn children_fd(signals: &SignalFd) -> RawFd {
    use std::os::fd::AsFd;
    signals.as_fd().as_raw_fd()
}
