//! One container: made by libcontainer, started, its process watched. The only module that speaks to libcontainer;
//! it forks, so the process must have one thread.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use berth_protocol::chain::chain;
use berth_protocol::ids::ContainerName;
use berth_protocol::log::Stream;
use berth_protocol::units::MilliCpu;
use libc::sock_filter;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::notify_socket::{NOTIFY_FILE, NotifySocket};
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{Pid, pipe2};

use super::cgroup::Cgroup;
use super::error::ShimError;
use super::pump::Pump;
use super::rootfs::Home;
use super::seccomp;
use super::sys;

/// What the container's process says before it becomes the job's program: nothing if all is well, else this byte
/// and an errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    NotFound = 1,
    NotExecutable = 2,
    Seccomp = 3,
}

/// A container that exists.
pub struct Container {
    pub name: ContainerName,
    pub pid: Pid,
    pub pidfd: OwnedFd,
    pub cgroup: Cgroup,
    pub pumps: [Pump; 2],
    /// The exit status, once reaped.
    pub exit: Option<Exit>,
    /// It ended to be begun anew from what it has saved.
    pub rests: bool,
    command: String,
    path: String,
    /// Says how the program's beginning went; gone once that is known.
    fault: Option<File>,
    notify: PathBuf,
    cpu_max: MilliCpu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The code, or 128 + signal.
    pub code: u8,
    pub oom_killed: bool,
}

/// What `create` needs beside the configuration, which lies in `home`.
pub struct Plan<'a> {
    pub name: &'a ContainerName,
    pub home: &'a Home,
    /// libcontainer's own records.
    pub state: &'a Path,
    pub cgroup: Cgroup,
    pub command: &'a str,
    pub env: &'a [String],
    pub filter: Vec<sock_filter>,
    /// Of the program, once it runs.
    pub cpu_max: MilliCpu,
}

impl Container {
    /// Makes the container up to the point where only the program itself is missing.
    pub fn create(plan: Plan) -> Result<Self, ShimError> {
        let failed = |message: String| ShimError::Create { container: plan.name.clone(), message };
        let path = plan.env.iter().find_map(|pair| pair.strip_prefix("PATH=")).unwrap_or_default().to_owned();
        let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|e| ShimError::io("make", "a pipe")(e.into()));
        let ((out, out_write), (err, err_write)) = (pipe()?, pipe()?);
        let (fault, fault_write) = pipe()?;
        let null = OwnedFd::from(File::open("/dev/null").map_err(ShimError::io("open", "/dev/null"))?);
        let executor = Program { path: path.clone(), filter: plan.filter, fault: fault_write.as_raw_fd() };
        let built = ContainerBuilder::new(plan.name.to_string(), SyscallType::default())
            .with_root_path(plan.state)
            .map(|builder| {
                builder.with_executor(executor).with_stdin(null).with_stdout(out_write).with_stderr(err_write)
            })
            .and_then(|builder| {
                builder.as_init(plan.home.dir()).with_systemd(false).with_detach(true).build()
            });
        drop(fault_write);
        for fd in [&out, &err, &fault] {
            let flags = OFlag::O_NONBLOCK;
            fcntl(fd, FcntlArg::F_SETFL(flags)).map_err(|e| ShimError::io("set up", "a pipe")(e.into()))?;
        }
        let mut made = Self {
            name: plan.name.clone(),
            pid: Pid::from_raw(0),
            // Replaced below; until then any descriptor does.
            pidfd: sys::pidfd(nix::unistd::getpid().as_raw()).map_err(ShimError::Namespace)?,
            cgroup: plan.cgroup,
            pumps: [Pump::new(out, Stream::Stdout), Pump::new(err, Stream::Stderr)],
            exit: None,
            rests: false,
            command: plan.command.to_owned(),
            path,
            fault: Some(File::from(fault)),
            notify: plan.state.join(plan.name.as_str()).join(NOTIFY_FILE),
            cpu_max: plan.cpu_max,
        };
        let pid = match built {
            Ok(container) => {
                container.pid().ok_or_else(|| failed("libcontainer knows no process".to_owned()))?
            }
            Err(e) => {
                return Err(match made.begun() {
                    Some(Err(fault)) => fault,
                    _ => failed(chain(&e)),
                });
            }
        };
        made.pid = Pid::from_raw(pid.as_raw());
        made.pidfd = sys::pidfd(pid.as_raw()).map_err(|e| failed(e.to_string()))?;
        Ok(made)
    }

    /// One that CRIU has brought back, running.
    pub fn revived(
        name: ContainerName,
        pid: Pid,
        pidfd: OwnedFd,
        cgroup: Cgroup,
        pumps: [Pump; 2],
        cpu_max: MilliCpu,
    ) -> Self {
        let (command, path, notify) = (String::new(), String::new(), PathBuf::new());
        Self {
            name,
            pid,
            pidfd,
            cgroup,
            pumps,
            exit: None,
            rests: false,
            command,
            path,
            fault: None,
            notify,
            cpu_max,
        }
    }

    /// Lets the program begin, and its CPU limit with it: making the container is berth's work, and with a limit of a
    /// tenth of a core it would use up the program's first 100 ms.
    pub fn start(&self) -> Result<(), ShimError> {
        self.cgroup.limit_cpu(self.cpu_max)?;
        NotifySocket::new(&self.notify)
            .notify_container_start()
            .map_err(|e| ShimError::Create { container: self.name.clone(), message: chain(&e) })
    }

    /// Readable once the program has begun or failed to; `None` when that is known.
    pub fn beginning(&self) -> Option<BorrowedFd<'_>> {
        self.fault.as_ref().map(AsFd::as_fd)
    }

    /// Has the program begun? `None`: not yet known, or told before.
    pub fn begun(&mut self) -> Option<Result<(), ShimError>> {
        let mut message = [0; 5];
        let read = self.fault.as_mut()?.read(&mut message);
        match read {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return None,
            Ok(5) => {}
            // The pipe has closed itself with the program's beginning.
            _ => {
                self.fault = None;
                return Some(Ok(()));
            }
        }
        self.fault = None;
        let [kind, errno @ ..] = message;
        let source = io::Error::from_raw_os_error(i32::from_ne_bytes(errno));
        let (container, command) = (self.name.clone(), self.command.clone());
        Some(Err(match kind {
            k if k == Fault::NotFound as u8 => {
                ShimError::CommandNotFound { container, command, path: self.path.clone() }
            }
            k if k == Fault::Seccomp as u8 => ShimError::Seccomp { container, source },
            _ => {
                let hint = match source.raw_os_error() {
                    Some(libc::ENOEXEC) => "is it made for another architecture, or a script without `#!`?",
                    Some(libc::ENOENT) => "the interpreter that it names is not in the image",
                    Some(libc::EACCES) => {
                        "it needs the permission to be executed (chmod +x), and no noexec mount"
                    }
                    _ => "see that it is a program for this machine",
                };
                ShimError::CommandNotExecutable { container, command, source, hint }
            }
        }))
    }
}

