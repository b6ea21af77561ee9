//! What a child gives up before it reads the first of somebody's bytes, an image's, an archive's, a checkpoint's: if a
//! parser of it were ever led astray, it would run no program, reach no file but those it is for, speak to no
//! service of this machine, and have few of root's rights.

use std::io;
use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, Scope, path_beneath_rules,
};

use crate::shim::{capabilities, seccomp, sys};

/// What finding a host's address and trusting its certificate takes, wherever a distribution keeps it.
const FOR_NETWORK: [&str; 14] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/ld.so.cache",
    "/etc/ssl",
    "/etc/pki",
    "/etc/ca-certificates",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
    "/usr/lib",
    "/lib",
];
/// Variables by which other certificates are trusted.
const CERTIFICATES: [&str; 2] = ["SSL_CERT_FILE", "SSL_CERT_DIR"];

/// To run programs, and to look into others: what a container may, and a parser need not. The rest containers may not either.
const NEVER: [libc::c_long; 5] = [
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
];

/// What a child keeps.
pub struct Room {
    /// Files, and directories with all below, that it reads. What is not there is left out.
    pub reads: Vec<PathBuf>,
    /// Likewise, that it changes.
    pub writes: Vec<PathBuf>,
    /// Of root's rights, by their names.
    pub capabilities: &'static [&'static str],
    pub network: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    #[error("this process cannot give up what it needs no more: {0}")]
    Kernel(#[from] io::Error),
    #[error("this process cannot confine itself to its files")]
    Landlock(#[from] RulesetError),
}

/// To be called while there is one thread. A kernel without Landlock (before 5.19, or built so) leaves it what files it has.
pub fn confine(room: &Room) -> Result<(), ConfineError> {
    landlock(room)?;
    sys::keep_capabilities(capabilities::named(room.capabilities))?;
    // A service of the machine would take this process for root at the other end of its socket.
    seccomp::install(&seccomp::without(&NEVER, libc::AF_UNIX as u32))?;
    seccomp::install(&seccomp::filter(&Default::default()))?;
    Ok(())
}

/// The kernel's version of Landlock, where it has one that lets files be renamed between directories.
pub fn landlock_version() -> Option<i32> {
    const ASK: libc::c_long = 1;
    // SAFETY: without a ruleset nothing is read and nothing made; the kernel answers with a number.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0_usize, ASK)
    };
    i32::try_from(version).ok().filter(|version| *version >= ABI::V2 as i32)
}

fn landlock(room: &Room) -> Result<(), RulesetError> {
    // Renames between directories want their own right, without which there is nothing to be had from the rest.
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::SoftRequirement)
        .handle_access(AccessFs::Refer)?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .scope(Scope::from_all(ABI::V6))?;
    if !room.network {
        ruleset = ruleset.handle_access(AccessNet::from_all(ABI::V4))?;
    }
    let network = room.network.then(|| {
        let variables = CERTIFICATES.iter().filter_map(std::env::var_os).map(PathBuf::from);
        FOR_NETWORK.iter().map(PathBuf::from).chain(variables)
    });
    let reads = room.reads.iter().cloned().chain(network.into_iter().flatten());
    let all = AccessFs::from_all(ABI::V5) & !AccessFs::Execute;
    ruleset
        .create()?
        .add_rules(path_beneath_rules(reads, AccessFs::ReadFile | AccessFs::ReadDir))?
        .add_rules(path_beneath_rules(&room.writes, all))?
        .restrict_self()?;
    Ok(())
}
