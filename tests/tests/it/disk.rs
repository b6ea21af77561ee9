//! Small disks that fill up, or fail, at a directory of a cluster's.

use std::path::PathBuf;
use std::process::{Command, Output};

use crate::cluster::{Cluster, text, until};

/// Gone with its handle.
pub struct Disk {
    at: PathBuf,
    /// Of a file with a file system that is read-only once it has an error, as Debian has its machines' roots.
    device: Option<String>,
}

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

fn done(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    assert!(output.status.success(), "{program} {args:?}: {}", text(&output));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

impl Disk {
    /// In memory.
    pub fn at(cluster: &Cluster, name: &str) -> Self {
        let disk = Self { at: cluster.dir.path().join(name), device: None };
        std::fs::create_dir(&disk.at).expect("a directory");
        done("mount", &["-t", "tmpfs", "-o", "size=64m", "none", disk.path()]);
        disk
    }

    pub fn that_can_fail(cluster: &Cluster, name: &str) -> Self {
        let file = cluster.dir.path().join(format!("{name}.disk"));
        let made = std::fs::File::create(&file).and_then(|file| file.set_len(64 << 20));
        made.expect("a file");
        let file = file.to_str().expect("a plain path");
        done("mke2fs", &["-q", "-t", "ext4", "-e", "remount-ro", file]);
        let device = done("losetup", &["--find", "--show", file]);
        let disk = Self { at: cluster.dir.path().join(name), device: Some(device) };
        std::fs::create_dir(&disk.at).expect("a directory");
        disk.mount();
        disk
    }

    fn path(&self) -> &str {
        self.at.to_str().expect("a plain path")
    }

    fn device(&self) -> &str {
        self.device.as_deref().expect("it can fail")
    }

    fn mount(&self) {
        done("mount", &[self.device(), self.path()]);
    }

    /// It has an error, and takes no more writes, through open files either.
    pub fn fail(&self) {
        let name = self.device().trim_start_matches("/dev/");
        std::fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "a test's").expect("ext4 fails");
        let refused = std::fs::write(self.at.join("more"), "").expect_err("it takes no more");
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    }

    /// Checked, as at a machine's start, once nobody uses it: nor do pods that began while it was mounted, for where a
    /// machine's mounts are not shared they keep it.
    pub fn repair(&self) {
        until("nobody mounts the disk", 30, || run("umount", &[self.path()]).status.success().then_some(()));
        // 1: it had errors, and has none now.
        let checked = || run("e2fsck", &["-fy", self.device()]).status.code().filter(|code| *code < 2);
        until("nobody uses the disk", 30, checked);
        self.mount();
    }

    pub fn fill(&self) {
        let mut file = std::fs::File::create(self.at.join("fill")).expect("a file");
        let full = std::io::copy(&mut std::io::repeat(0), &mut file).expect_err("a disk has an end");
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    }

    pub fn empty(&self) {
        std::fs::remove_file(self.at.join("fill")).expect("it is there");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run("umount", &["-l", self.path()]);
        if let Some(device) = &self.device {
            run("losetup", &["--detach", device]);
        }
    }
}