/// The last steps inside the container.
#[derive(Clone)]
struct Program {
    path: String,
    filter: Vec<sock_filter>,
    /// Open in the container's process until the program begins.
    fault: RawFd,
}

impl Program {
    fn report(&self, fault: Fault, errno: i32) {
        let mut message = [0; 5];
        message[0] = fault as u8;
        message[1..].copy_from_slice(&errno.to_ne_bytes());
        // SAFETY: the descriptor is the container's own copy; it is not closed, so nobody's else is.
        let pipe = std::mem::ManuallyDrop::new(unsafe { File::from_raw_fd(self.fault) });
        let _ = io::Write::write(&mut &*pipe, &message);
    }

    /// Where the command is, as execvp would find it.
    fn find(&self, command: &str) -> Result<PathBuf, (Fault, i32)> {
        let mut denied = None;
        let directories: Vec<&str> =
            if command.contains('/') { vec![""] } else { self.path.split(':').collect() };
        for directory in directories {
            let candidate = if directory.is_empty() {
                PathBuf::from(command)
            } else {
                Path::new(directory).join(command)
            };
            match fs::metadata(&candidate) {
                Ok(file) if file.is_file() && file.permissions().mode() & 0o111 != 0 => return Ok(candidate),
                Ok(_) => denied = Some(libc::EACCES),
                Err(e) if e.raw_os_error() == Some(libc::EACCES) => denied = Some(libc::EACCES),
                Err(_) => {}
            }
        }
        Err(denied.map_or((Fault::NotFound, libc::ENOENT), |errno| (Fault::NotExecutable, errno)))
    }
}

fn args(spec: &Spec) -> &[String] {
    spec.process().as_ref().and_then(|process| process.args().as_deref()).unwrap_or_default()
}

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let command = args(spec).first().map_or("", String::as_str);
        self.find(command).map(|_| ()).map_err(|(fault, errno)| {
            self.report(fault, errno);
            ExecutorValidationError::ArgValidationError(format!("cannot execute `{command}`"))
        })
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let c = |text: &String| CString::new(text.as_str()).map_err(|_| ExecutorError::InvalidArg);
        let args: Vec<CString> = args(spec).iter().map(c).collect::<Result<_, _>>()?;
        let env = spec.process().as_ref().and_then(|process| process.env().as_ref());
        let env: Vec<CString> = env.into_iter().flatten().map(c).collect::<Result<_, _>>()?;
        let command = args.first().ok_or(ExecutorError::InvalidArg)?.to_string_lossy().into_owned();
        let path = self
            .find(&command)
            .and_then(|path| sys::c_string(path).map_err(|_| (Fault::NotFound, libc::ENOENT)));
        let path = match path {
            Ok(path) => path,
            Err((fault, errno)) => {
                self.report(fault, errno);
                return Err(ExecutorError::Other("the command has gone".to_owned()));
            }
        };
        // The shim blocks and ignores signals; its containers begin as programs expect.
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        for signal in Signal::iterator() {
            // SAFETY: no handler is installed. SIGKILL and SIGSTOP refuse, rightly.
            let _ = unsafe { sigaction(signal, &default) };
        }
        let _ = SigSet::empty().thread_set_mask();
        // What its processes leave behind stays within its tree, as if it were a process 1: a checkpoint is of a tree.
        // SAFETY: no pointers.
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
        if let Err(e) = seccomp::install(&self.filter) {
            self.report(Fault::Seccomp, e.raw_os_error().unwrap_or(0));
            return Err(ExecutorError::Other(e.to_string()));
        }
        let Err(errno) = nix::unistd::execve(&path, &args, &env);
        self.report(Fault::NotExecutable, errno as i32);
        Err(ExecutorError::Other(errno.to_string()))
    }

    /// `exec` gives the environment to the program; the shim's own stays as it is.
    fn setup_envs(
        &self,
        _: std::collections::HashMap<String, String>,
    ) -> Result<(), libcontainer::workload::ExecutorSetEnvsError> {
        Ok(())
    }
}
