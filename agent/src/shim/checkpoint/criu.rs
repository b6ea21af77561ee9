//! One `criu swrk`: a process that does one dump or restore and tells its stages over a socket. Never waits; the
//! supervisor's loop polls.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::{ForkResult, Pid, fork};

use super::super::sys;
use super::rpc::{self, Call, Options, Response};

/// Numbers that criu finds descriptors at: beyond what a shim has open itself.
const SOCKET_FD: RawFd = 900;
pub const INHERITED_FD: RawFd = 901;
const RESPONSE_BYTES_MAX: usize = 64 << 10;
const END_MS_MAX: i32 = 5_000;
/// In what it always says where it may not raise its own limits, and goes on.
const HARMLESS: &str = "RLIMIT_NOFILE";
/// Of criu's log, in a failure's message.
const ERRORS_MAX: usize = 3;
const ERROR_BYTES_MAX: usize = 300;

/// What criu says.
#[derive(Debug, PartialEq, Eq)]
pub enum Word {
    /// A stage is reached; criu waits for `answer`.
    Stage(String),
    /// All done; of a restore the root task.
    Done(Option<i32>),
    Failed(String),
}

pub struct Criu {
    pid: Pid,
    pidfd: OwnedFd,
    socket: OwnedFd,
    /// criu opens it as this process's descriptor.
    images: File,
    call: Call,
    log: PathBuf,
    /// Until then it may still be on its way into control groups.
    asked: bool,
    over: bool,
    /// It ended, or was ended, in the middle.
    broken_off: bool,
}

/// Where criu itself runs, and with it what it restores.
pub struct Place {
    /// The host's time namespace: this process's children would enter the pod's.
    pub time: Option<File>,
    /// Directories of the control groups to enter, and then to see as root; empty: stays where the shim is.
    pub cgroups: Vec<PathBuf>,
}

fn log_name(call: Call) -> &'static str {
    match call {
        Call::Dump => "dump.log",
        _ => "restore.log",
    }
}

/// In the child.
fn become_criu(
    shim: Pid,
    fds: &[(RawFd, RawFd)],
    place: &Place,
    args: &[CString],
) -> io::Result<std::convert::Infallible> {
    let check = |code: libc::c_int| if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // With the shim it ends: otherwise it waits for ever for tasks that died with their pod, and they, traced by it,
    // never leave, nor their namespace's init.
    sys::end_with(shim)?;
    for dir in &place.cgroups {
        File::options().write(true).open(dir.join("cgroup.procs"))?.write_all(b"0")?;
    }
    if !place.cgroups.is_empty() {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWCGROUP)?;
    }
    if let Some(time) = &place.time {
        // SAFETY: no pointers.
        check(unsafe { libc::setns(time.as_raw_fd(), libc::CLONE_NEWTIME) })?;
    }
    let nothing = File::options().read(true).write(true).open("/dev/null")?;
    let standard = (0..=2).map(|number| (nothing.as_raw_fd(), number));
    for (from, to) in standard.chain(fds.iter().copied()) {
        // SAFETY: no pointers; the numbers are the standard ones, or beyond all that is open.
        check(unsafe { libc::dup2(from, to) })?;
    }
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler is installed.
    unsafe { sigaction(Signal::SIGPIPE, &default) }?;
    SigSet::empty().thread_set_mask()?;
    Ok(nix::unistd::execvp(&args[0], args)?)
}

impl Criu {
    /// Begins a criu that will be asked for something on `images`. `inherited` are to be at `INHERITED_FD` and the
    /// numbers after it. Does not wait until it is ready, or has failed to be: entering control groups alone can take
    /// the kernel some ten milliseconds. The process has one thread.
    pub fn begin(
        program: &Path,
        call: Call,
        images: &Path,
        inherited: &[BorrowedFd],
        place: Place,
    ) -> io::Result<Self> {
        let dir = File::open(images)?;
        let log = images.join(log_name(call));
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let mut fds = vec![(theirs.as_raw_fd(), SOCKET_FD)];
        fds.extend(inherited.iter().map(AsRawFd::as_raw_fd).zip(INHERITED_FD..));
        let args = [sys::c_string(program)?, c"swrk".to_owned(), sys::c_string(SOCKET_FD.to_string())?];
        let shim = nix::unistd::getpid();
        // SAFETY: the process has one thread, so the child may do what it likes between fork and exec.
        match unsafe { fork() }? {
            ForkResult::Child => {
                let Err(error) = become_criu(shim, &fds, &place, &args);
                // Where the reason is looked for once it has ended without a word.
                let _ = fs::write(&log, format!("Error: cannot start {}: {error}\n", program.display()));
                // SAFETY: ends the child without running what belongs to the shim.
                unsafe { libc::_exit(127) }
            }
            ForkResult::Parent { child } => Ok(Self {
                pidfd: sys::pidfd(child.as_raw())?,
                pid: child,
                socket,
                images: dir,
                call,
                log,
                asked: false,
                over: false,
                broken_off: false,
            }),
        }
    }

