//! A command of the job's, run in a container beside its program: in the same namespaces and control groups, as the
//! same user, with the same powers and no more. Never waits; the supervisor's loop polls.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use berth_protocol::job::ContainerSpec;
use berth_protocol::units::{BootMs, Millis};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::unistd::{Pid, pipe2};
use serde_json::Value;

use super::super::container::Container;
use super::super::rootfs::Home;
use super::super::{capabilities, seccomp, spec, sys};
use super::dump;

/// Of what it says, in a failure's message: the end.
const SAID_BYTES_MAX: usize = 300;
const CAPABILITIES_MAX: u64 = 63;
/// One that was killed is gone within this, or nothing can be done about it.
const DEATH: Millis = Millis(2_000);

/// One that runs, or has ended.
pub struct Hook {
    name: &'static str,
    pid: Pid,
    pidfd: OwnedFd,
    /// Until it has closed it.
    output: Option<File>,
    said: Vec<u8>,
    give_up_at: BootMs,
    /// Its time was over. Until it is gone the pod has a process that is none of its own.
    killed: bool,
    code: Option<u8>,
}

/// What came of it.
pub enum Ended {
    Well,
    /// In words.
    Badly(String),
}

/// The last steps before the command, in the child.
struct Entry {
    groups: Vec<File>,
    namespaces: Vec<File>,
    cwd: std::ffi::CString,
    user: (u32, u32, Vec<u32>),
    capabilities: u64,
    filter: Vec<libc::sock_filter>,
}

fn check(code: libc::c_int) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Entry {
    fn new(container: &Container, spec: &ContainerSpec, config: &Value) -> io::Result<Self> {
        let namespace = |kind: &str| File::open(format!("/proc/{}/ns/{kind}", container.pid));
        // The file system last: after it, /proc is another.
        let namespaces = ["ipc", "uts", "net", "cgroup", "mnt"].map(namespace).into_iter();
        let process = &config["process"];
        let number = |value: &Value| value.as_u64().unwrap_or(0) as u32;
        let groups = process["user"]["additionalGids"].as_array().into_iter().flatten().map(number);
        let open = |dir: std::path::PathBuf| File::options().write(true).open(dir.join("cgroup.procs"));
        Ok(Self {
            groups: container.cgroup.dirs().into_iter().map(open).collect::<io::Result<_>>()?,
            namespaces: namespaces.collect::<io::Result<_>>()?,
            cwd: sys::c_string(process["cwd"].as_str().unwrap_or("/"))?,
            user: (number(&process["user"]["uid"]), number(&process["user"]["gid"]), groups.collect()),
            capabilities: capabilities::bits(spec),
            filter: seccomp::filter(&spec::capabilities(spec)),
        })
    }

    fn enter(&mut self) -> io::Result<()> {
        // The shim's own is not for what it starts.
        let _ = fs::write("/proc/self/oom_score_adj", spec::OOM_SCORE_ADJ.to_string());
        for group in &mut self.groups {
            group.write_all(b"0")?;
        }
        for namespace in &self.namespaces {
            // SAFETY: no pointers.
            check(unsafe { libc::setns(namespace.as_raw_fd(), 0) })?;
        }
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGPIPE] {
            // SAFETY: no handler is installed.
            unsafe { sigaction(signal, &default) }?;
        }
        let (uid, gid, groups) = &self.user;
        // SAFETY: constants, and pointers to what outlives the calls.
        unsafe {
            check(libc::chdir(self.cwd.as_ptr()))?;
            check(if libc::setsid() < 0 { -1 } else { 0 })?;
            for capability in (0..=CAPABILITIES_MAX).filter(|bit| self.capabilities >> bit & 1 == 0) {
                // Those that the kernel does not know it refuses.
                libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
            }
            check(libc::setgroups(groups.len(), groups.as_ptr()))?;
            check(libc::setresgid(*gid, *gid, *gid))?;
            check(libc::setresuid(*uid, *uid, *uid))?;
        }
        if *uid == 0 {
            sys::keep_capabilities(self.capabilities)?;
        }
        // SAFETY: no pointers.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
        seccomp::install(&self.filter)
    }
}

