//! `berth-agent unpack`: a workspace's archive, opened in a process of its own, since its bytes are somebody's.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::process::ExitCode;

use super::confine::{Room, confine};

/// What a workspace may unpack to, against archives made to fill a disk.
const WORKSPACE_BYTES_MAX: u64 = 2 << 30;

/// `berth-agent unpack ARCHIVE DIR`
pub fn main(archive: &Path, dir: &Path) -> ExitCode {
    let unpack = || -> io::Result<()> {
        fs::create_dir_all(dir)?;
        let room = Room {
            reads: vec![archive.to_owned()],
            writes: vec![dir.to_owned()],
            capabilities: &[],
            network: false,
        };
        confine(&room).map_err(io::Error::other)?;
        let file = flate2::read::GzDecoder::new(File::open(archive)?);
        let mut tar = tar::Archive::new(file.take(WORKSPACE_BYTES_MAX));
        tar.set_preserve_permissions(true);
        tar.set_unpack_xattrs(false);
        tar.unpack(dir)
    };
    match unpack() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the job's files cannot be unpacked: {error}");
            ExitCode::FAILURE
        }
    }
}
