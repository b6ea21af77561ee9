//! Stands in for criu in tests and measurements: starts the real one, passes on what it and a shim say to each other,
//! notes when, and at a chosen word kills whom it is told to. Its directory is where it is called from:
//!
//! | name | what |
//! |---|---|
//! | `criu` | a link to this program: what an agent is given as `--criu` |
//! | `real` | a link to the CRIU that works |
//! | `trap` | `CALL STAGE before\|after MICROS WHO`: of the next such word; becomes `sprung` |
//! | `trace` | where it is there, a line a word: `PID CALL STAGE told\|answered NANOS`, by CLOCK_MONOTONIC |
//!
//! `CALL` is `dump` or `restore`; `STAGE` one of CRIU's notifications, or `begin` (the request) or `done` (the last
//! response); `before` is before the shim hears of it, `after` once CRIU has its answer; `WHO` is `criu`, `shim` or
//! the number of a process.
//!
//! The real criu must be the shim's child, since what it restores becomes one: it is made this process's sibling. This
//! process, which the shim knows, ends after it: what criu has said last has been passed on by then.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{IntoRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use berth_agent::shim::checkpoint::rpc::{Call, Fields, Response, Value};

/// Nanoseconds of CLOCK_MONOTONIC.
fn now() -> i128 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a local.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

const MESSAGE_BYTES_MAX: usize = 256 << 10;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let dir = args.first().map(PathBuf::from).and_then(|path| Some(path.parent()?.to_owned()));
    let Some(dir) = dir else { return ExitCode::from(2) };
    let mut command = Command::new(dir.join("real"));
    command.args(&args[1..]);
    if args.get(1).is_some_and(|word| word == "swrk") {
        let fd = args.get(2).and_then(|fd| fd.to_str()?.parse().ok());
        let Some(fd) = fd else { return ExitCode::from(2) };
        match stand_between(&dir, fd) {
            Ok(true) => {}
            Ok(false) => return ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("criu-between: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    let error = command.exec();
    eprintln!("criu-between: {}: {error}", dir.join("real").display());
    ExitCode::FAILURE
}

/// The error of a call that returns less than zero where it fails.
fn check(code: libc::c_int) -> std::io::Result<libc::c_int> {
    if code < 0 { Err(std::io::Error::last_os_error()) } else { Ok(code) }
}

fn receive(fd: RawFd) -> Option<Vec<u8>> {
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    // SAFETY: the buffer is as long as is said.
    let length = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    buffer.truncate(usize::try_from(length).ok()?);
    Some(buffer).filter(|message| !message.is_empty())
}

fn send(fd: RawFd, message: &[u8]) {
    // SAFETY: the message is as long as is said. Who has gone needs none.
    unsafe { libc::send(fd, message.as_ptr().cast(), message.len(), libc::MSG_NOSIGNAL) };
}

/// Makes a sibling, which returns true and is to become criu, at the same number; passes on what is said until it ends.
fn stand_between(dir: &Path, outer: RawFd) -> std::io::Result<bool> {
    let request = receive(outer).ok_or(std::io::ErrorKind::UnexpectedEof)?;
    let asked = now();
    let (call, images) = read(&request).ok_or(std::io::ErrorKind::InvalidData)?;
    let shim = std::os::unix::process::parent_id() as i32;
    let mut pair = [0; 2];
    // SAFETY: an array of two; numbers of this process's own descriptors; the process has one thread.
    let (criu, ended) = unsafe {
        // criu looks for the images' directory in the table of whoever has made its socket.
        let found = File::open(format!("/proc/{shim}/fd/{images}"))?.into_raw_fd();
        if found != images {
            check(libc::dup2(found, images))?;
            check(libc::close(found))?;
        }
        check(libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, pair.as_mut_ptr()))?;
        let flags = libc::CLONE_PARENT | libc::SIGCHLD;
        let criu = check(libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) as libc::c_int)?;
        if criu == 0 {
            // As the shim asks of its children.
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            check(libc::close(images))?;
            check(libc::close(pair[0]))?;
            check(libc::dup2(pair[1], outer))?;
            check(libc::close(pair[1]))?;
            return Ok(true);
        }
        check(libc::close(pair[1]))?;
        (criu, check(libc::syscall(libc::SYS_pidfd_open, criu, 0) as libc::c_int)?)
    };
    let between = Between { dir, call, criu, ended, shim, outer, inner: pair[0] };
    between.detach(images);
    between.pass(&request, asked);
    Ok(false)
}

