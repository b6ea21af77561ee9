//! Asks whether NVIDIA's driver can save the memory of its devices, by a child that ends at once: libcuda is never loaded
//! into the agent.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};

use super::bounded;
use crate::cuda::{CHECK, CHECK_S_MAX, SUBCOMMAND};

const SAID_BYTES_MAX: usize = 400;

/// The version of CUDA that it knows; `program` is the agent's own.
///
/// # Errors
/// Why it cannot, in words.
pub fn check(program: &Path) -> Result<String, String> {
    let mut command = Command::new(program);
    command.arg0("berth-agent").args([SUBCOMMAND, CHECK]).stdin(Stdio::null());
    let output = command.output().map_err(|e| format!("libcuda cannot be asked: {e}"))?;
    let said = |bytes: &[u8]| bounded(&String::from_utf8_lossy(bytes), SAID_BYTES_MAX);
    let why = said(&output.stderr);
    match output.status {
        status if status.success() => Ok(said(&output.stdout)),
        status if status.signal() == Some(libc::SIGALRM) => {
            Err(format!("libcuda has not answered within {CHECK_S_MAX} s: see the kernel log"))
        }
        status if why.is_empty() => Err(format!("libcuda cannot be asked: {status}")),
        _ => Err(why),
    }
}
