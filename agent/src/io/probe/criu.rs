//! Finds a CRIU that works here: runs the candidates' own check in short-lived children, and keeps nothing running.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use super::bounded;

/// `criu check` takes 30 ms; on a loaded board, seconds.
const RUN_MS_MAX: u64 = 20_000;
const OUTPUT_BYTES_MAX: u64 = 16 << 10;
const VERSION_BYTES_MAX: usize = 32;
const REASON_BYTES_MAX: usize = 200;

/// A CRIU that passed its own check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Criu {
    pub path: PathBuf,
    /// Such as `4.1.1`.
    pub version: String,
}

/// No candidate works: each with why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct NoCriu {
    pub refused: Vec<(PathBuf, Refusal)>,
}

/// Why a candidate is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("cannot be started: {0}")]
    NotStarted(String),
    #[error("has not ended within {} s", RUN_MS_MAX / 1000)]
    Slow,
    #[error("its check failed: {0}")]
    Failed(String),
    #[error("tells no version")]
    NoVersion,
}

impl fmt::Display for NoCriu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.refused.is_empty() {
            return f.write_str("no criu found: install it, or name one with --criu");
        }
        f.write_str("no criu works here")?;
        for (path, refusal) in &self.refused {
            write!(f, "; {}: {refusal}", path.display())?;
        }
        Ok(())
    }
}

/// Where a CRIU may be, in order: as configured, beside the program, where the package puts it, on `PATH`.
/// Only files that exist, and what the configuration names.
pub fn candidates(configured: Option<&Path>, program: Option<&Path>, path: &str) -> Vec<PathBuf> {
    let beside = program.and_then(Path::parent).map(|dir| dir.join("criu/criu"));
    let packaged = PathBuf::from("/usr/lib/berth/criu/criu");
    let mut found: Vec<PathBuf> = configured.map(Path::to_owned).into_iter().collect();
    let on_path = path.split(':').filter(|dir| dir.starts_with('/')).map(|dir| Path::new(dir).join("criu"));
    for candidate in beside.into_iter().chain([packaged]).chain(on_path) {
        // `/sbin` is often `/usr/sbin` by another name.
        let same = |other: &PathBuf| other.canonicalize().ok() == candidate.canonicalize().ok();
        if candidate.is_file() && !found.iter().any(same) {
            found.push(candidate);
        }
    }
    found
}

/// The first candidate that passes `criu check`.
pub async fn find(candidates: &[PathBuf]) -> Result<Criu, NoCriu> {
    let mut refused = Vec::new();
    for path in candidates {
        match try_one(path).await {
            Ok(version) => return Ok(Criu { path: path.clone(), version }),
            Err(refusal) => refused.push((path.clone(), refusal)),
        }
    }
    Err(NoCriu { refused })
}

async fn try_one(path: &Path) -> Result<String, Refusal> {
    run(path, "check").await?;
    let output = run(path, "--version").await?;
    version(&output).ok_or(Refusal::NoVersion)
}

/// `Version: 4.1.1`, perhaps with a `GitID:` on the next line.
fn version(output: &str) -> Option<String> {
    let version = output.lines().find_map(|line| line.trim().strip_prefix("Version:"))?;
    Some(bounded(version, VERSION_BYTES_MAX)).filter(|version| !version.is_empty())
}

/// Standard output where the program succeeds; it is killed where it takes too long, and with this future.
async fn run(path: &Path, argument: &str) -> Result<String, Refusal> {
    let mut child = Command::new(path)
        .arg(argument)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| Refusal::NotStarted(error.to_string()))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let work = async { tokio::join!(read(out), read(err), child.wait()) };
    let ended = tokio::time::timeout(Duration::from_millis(RUN_MS_MAX), work).await;
    let (out, err, status) = ended.map_err(|_| Refusal::Slow)?;
    match status {
        Ok(status) if status.success() => Ok(out),
        Ok(status) => {
            let why = err.lines().chain(out.lines()).find(|line| line.contains("Error"));
            let why = why.or_else(|| err.lines().next_back()).unwrap_or_default();
            Err(Refusal::Failed(bounded(&format!("{status}: {why}"), REASON_BYTES_MAX)))
        }
        Err(error) => Err(Refusal::NotStarted(error.to_string())),
    }
}

async fn read(pipe: Option<impl AsyncRead + Unpin>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        // What could be read counts; the rest is drained, so that the child is not held up.
        let _ = (&mut pipe).take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes).await;
        let _ = tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn versions() {
        for (text, expect) in [
            ("Version: 3.17.1\nGitID: v3.17.1\n", Some("3.17.1")),
            ("Version: 4.2.1\n", Some("4.2.1")),
            ("Version:\n", None),
            ("nonsense", None),
        ] {
            assert_eq!(version(text).as_deref(), expect);
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_first_that_passes_its_check() {
        let dir = tempfile::tempdir().unwrap();
        let bad = script(dir.path(), "a/criu", "echo 'Error (criu/x.c:1): no such kernel' >&2; exit 1");
        let chatty = "case $1 in check) seq 100000; echo 'Looks good.';; *) echo 'Version: 4.1.1';; esac";
        let good = script(dir.path(), "b/criu", chatty);
        let absent = dir.path().join("c/criu");
        let found = find(&[absent.clone(), bad.clone(), good.clone()]).await.unwrap();
        assert_eq!(found, Criu { path: good, version: "4.1.1".to_owned() });
        let none = find(&[absent, bad]).await.unwrap_err();
        assert!(none.to_string().contains("no such kernel"), "{none}");
        assert!(matches!(none.refused[0].1, Refusal::NotStarted(_)));
    }

    #[test]
    fn candidates_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let beside = script(dir.path(), "criu/criu", "");
        let on_path = script(dir.path(), "bin/criu", "");
        let path = format!("relative:{0}/bin:/nonexistent:{0}/bin", dir.path().display());
        let program = dir.path().join("berth-agent");
        let configured = Path::new("/opt/criu");
        let found = candidates(Some(configured), Some(&program), &path);
        let packaged = Path::new("/usr/lib/berth/criu/criu");
        let expect = [configured, &beside, packaged, &on_path];
        let installed = |path: &&Path| *path != packaged || path.is_file();
        assert_eq!(found, expect.into_iter().filter(installed).collect::<Vec<_>>());
    }
}
