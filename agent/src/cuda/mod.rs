//! The checkpoint calls of NVIDIA's driver, made by a process of their own: `berth-agent cuda`. It makes one call for
//! each that it is asked for and decides nothing; what is to be called when is the supervisor's.
//!
//! Neither the agent nor a shim loads libcuda: it takes tens of MiB, starts threads, keeps the devices open, and a call
//! of it may hang in the kernel, beyond any signal. A helper belongs to one pod's one saving or start and ends with it,
//! rather than being the agent's for all: a shim outlives its agent, and must bring its pod's memory back without one; a
//! call that hangs holds up its own pod alone; and between checkpoints nothing of it is there. What the start of the
//! library takes, seconds, passes while the pod still runs, or while CRIU brings it back.
//!
//! Source: CUDA Driver API, "CUDA Checkpointing".

mod library;
mod survey;

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::process::ExitCode;

use berth_protocol::units::Bytes;
use nix::sys::socket::{MsgFlags, recv, send};
use serde::{Deserialize, Serialize};

use library::Library;

/// The subcommand; with `CHECK` it says on standard output what the driver can, or on standard error why it cannot,
/// else it serves the socket that is its standard input, a message each way for a call.
pub const SUBCOMMAND: &str = "cuda";
pub const CHECK: &str = "check";
/// The library is loaded, and no device touched.
pub const CHECK_S_MAX: u32 = 10;
/// A pod's processes may be many: each takes seven bytes.
pub const MESSAGE_BYTES_MAX: usize = 256 << 10;

/// What the helper is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Call {
    /// Which of these processes, all of a pod, have memory on `devices`, and whether all of that can be saved.
    Survey {
        pids: Vec<i32>,
        devices: Vec<String>,
    },
    /// Which of these processes have CUDA at work, and how they stand.
    States {
        pids: Vec<i32>,
    },
    /// Keeps a process from further calls; it then runs on until it makes one.
    Lock {
        pid: i32,
        timeout_ms: u32,
    },
    /// Brings its memory from the devices into the host's, and lets the devices go.
    Checkpoint {
        pid: i32,
    },
    /// The reverse, onto the second of each pair of devices; none: onto those where it was.
    Restore {
        pid: i32,
        pairs: Vec<(String, String)>,
    },
    Unlock {
        pid: i32,
    },
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    Done,
    Surveyed(Survey),
    States(Vec<Process>),
    /// In words.
    Failed(String),
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Survey {
    /// Those that have CUDA at work.
    pub processes: Vec<Process>,
    /// What they hold of the devices' memory, all of which the host's must take in.
    pub bytes: Bytes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    pub pid: i32,
    pub state: State,
}

/// `CUprocessState`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum State {
    Running,
    Locked,
    Checkpointed,
    /// Beyond repair.
    Failed,
    /// On the way from one to another, or what this program does not know.
    Other,
}

impl Call {
    /// In words, for messages.
    pub fn what(&self) -> String {
        let of = |what: &str, pid: &i32| format!("{what} process {pid}");
        match self {
            Call::Survey { .. } => "looking at the pod's processes".to_owned(),
            Call::States { .. } => "asking how the pod's processes stand".to_owned(),
            Call::Lock { pid, .. } => of("locking", pid),
            Call::Checkpoint { pid } => of("saving the memory of", pid),
            Call::Restore { pid, .. } => of("bringing back the memory of", pid),
            Call::Unlock { pid } => of("unlocking", pid),
        }
    }
}

/// `berth-agent cuda [check]`. To be called before any thread exists.
pub fn main(check: bool) -> ExitCode {
    if check {
        // It ends by itself, whoever waits for it.
        // SAFETY: no pointers.
        unsafe { libc::alarm(CHECK_S_MAX) };
        return match Library::load() {
            Ok(library) => {
                println!("{}", library.version());
                ExitCode::SUCCESS
            }
            Err(why) => {
                let _ = writeln!(io::stderr(), "{why}");
                ExitCode::FAILURE
            }
        };
    }
    // SAFETY: a constant and a C string.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"berth-cuda".as_ptr()) };
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = writeln!(io::stderr(), "berth-agent cuda: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Until whoever asks is gone.
fn serve() -> io::Result<()> {
    let socket = io::stdin();
    let mut begun = None;
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    loop {
        let length = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(nix::Error::EINTR) => continue,
            Err(e) => return Err(e.into()),
        };
        let answer = match serde_json::from_slice(&buffer[..length]) {
            Ok(call) => {
                let library = begun.get_or_insert_with(|| {
                    let library = Library::load()?;
                    library.begin()?;
                    Ok(library)
                });
                library.as_ref().map_err(String::clone).and_then(|library| answer(library, &call))
            }
            Err(e) => Err(format!("it was asked for what it does not know: {e}")),
        };
        let answer = answer.unwrap_or_else(Answer::Failed);
        send(socket.as_raw_fd(), &serde_json::to_vec(&answer)?, MsgFlags::MSG_NOSIGNAL)?;
    }
}

fn answer(library: &Library, call: &Call) -> Result<Answer, String> {
    match call {
        Call::Survey { pids, devices } => survey::survey(library, pids, devices).map(Answer::Surveyed),
        Call::States { pids } => library.states(pids).map(Answer::States),
        Call::Lock { pid, timeout_ms } => library.lock(*pid, *timeout_ms).map(|()| Answer::Done),
        Call::Checkpoint { pid } => library.checkpoint(*pid).map(|()| Answer::Done),
        Call::Restore { pid, pairs } => library.restore(*pid, pairs).map(|()| Answer::Done),
        Call::Unlock { pid } => library.unlock(*pid).map(|()| Answer::Done),
    }
}

/// The sixteen bytes of a device's name, `GPU-6c3b…`, in the order in which they are written; `None`: it is not
/// NVIDIA's.
pub fn uuid(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text.strip_prefix("GPU-")?.bytes().filter(|byte| *byte != b'-').collect();
    let mut bytes = [0; 16];
    if digits.len() != 2 * bytes.len() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_as_their_bytes() {
        let bytes = uuid("GPU-01020304-0506-0708-090a-0b0c0d0e0fff").unwrap();
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255]);
        for other in
            ["MIG-01020304-0506-0708-090a-0b0c0d0e0fff", "GPU-3a0f1c2b4d5e6f70", "GPU-", "0000:01:00.0"]
        {
            assert_eq!(uuid(other), None, "{other}");
        }
    }
}
