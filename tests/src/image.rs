//! Images for tests, made by real tools.

use std::path::Path;
use std::process::{Command, Stdio};

/// An image with busybox and nothing else, made by umoci.
pub fn busybox_layout(layout: &Path) {
    let root = layout.with_extension("bundle");
    let tag = format!("{}:latest", layout.display());
    let script = format!(
        "set -e; umoci init --layout {l}; umoci new --image {tag}; umoci unpack --image {tag} {r}; \
         mkdir -p {r}/rootfs/bin; cp /bin/busybox {r}/rootfs/bin/; ln -s busybox {r}/rootfs/bin/sh; \
         umoci repack --image {tag} {r}; umoci config --image {tag} --config.cmd sh --config.cmd -c --config.cmd 'echo from the image'",
        l = layout.display(),
        r = root.display()
    );
    let output = Command::new("sh").args(["-c", &script]).stdin(Stdio::null()).output().expect("sh starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
