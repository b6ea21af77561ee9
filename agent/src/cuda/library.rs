//! libcuda, loaded by name: what berth calls of it, and what it says in words. The only module that knows libloading.
//!
//! The structures are those of the CUDA Driver API from version 13.0 on; whatever a later one has put into their reserved
//! parts is off where it is zero.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::ptr;

use super::{Process, State, uuid};

/// The dynamic loader looks for it, in `LD_LIBRARY_PATH` too.
const NAME: &str = "libcuda.so.1";
/// The first version of CUDA that serves, and the driver that brings it. Drivers 570 to 579, of versions 12.8 and 12.9,
/// have the calls too, and bring memory back onto no device but the one where it was: a pod saved by one could go nowhere
/// else, and not even on here when that device is taken. On Arm the driver saves nothing before 595.
const NEEDED: (c_int, &str) = if cfg!(target_arch = "x86_64") { (13_000, "580") } else { (13_020, "595") };

/// `CUresult`
type Code = c_int;
const SUCCESS: Code = 0;
/// Both say: no process that has CUDA at work.
const INVALID_VALUE: Code = 1;
const NOT_INITIALIZED: Code = 3;

/// `CUcheckpointLockArgs`
#[repr(C)]
struct LockArgs {
    timeout_ms: c_uint,
    reserved: c_uint,
    more: [u64; 7],
}

/// `CUcheckpointCheckpointArgs`, `CUcheckpointUnlockArgs`
#[repr(C)]
struct PlainArgs {
    reserved: [u64; 8],
}

/// `CUcheckpointGpuPair`
#[repr(C)]
struct Pair {
    old: [u8; 16],
    new: [u8; 16],
}

/// `CUcheckpointRestoreArgs`
#[repr(C)]
struct RestoreArgs {
    pairs: *mut Pair,
    count: c_uint,
    padding: c_uint,
    reserved: [u64; 6],
}

const _: () = assert!(size_of::<LockArgs>() == 64 && size_of::<PlainArgs>() == 64);
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<RestoreArgs>() == 64);

type Simple<T> = unsafe extern "C" fn(c_int, *mut T) -> Code;
type Name = unsafe extern "C" fn(Code, *mut *const c_char) -> Code;

pub struct Library {
    version: c_int,
    init: unsafe extern "C" fn(c_uint) -> Code,
    name: Option<Name>,
    text: Option<Name>,
    thread: Simple<c_int>,
    state: Simple<c_int>,
    lock: Simple<LockArgs>,
    checkpoint: Simple<PlainArgs>,
    restore: Simple<RestoreArgs>,
    unlock: Simple<PlainArgs>,
}

impl Library {
    /// Takes milliseconds, and touches no device.
    ///
    /// # Errors
    /// In words: what is missing, and what to do.
    pub fn load() -> Result<Self, String> {
        // SAFETY: the driver's own library, whose start and end run no code of others.
        let library = unsafe { libloading::Library::new(NAME) }.map_err(|e| {
            format!("{NAME} cannot be loaded: {e}; install the libraries of NVIDIA's driver on this node")
        })?;
        // It has threads from the first call on: it is never let go again.
        let library = Box::leak(Box::new(library));
        fn symbol<T: Copy>(library: &libloading::Library, name: &str) -> Option<T> {
            // SAFETY: each caller names the type that the API gives the symbol.
            unsafe { library.get::<T>(name.as_bytes()) }.ok().map(|symbol| *symbol)
        }
        let mut version = 0;
        let get: Option<unsafe extern "C" fn(*mut c_int) -> Code> = symbol(library, "cuDriverGetVersion");
        // SAFETY: the pointer is to a local.
        if get.is_none_or(|get| unsafe { get(&mut version) } != SUCCESS) {
            return Err(format!("{NAME} does not tell its version: it is not NVIDIA's, or is broken"));
        }
        let too_old = || {
            format!(
                "NVIDIA's driver is too old to save the memory of GPUs: it knows CUDA {}, and CUDA {} is needed: \
                 install driver {} or later",
                text_of(version),
                text_of(NEEDED.0),
                NEEDED.1
            )
        };
        if version < NEEDED.0 {
            return Err(too_old());
        }
        let all = || {
            Some(Self {
                version,
                init: symbol(library, "cuInit")?,
                name: symbol(library, "cuGetErrorName"),
                text: symbol(library, "cuGetErrorString"),
                thread: symbol(library, "cuCheckpointProcessGetRestoreThreadId")?,
                state: symbol(library, "cuCheckpointProcessGetState")?,
                lock: symbol(library, "cuCheckpointProcessLock")?,
                checkpoint: symbol(library, "cuCheckpointProcessCheckpoint")?,
                restore: symbol(library, "cuCheckpointProcessRestore")?,
                unlock: symbol(library, "cuCheckpointProcessUnlock")?,
            })
        };
        all().ok_or_else(too_old)
    }

