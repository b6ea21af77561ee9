//! What must hold of a checkpoint's images before criu reads a byte of them: an image is as good as root, so the
//! identities and powers in it are held against the pod's specification.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use berth_protocol::job::ContainerSpec;

use super::TransferError;
use super::pages::messages;
use crate::shim::capabilities;
use crate::shim::checkpoint::rpc::{Fields, Value};

/// `SECCOMP_MODE_FILTER`
const SECCOMP_FILTER: u64 = 2;

/// The identities and powers of one thread, from `core-*.img`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Thread {
    uids: BTreeSet<u64>,
    /// Bits of all sets together.
    capabilities: u64,
    no_new_privileges: bool,
    seccomp: u64,
    credentials: bool,
}

/// Looks at every thread of a container's images.
pub fn verify(images: &Path, spec: &ContainerSpec) -> Result<(), TransferError> {
    let allowed = capabilities::bits(spec);
    let entries = fs::read_dir(images).map_err(TransferError::io("cannot list the checkpoint's images"))?;
    let mut threads = 0;
    for entry in entries {
        let entry = entry.map_err(TransferError::io("cannot list the checkpoint's images"))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with("core-") {
            continue;
        }
        let image = fs::read(entry.path()).map_err(TransferError::io(format!("cannot read {name}")))?;
        let unfit = |why: &str| TransferError::Unfit(format!("the checkpoint is refused: {name}: {why}"));
        let thread = thread(&image).ok_or_else(|| unfit("it is malformed"))?;
        // A process that has ended and was not waited for has none.
        if !thread.credentials {
            continue;
        }
        threads += 1;
        if thread.capabilities & !allowed != 0 {
            return Err(unfit("it has capabilities that the job does not"));
        }
        if !thread.no_new_privileges {
            return Err(unfit("it could gain privileges, which no container of berth's can"));
        }
        if thread.seccomp != SECCOMP_FILTER {
            return Err(unfit("it has no system call filter"));
        }
        let fixed = spec.user.as_deref().and_then(|user| user.split(':').next()?.parse::<u64>().ok());
        if let Some(uid) = fixed.filter(|uid| *uid != 0)
            && thread.uids.iter().any(|other| *other != uid)
        {
            return Err(unfit("it runs as another user than the job says"));
        }
    }
    match threads {
        0 => Err(TransferError::Unfit("the checkpoint is refused: no process is in it".to_owned())),
        _ => Ok(()),
    }
}

/// `None`: malformed.
fn thread(image: &[u8]) -> Option<Thread> {
    let messages = messages(image)?;
    let [core] = messages[..] else { return None };
    let mut found = Thread::default();
    for field in Fields::of(core) {
        match field? {
            // task_core_entry: older images have the mode here
            (3, Value::Bytes(task)) => {
                for field in Fields::of(task) {
                    if let (11, Value::Number(mode)) = field? {
                        found.seccomp = found.seccomp.max(mode);
                    }
                }
            }
            // thread_core_entry
            (5, Value::Bytes(thread)) => {
                for field in Fields::of(thread) {
                    match field? {
                        (10, Value::Bytes(creds)) => credentials(creds, &mut found)?,
                        (11, Value::Number(mode)) => found.seccomp = mode,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(found)
}

/// `creds_entry`
fn credentials(creds: &[u8], found: &mut Thread) -> Option<()> {
    found.credentials = true;
    // Of each set the words so far.
    let mut words = [0; 20];
    let mut take = |set: u32, word: u64| {
        let shift = words[set as usize] * 32;
        words[set as usize] += 1;
        found.capabilities |= if shift < 64 { (word & 0xffff_ffff) << shift } else { u64::MAX };
    };
    for field in Fields::of(creds) {
        match field? {
            (1 | 3 | 5 | 7, Value::Number(uid)) => drop(found.uids.insert(uid)),
            (set @ (9..=12 | 19), Value::Number(word)) => take(set, word),
            // Packed, as a writer may.
            (set @ (9..=12 | 19), Value::Bytes(mut packed)) => {
                while !packed.is_empty() {
                    let (word, rest) = varint(packed)?;
                    take(set, word);
                    packed = rest;
                }
            }
            (18, Value::Number(set)) => found.no_new_privileges = set != 0,
            _ => {}
        }
    }
    Some(())
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let length = bytes.iter().position(|byte| byte & 0x80 == 0)? + 1;
    let (own, rest) = bytes.split_at(length);
    let value = own
        .iter()
        .rev()
        .try_fold(0_u64, |value, byte| value.checked_mul(128).map(|value| value | u64::from(byte & 0x7f)))?;
    Some((value, rest))
}