    /// Asks what it was begun for; `options` are what is asked of it beyond the images, its log and to be told of stages.
    pub fn ask(&mut self, mut options: Options) {
        self.asked = true;
        options.images_dir(self.images.as_raw_fd()).log(log_name(self.call)).notify();
        // One that has gone away says so by `hear`.
        let _ = self.send(&rpc::request(self.call, &options.0));
    }

    fn send(&self, message: &rpc::Message) -> io::Result<()> {
        send(self.socket.as_raw_fd(), message.as_bytes(), MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }

    /// Lets criu go on from a stage, or give up there.
    pub fn answer(&self, go_on: bool) {
        // One that has gone away says so by `hear`.
        let _ = self.send(&rpc::notified(go_on));
    }

    /// What was said since; `None`: nothing.
    pub fn hear(&mut self) -> Option<Word> {
        if self.over {
            return None;
        }
        // Looked at first, so that nothing which it said before its end is missed.
        let ended = !sys::is_alive(&self.pidfd);
        let mut buffer = vec![0; RESPONSE_BYTES_MAX];
        let word = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            // Helpers of one that was killed may hold its socket open for long.
            Err(nix::Error::EAGAIN) if ended => self.broke_off("it ended without an answer"),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return None,
            Ok(length) if length > 0 => match Response::read(&buffer[..length]) {
                Some(response) if !response.success => Word::Failed(self.why(&response.message)),
                Some(Response { stage: Some(stage), .. }) => return Some(Word::Stage(stage)),
                Some(response) => Word::Done(response.pid),
                None => self.broke_off("it said what is no response"),
            },
            _ => self.broke_off("it ended without an answer"),
        };
        self.over = true;
        Some(word)
    }

    /// The last errors of its log; the response names the first, which often is a harmless one.
    fn why(&self, else_said: &str) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let tells = |line: &&str| line.contains("Error") && !line.contains(HARMLESS);
        let errors: Vec<&str> = log.lines().filter(tells).collect();
        let last = &errors[errors.len().saturating_sub(ERRORS_MAX)..];
        let bounded = |line: &&str| {
            // `(00.012345) Error (criu/file.c:12): what`
            let text = line.split_once("): ").map_or(*line, |(_, text)| text);
            text.chars().take(ERROR_BYTES_MAX).collect::<String>()
        };
        match last {
            [] if else_said.is_empty() => "criu failed and says nothing".to_owned(),
            [] => format!("criu: {else_said}"),
            _ => format!("criu: {}", last.iter().map(bounded).collect::<Vec<_>>().join("; ")),
        }
    }

    fn broke_off(&mut self, else_said: &str) -> Word {
        self.broken_off = true;
        Word::Failed(self.why(else_said))
    }

    /// Of a dump: it can no longer take back what it did to the tasks.
    pub fn is_broken_off(&self) -> bool {
        self.broken_off || (!self.over && !sys::is_alive(&self.pidfd))
    }

    /// Waits until the process has ended, as it does at once when it has said `Done`: it is in the control groups of
    /// what it has restored.
    pub fn wait_for_end(&self) {
        let _ = sys::poll(&mut [sys::want(&self.pidfd, libc::POLLIN)], Some(END_MS_MAX));
    }

    /// Ends it by force. Of a dump, the tasks go on.
    pub fn kill(&mut self) {
        if !self.over {
            (self.over, self.broken_off) = (true, true);
            // Once it is reaped its number may be another's.
            if sys::is_alive(&self.pidfd) {
                let _ = kill(self.pid, Signal::SIGKILL);
            }
        }
    }
}

impl AsFd for Criu {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Criu {
    fn drop(&mut self) {
        self.kill();
        if !self.asked {
            // Whoever ends those groups would not find it there.
            self.wait_for_end();
        }
    }
}