    /// As `13.0`.
    pub fn version(&self) -> String {
        text_of(self.version)
    }

    /// Wakes the driver and its devices, which restoring needs: seconds.
    pub fn begin(&self) -> Result<(), String> {
        // SAFETY: no pointers.
        self.check("cuInit", unsafe { (self.init)(0) })
    }

    fn check(&self, call: &str, code: Code) -> Result<(), String> {
        if code == SUCCESS {
            return Ok(());
        }
        let word = |of: Option<Name>| {
            let mut text = ptr::null();
            // SAFETY: the pointer is to a local.
            let known = of.is_some_and(|of| unsafe { of(code, &mut text) } == SUCCESS) && !text.is_null();
            // SAFETY: the library's own constant, which ends with NUL.
            known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        let name = word(self.name).unwrap_or_else(|| format!("error {code}"));
        let text = word(self.text).map(|text| format!(" ({text})")).unwrap_or_default();
        Err(format!("NVIDIA's driver answers {call} with {name}{text}"))
    }

    /// Of those that have CUDA at work; the others are left out, and so are those that have ended.
    pub fn states(&self, pids: &[i32]) -> Result<Vec<Process>, String> {
        let mut found = Vec::new();
        for pid in pids {
            if let Some(state) = self.state(*pid)? {
                found.push(Process { pid: *pid, state });
            }
        }
        Ok(found)
    }

    fn state(&self, pid: i32) -> Result<Option<State>, String> {
        let mut thread = 0;
        // SAFETY: the pointer is to a local.
        match unsafe { (self.thread)(pid, &mut thread) } {
            INVALID_VALUE | NOT_INITIALIZED => return Ok(None),
            code => self.check("cuCheckpointProcessGetRestoreThreadId", code)?,
        }
        let mut state = 0;
        // SAFETY: the pointer is to a local.
        self.check("cuCheckpointProcessGetState", unsafe { (self.state)(pid, &mut state) })?;
        Ok(Some(match state {
            0 => State::Running,
            1 => State::Locked,
            2 => State::Checkpointed,
            3 => State::Failed,
            _ => State::Other,
        }))
    }

    pub fn lock(&self, pid: i32, timeout_ms: u32) -> Result<(), String> {
        let mut args = LockArgs { timeout_ms, reserved: 0, more: [0; 7] };
        // SAFETY: the pointer is to a local of the API's layout.
        self.check("cuCheckpointProcessLock", unsafe { (self.lock)(pid, &mut args) })
    }

    pub fn checkpoint(&self, pid: i32) -> Result<(), String> {
        let mut args = PlainArgs { reserved: [0; 8] };
        // SAFETY: the pointer is to a local of the API's layout.
        self.check("cuCheckpointProcessCheckpoint", unsafe { (self.checkpoint)(pid, &mut args) })
    }

    pub fn restore(&self, pid: i32, pairs: &[(String, String)]) -> Result<(), String> {
        let pair = |(old, new): &(String, String)| Some(Pair { old: uuid(old)?, new: uuid(new)? });
        let pairs: Option<Vec<Pair>> = pairs.iter().map(pair).collect();
        let mut pairs = pairs.ok_or("a device's name is no UUID of NVIDIA's")?;
        let at = if pairs.is_empty() { ptr::null_mut() } else { pairs.as_mut_ptr() };
        let mut args = RestoreArgs { pairs: at, count: pairs.len() as c_uint, padding: 0, reserved: [0; 6] };
        // SAFETY: the pointers are to locals of the API's layout, and the count is theirs.
        self.check("cuCheckpointProcessRestore", unsafe { (self.restore)(pid, &mut args) })
    }

    pub fn unlock(&self, pid: i32) -> Result<(), String> {
        let mut args = PlainArgs { reserved: [0; 8] };
        // SAFETY: the pointer is to a local of the API's layout.
        self.check("cuCheckpointProcessUnlock", unsafe { (self.unlock)(pid, &mut args) })
    }
}

fn text_of(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_people_write_them() {
        assert_eq!(
            (text_of(12_080), text_of(13_000), text_of(12_040)),
            ("12.8".into(), "13.0".into(), "12.4".into())
        );
    }
}
