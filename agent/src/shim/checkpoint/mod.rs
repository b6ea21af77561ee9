//! A pod's checkpoints: CRIU spoken to over its own socket, what it must be told of a container, and the layout of a
//! checkpoint's directory. When to save or restore is the supervisor's to decide.
//!
//! ```text
//! checkpoints/{level}/            whole, once it has this name
//!   saved.json                    task::Saved
//!   volumes/{index}.tar           scratch volumes
//!   kept.tar                      what the programs put into the checkpoint directory
//!   containers/{container}/images/           as CRIU writes them; none where the programs saved themselves
//!   containers/{container}/config.json       the OCI configuration, for whoever reads an export; no restore does
//!   containers/{container}/upper.tar         the writable layer, with extended attributes
//!   containers/{container}/workspace.tar     what was written below the workspace's path
//! ```

pub mod archive;
pub mod criu;
pub mod dump;
pub mod helper;
pub mod hook;
pub mod restore;
pub mod rpc;
pub mod steps;

use std::path::{Path, PathBuf};

use berth_protocol::ids::ContainerName;

use crate::task::file;

/// The parts of a checkpoint in its directory.
#[derive(Debug, Clone)]
pub struct Parts(PathBuf);

impl Parts {
    pub fn new(dir: PathBuf) -> Self {
        Self(dir)
    }
    /// The checkpoint that the pod's next run begins from.
    pub fn to_restore(pod_dir: &Path) -> Self {
        Self(pod_dir.join(file::RESTORE_DIR))
    }
    pub fn dir(&self) -> &Path {
        &self.0
    }
    pub fn saved(&self) -> PathBuf {
        self.0.join(file::SAVED)
    }
    pub fn container(&self, name: &ContainerName) -> PathBuf {
        // A container may be named as one of the other parts.
        self.0.join("containers").join(name.as_str())
    }
    pub fn images(&self, name: &ContainerName) -> PathBuf {
        self.container(name).join("images")
    }
    pub fn config(&self, name: &ContainerName) -> PathBuf {
        self.container(name).join("config.json")
    }
    pub fn upper(&self, name: &ContainerName) -> PathBuf {
        self.container(name).join("upper.tar")
    }
    pub fn workspace(&self, name: &ContainerName) -> PathBuf {
        self.container(name).join("workspace.tar")
    }
    pub fn kept(&self) -> PathBuf {
        self.0.join(file::KEPT)
    }
    pub fn volume(&self, index: usize) -> PathBuf {
        self.0.join("volumes").join(format!("{index}.tar"))
    }
}