/// Which call a request is of, and the number of its images' directory.
fn read(request: &[u8]) -> Option<(&'static str, RawFd)> {
    let (mut call, mut images) = (None, None);
    for field in Fields::of(request) {
        match field? {
            (1, Value::Number(number)) if number == Call::Dump as u64 => call = Some("dump"),
            (1, Value::Number(number)) if number == Call::Restore as u64 => call = Some("restore"),
            (2, Value::Bytes(options)) => {
                for option in Fields::of(options) {
                    if let (1, Value::Number(fd)) = option? {
                        images = RawFd::try_from(fd).ok();
                    }
                }
            }
            _ => {}
        }
    }
    Some((call?, images?))
}

struct Between<'a> {
    dir: &'a Path,
    call: &'static str,
    criu: i32,
    /// Of criu's process.
    ended: RawFd,
    shim: i32,
    outer: RawFd,
    inner: RawFd,
}

impl Between<'_> {
    /// Neither in the pod's control groups, nor a holder of its pipes.
    fn detach(&self, images: RawFd) {
        for group in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            if let Ok(mut procs) = OpenOptions::new().write(true).open(group.path().join("cgroup.procs")) {
                let _ = procs.write_all(b"0");
            }
        }
        let kept = [0, 1, 2, images, self.outer, self.inner, self.ended];
        let open: Vec<RawFd> = fs::read_dir("/proc/self/fd")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|fd| !kept.contains(fd))
            .collect();
        for fd in open {
            // SAFETY: nothing of this process uses them; one is the listing's own, and closed already.
            unsafe { libc::close(fd) };
        }
        // SAFETY: no pointers.
        unsafe { libc::setsid() };
    }

    /// `asked` is when the request came: since then criu itself would have been at work.
    fn pass(&self, request: &[u8], asked: i128) {
        self.note("begin", "told", asked);
        self.spring("begin", "before");
        send(self.inner, request);
        self.answered("begin");
        let mut stage = None;
        loop {
            let mut fds = [self.inner, self.outer, self.ended].map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            });
            // SAFETY: an array of three.
            if unsafe { libc::poll(fds.as_mut_ptr(), 3, -1) } < 0 {
                return;
            }
            if fds[0].revents != 0 {
                let Some(message) = receive(self.inner) else { break };
                let word = Response::read(&message).and_then(|response| response.stage);
                let done = word.is_none();
                let word = word.unwrap_or_else(|| "done".to_owned());
                self.told(&word);
                send(self.outer, &message);
                if done {
                    self.answered("done");
                    break;
                }
                stage = Some(word);
            } else if fds[1].revents != 0 {
                let Some(message) = receive(self.outer) else { return };
                send(self.inner, &message);
                if let Some(stage) = stage.take() {
                    self.answered(&stage);
                }
            } else {
                return;
            }
        }
        let mut ended = libc::pollfd { fd: self.ended, events: libc::POLLIN, revents: 0 };
        // SAFETY: one.
        unsafe { libc::poll(&mut ended, 1, -1) };
        // For this a shim waits, but not for the end of a dump.
        if self.call == "restore" {
            self.note("end", "told", now());
        }
    }

    fn told(&self, stage: &str) {
        self.note(stage, "told", now());
        self.spring(stage, "before");
    }

    fn answered(&self, stage: &str) {
        self.note(stage, "answered", now());
        self.spring(stage, "after");
    }

    fn note(&self, stage: &str, what: &str, nanos: i128) {
        let Ok(mut trace) = OpenOptions::new().append(true).open(self.dir.join("trace")) else { return };
        let _ = trace.write_all(format!("{} {} {stage} {what} {nanos}\n", self.criu, self.call).as_bytes());
    }

    fn spring(&self, stage: &str, when: &str) {
        let trap = self.dir.join("trap");
        let Ok(text) = fs::read_to_string(&trap) else { return };
        let words: Vec<&str> = text.split_whitespace().collect();
        let [call, at, side, micros, who] = words[..] else { return };
        if (call, at, side) != (self.call, stage, when) {
            return;
        }
        std::thread::sleep(Duration::from_micros(micros.parse().unwrap_or(0)));
        // First: this process ends with the shim, by its own wish.
        let _ = fs::rename(&trap, self.dir.join("sprung"));
        let pid = match who {
            "criu" => self.criu,
            "shim" => self.shim,
            pid => pid.parse().unwrap_or(0),
        };
        if pid > 1 {
            // SAFETY: no pointers.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
}
