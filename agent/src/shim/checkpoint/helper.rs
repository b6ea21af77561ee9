//! One `berth-agent cuda`: the process that makes the driver's calls for this pod, spoken to over a socket. Never waits;
//! the supervisor's loop polls. A call that takes too long ends with its process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use berth_protocol::units::{BootMs, Bytes, Millis};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::Pid;

use super::super::sys;
use super::restore::host_time;
use crate::cuda::{Answer, Call, MESSAGE_BYTES_MAX, SUBCOMMAND};

/// What concerns programs that compute is not for one that makes calls for others: it must see every device, by itself.
const NOT_FOR_IT: [&str; 3] = ["CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_MPS_PIPE_DIRECTORY"];
/// The library's start takes seconds, and more with many devices that sleep.
const LOOK_MS_MAX: u64 = 60_000;
/// Beyond what the driver was told to take at most.
const LOCK_MARGIN_MS: u64 = 5_000;
const UNLOCK_MS_MAX: u64 = 20_000;
/// A gigabyte may take four seconds, on a machine that swaps.
const COPY_MS: u64 = 60_000;
const COPY_BYTES_PER_MS: u64 = 256 << 10;

pub struct Helper {
    pid: Pid,
    pidfd: OwnedFd,
    socket: OwnedFd,
    asked: Option<Asked>,
    spent: bool,
}

struct Asked {
    what: String,
    since: BootMs,
    give_up_at: BootMs,
}

/// How long a call may take where `bytes` are on the devices.
fn within(call: &Call, bytes: Bytes) -> Millis {
    Millis(match call {
        Call::Survey { .. } | Call::States { .. } => LOOK_MS_MAX,
        Call::Lock { timeout_ms, .. } => u64::from(*timeout_ms) + LOCK_MARGIN_MS,
        Call::Checkpoint { .. } | Call::Restore { .. } => COPY_MS + bytes.0 / COPY_BYTES_PER_MS,
        Call::Unlock { .. } => UNLOCK_MS_MAX,
    })
}

impl Helper {
    pub fn start() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("berth-agent").arg(SUBCOMMAND).stdin(theirs);
        for name in NOT_FOR_IT {
            command.env_remove(name);
        }
        let time: Option<File> = host_time();
        let shim = nix::unistd::getpid();
        let prepare = move || -> io::Result<()> {
            // With the shim it ends, also in the midst of a call.
            sys::end_with(shim)?;
            let Some(time) = &time else { return Ok(()) };
            // SAFETY: no pointers.
            match unsafe { libc::setns(time.as_raw_fd(), libc::CLONE_NEWTIME) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        // SAFETY: the process has one thread, so the child may do what it likes between fork and exec.
        let child = unsafe { command.pre_exec(prepare) }.spawn()?;
        let pid = child.id() as i32;
        Ok(Self { pidfd: sys::pidfd(pid)?, pid: Pid::from_raw(pid), socket, asked: None, spent: false })
    }

    /// Asks; `hear` tells the answer. One call at a time.
    pub fn ask(&mut self, call: &Call, bytes: Bytes, now: BootMs) {
        let what = call.what();
        self.asked = Some(Asked { what, since: now, give_up_at: now.plus(within(call, bytes)) });
        let message = serde_json::to_vec(call).unwrap_or_default();
        if send(self.socket.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL).is_err() {
            // It has gone away, or goes now; `hear` says so.
            self.end();
        }
    }

    pub fn is_busy(&self) -> bool {
        self.asked.is_some()
    }

    /// Of no use any more.
    pub fn is_spent(&self) -> bool {
        self.spent
    }

    pub fn give_up_at(&self) -> Option<BootMs> {
        self.asked.as_ref().map(|asked| asked.give_up_at)
    }

    /// The answer to the last call; `None`: nothing yet, or nothing was asked.
    pub fn hear(&mut self, now: BootMs) -> Option<Answer> {
        let asked = self.asked.take()?;
        let what = &asked.what;
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        Some(match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) if length > 0 => match serde_json::from_slice(&buffer[..length]) {
                Ok(Answer::Failed(why)) => Answer::Failed(format!("{what}: {why}")),
                Ok(answer) => answer,
                Err(e) => self.give_up(format!("{what}: the answer cannot be read: {e}")),
            },
            Err(nix::Error::EAGAIN | nix::Error::EINTR) if now < asked.give_up_at => {
                self.asked = Some(asked);
                return None;
            }
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => self.give_up(format!(
                "{what} has not ended within {}: is work on the GPU that long, or its driver stuck (see the kernel log)?",
                asked.give_up_at.since(asked.since)
            )),
            _ => self.give_up(format!("{what}: the process that makes the driver's calls has ended")),
        })
    }

    fn give_up(&mut self, why: String) -> Answer {
        self.spent = true;
        self.end();
        Answer::Failed(why)
    }

    /// By force. What it has asked the driver for may yet happen.
    fn end(&self) {
        // Once it is reaped its number may be another's.
        if sys::is_alive(&self.pidfd) {
            let _ = kill(self.pid, Signal::SIGKILL);
        }
    }
}

impl AsFd for Helper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_memory_may_take_longer_and_a_lock_as_long_as_was_said() {
        let copy = Call::Checkpoint { pid: 1 };
        assert_eq!(within(&copy, Bytes::ZERO), Millis(60_000));
        assert_eq!(within(&copy, Bytes(100 << 30)), Millis(60_000 + 409_600));
        assert_eq!(within(&Call::Lock { pid: 1, timeout_ms: 30_000 }, Bytes(1 << 40)), Millis(35_000));
    }
}
