//! What a job asks to keep: packed from the container's file system after its end, by a process of its own, since
//! the names in there are somebody's.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use berth_protocol::ids::Digest;
use berth_protocol::limits::OUTPUT_BYTES_MAX;
use berth_protocol::message::node::DepotAccess;
use berth_protocol::units::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tokio::process::Command;

use super::depot;
use crate::core::checkpoints::NotStored;
use crate::shim::rootfs::{self, Home};
use crate::task::{Task, file};

/// The archive while it is written.
const HALF: &str = "outputs.half";
const PACK_MAX: Duration = Duration::from_secs(600);
/// `pack` ends with it where another try would end so too.
const TOO_LARGE: u8 = 2;

/// Packs and stores the outputs of the pod in `dir`; `None` where none of the paths was there.
pub async fn store(access: Option<&DepotAccess>, dir: &Path) -> Result<Option<(Digest, Bytes)>, NotStored> {
    let failed = |why: String, retriable| NotStored { why, retriable };
    let archive = dir.join(file::OUTPUTS);
    if !archive.exists() {
        let packing = Command::new("/proc/self/exe")
            .arg0("berth-agent")
            .args([Path::new("pack"), dir])
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(PACK_MAX, packing)
            .await
            .map_err(|_| failed("packing the outputs takes too long".to_owned(), true))?
            .map_err(|error| failed(format!("cannot pack the outputs: {error}"), true))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(failed(said, output.status.code() != Some(i32::from(TOO_LARGE))));
        }
    }
    let stored = depot::put_file(access, &archive).await;
    stored.map_err(|error| failed(format!("the outputs are not in the depot: {error}"), !error.is_final()))
}

/// `berth-agent pack POD_DIR`: leaves `outputs.tar.gz` in the pod's directory where any of the paths is there.
pub fn pack_main(dir: &Path) -> ExitCode {
    match pack(dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the outputs cannot be packed: {error}");
            if error.kind() == io::ErrorKind::FileTooLarge { TOO_LARGE.into() } else { ExitCode::FAILURE }
        }
    }
}

fn pack(dir: &Path) -> io::Result<()> {
    let dir = std::fs::canonicalize(dir)?;
    let task: Task = serde_json::from_slice(&std::fs::read(dir.join(file::TASK))?)?;
    let (Some(container), Some(root)) = (task.template.containers.first(), task.roots.first()) else {
        return Ok(());
    };
    if !Home::new(&dir, &container.name).upper().is_dir() {
        // It never began.
        return Ok(());
    }
    // Mounts of this process alone: they are gone with it, whatever happens.
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let (home, at) = (Home::new(&dir, &container.name), dir.join("result"));
    rootfs::mount_result(root, &home, &at).map_err(|error| io::Error::other(error.to_string()))?;
    if let (Some(lower), Some(workspace)) = (&task.workspace, &task.template.workspace) {
        mount_workspace(lower, &home, &at, &workspace.path)?;
    }
    let archive = File::create(dir.join(HALF))?;
    let home = File::open(&dir)?;
    // From here on every path is the container's own, wherever its links point.
    nix::unistd::chroot(&at)?;
    nix::unistd::chdir("/")?;
    if write_archive(archive, &task.template.outputs)? {
        nix::fcntl::renameat(&home, HALF, &home, file::OUTPUTS)?;
    }
    home.sync_all()
}

/// The files that travelled with the job, as the run left them.
fn mount_workspace(lower: &Path, home: &Home, at: &Path, path: &str) -> io::Result<()> {
    let point: PathBuf = at.join(path.trim_start_matches('/'));
    let upper = home.workspace_upper();
    if !upper.is_dir() || !point.is_dir() {
        return Ok(());
    }
    let options = format!("lowerdir={}:{}", upper.display(), lower.display());
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    Ok(mount(Some("overlay"), &point, Some("overlay"), flags, Some(options.as_str()))?)
}

/// Packs each path that is there, without its leading slash; says whether any was.
fn write_archive(archive: File, outputs: &[String]) -> io::Result<bool> {
    let mut tar = tar::Builder::new(GzEncoder::new(
        Bounded { inner: archive, left: OUTPUT_BYTES_MAX },
        Compression::fast(),
    ));
    tar.follow_symlinks(false);
    let mut any = false;
    for output in outputs {
        let name = output.trim_start_matches('/');
        let Ok(meta) = std::fs::symlink_metadata(output) else { continue };
        any = true;
        if meta.is_dir() {
            tar.append_dir_all(name, output)?;
        } else {
            tar.append_path_with_name(output, name)?;
        }
    }
    tar.into_inner()?.finish()?.inner.sync_all()?;
    Ok(any)
}

/// A file that takes so much and no more.
struct Bounded {
    inner: File,
    left: u64,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.left = self.left.checked_sub(written as u64).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("packed, they are larger than {}", Bytes(OUTPUT_BYTES_MAX)),
            )
        })?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
