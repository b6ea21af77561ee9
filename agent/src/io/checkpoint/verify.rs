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
pub(super) struct Thread {
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
pub(super) fn thread(image: &[u8]) -> Option<Thread> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::checkpoint::rpc::Message;
    use berth_protocol::job;

    /// `core-2.img` of one thread.
    fn core(uid: u64, capabilities: u64, no_new_privileges: u64, seccomp: u64) -> Vec<u8> {
        let (mut creds, mut thread, mut core) = (Message::default(), Message::default(), Message::default());
        creds.number(1, uid).number(3, uid).number(5, uid).number(7, uid);
        for set in 10..=12 {
            creds.number(set, capabilities & 0xffff_ffff).number(set, capabilities >> 32);
        }
        creds.number(18, no_new_privileges);
        thread.message(10, &creds).number(11, seccomp);
        core.number(1, 1).message(5, &thread);
        let mut image = vec![0; 8];
        image.extend_from_slice(&(core.as_bytes().len() as u32).to_le_bytes());
        image.extend_from_slice(core.as_bytes());
        image
    }

    fn spec(user: Option<&str>) -> ContainerSpec {
        let file = b"name: a\nimage: host\ncommand: [sh]\n";
        let mut spec = job::parse(file, None).unwrap().spec.pod.containers.remove(0);
        spec.user = user.map(str::to_owned);
        spec
    }

    fn judge(image: &[u8], user: Option<&str>) -> Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("core-2.img"), image).unwrap();
        verify(dir.path(), &spec(user)).map_err(|error| error.to_string())
    }

    #[test]
    fn more_than_the_job_gives_is_refused() {
        const DOCKERS: u64 = 0xa804_25fb;
        const SYS_ADMIN: u64 = 1 << 21;
        const CHECKPOINT_RESTORE: u64 = 1 << 40;
        assert_eq!(judge(&core(0, DOCKERS, 1, 2), None), Ok(()));
        assert_eq!(judge(&core(1000, 0, 1, 2), Some("1000:1000")), Ok(()));
        for (image, user, why) in [
            (core(0, DOCKERS | SYS_ADMIN, 1, 2), None, "capabilities"),
            (core(0, CHECKPOINT_RESTORE, 1, 2), None, "capabilities"),
            (core(0, DOCKERS, 0, 2), None, "privileges"),
            (core(0, DOCKERS, 1, 0), None, "filter"),
            (core(0, 0, 1, 2), Some("1000"), "user"),
        ] {
            let refused = judge(&image, user).unwrap_err();
            assert!(refused.contains(why), "{why}: {refused}");
        }
        let whole = core(0, DOCKERS, 1, 2);
        for cut in 0..whole.len() {
            assert!(judge(&whole[..cut], None).is_err(), "cut at {cut}");
        }
    }
}