impl Hook {
    /// Starts `argv` in `container`, whose directory is in `pod_dir`; it may take `within`.
    pub fn start(
        name: &'static str,
        argv: &[String],
        (pod_dir, container, spec): (&Path, &Container, &ContainerSpec),
        within: Millis,
    ) -> io::Result<Self> {
        let config = dump::config(&Home::new(pod_dir, &container.name))?;
        let mut entry = Entry::new(container, spec, &config)?;
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let (program, args) = argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut command = Command::new(program);
        let env = config["process"]["env"].as_array().into_iter().flatten().filter_map(Value::as_str);
        command.args(args).env_clear().envs(env.filter_map(|pair| pair.split_once('=')));
        command.stdin(Stdio::null()).stdout(write.try_clone()?).stderr(write);
        // Children alone enter a namespace of processes; this one's next ones are the shim's own again.
        let own = File::open("/proc/self/ns/pid")?;
        let theirs = File::open(format!("/proc/{}/ns/pid", container.pid))?;
        // SAFETY: no pointers.
        check(unsafe { libc::setns(theirs.as_raw_fd(), libc::CLONE_NEWPID) })?;
        // SAFETY: the process has one thread, so the child may do what it likes between fork and exec.
        let spawned = unsafe { command.pre_exec(move || entry.enter()) }.spawn();
        // SAFETY: no pointers.
        check(unsafe { libc::setns(own.as_raw_fd(), libc::CLONE_NEWPID) })?;
        drop(command);
        let pid = spawned?.id() as i32;
        Ok(Self {
            name,
            pid: Pid::from_raw(pid),
            pidfd: sys::pidfd(pid)?,
            output: Some(File::from(read)),
            said: Vec::new(),
            give_up_at: sys::boot_now().plus(within),
            killed: false,
            code: None,
        })
    }

    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(self.pidfd.as_fd()).chain(self.output.as_ref().map(AsFd::as_fd))
    }

    pub fn give_up_at(&self) -> BootMs {
        self.give_up_at
    }

    /// Its time counts from `now`.
    pub fn give_time(&mut self, now: BootMs, within: Millis) {
        self.give_up_at = now.plus(within);
    }

    /// A child of the shim's has ended.
    pub fn ended(&mut self, pid: Pid, code: u8) {
        if self.pid == pid {
            self.code = Some(code);
        }
    }

    /// `None`: it runs.
    pub fn hear(&mut self, now: BootMs) -> Option<Ended> {
        let mut buffer = [0; 4096];
        while let Some(output) = &mut self.output {
            match output.read(&mut buffer) {
                Ok(0) => self.output = None,
                Ok(length) => {
                    self.said.extend_from_slice(&buffer[..length]);
                    self.said.drain(..self.said.len().saturating_sub(SAID_BYTES_MAX));
                }
                Err(_) => break,
            }
        }
        let name = self.name;
        let overdue = || Some(Ended::Badly(format!("the {name} hook has not ended within checkpoint.grace")));
        match self.code {
            Some(_) if self.killed => overdue(),
            Some(0) => Some(Ended::Well),
            Some(code) => {
                let said = String::from_utf8_lossy(&self.said);
                let said = said.trim();
                let said = if said.is_empty() { String::new() } else { format!(": {said}") };
                Some(Ended::Badly(format!("the {name} hook ended with code {code}{said}")))
            }
            None if self.give_up_at > now => None,
            None if self.killed => overdue(),
            None => {
                self.kill();
                self.killed = true;
                self.give_up_at = now.plus(DEATH);
                None
            }
        }
    }

    /// It leads its session and so its group; what has left that ends with the container.
    fn kill(&self) {
        let _ = kill(Pid::from_raw(-self.pid.as_raw()), Signal::SIGKILL);
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        if self.code.is_none() {
            self.kill();
        }
    }
}
