//! Asks whether NVIDIA's driver can save the memory of its devices, by a child that ends at once: libcuda is never loaded
//! into the agent.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::bounded;
use crate::cuda::{CHECK, SUBCOMMAND};

/// The library is loaded, and no device touched.
const CHECK_MAX: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(5);
const SAID_BYTES_MAX: usize = 400;

/// The version of CUDA that it knows; `program` is the agent's own.
///
/// # Errors
/// Why it cannot, in words.
pub fn check(program: &Path) -> Result<String, String> {
    let failed = |e: std::io::Error| format!("libcuda cannot be asked: {e}");
    let mut command = Command::new(program);
    command.arg0("berth-agent").args([SUBCOMMAND, CHECK]).stdin(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(failed)?;
    let status = wait(&mut child).map_err(failed)?;
    let text = |pipe: Option<&mut dyn Read>| {
        let mut said = String::new();
        // What it says is short: it was written before its end.
        let _ = pipe.map(|pipe| pipe.take(SAID_BYTES_MAX as u64).read_to_string(&mut said));
        bounded(&said, SAID_BYTES_MAX)
    };
    let said = text(child.stdout.as_mut().map(|pipe| pipe as &mut dyn Read));
    match status {
        Some(status) if status.success() => Ok(said),
        Some(status) => {
            let why = text(child.stderr.as_mut().map(|pipe| pipe as &mut dyn Read));
            Err(if why.is_empty() { format!("libcuda cannot be asked: {status}") } else { why })
        }
        None => Err(format!("libcuda has not answered within {} s: see the kernel log", CHECK_MAX.as_secs())),
    }
}

/// `None`: it took too long, and was ended.
fn wait(child: &mut Child) -> std::io::Result<Option<ExitStatus>> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if begun.elapsed() > CHECK_MAX {
            child.kill()?;
            return Ok(None);
        }
        std::thread::sleep(LOOK);
    }
}
