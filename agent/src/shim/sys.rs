//! Small wrappers around system calls that the standard library lacks; no policy.

use std::ffi::{CString, OsStr};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::SystemTime;

use berth_protocol::units::{BootMs, Timestamp};
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::clock_gettime;
use nix::unistd::Pid;

/// Milliseconds of CLOCK_BOOTTIME, which goes on while the machine sleeps.
pub fn boot_now() -> BootMs {
    let time = clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).unwrap_or(TimeSpec::new(0, 0));
    BootMs(u64::try_from(time.num_milliseconds()).unwrap_or(0))
}

pub fn now() -> Timestamp {
    Timestamp::from_system(SystemTime::now())
}

/// A number of the C library's, which is narrower on 32-bit machines.
pub fn wide(n: impl Into<u64>) -> u64 {
    n.into()
}

/// The nearest time that this machine's C library can say: 32-bit ones end in 2038.
pub fn time_spec(seconds: i64, nanoseconds: u32) -> TimeSpec {
    let last = (isize::MAX as i64).min(i64::MAX / 1_000_000_000 - 1);
    TimeSpec::seconds(seconds.clamp(-last, last)) + TimeSpec::nanoseconds(nanoseconds.into())
}

/// Tells ext2 to ext4 that the directories in `dir` have nothing to do with each other (`chattr +T`), so that each gets
/// a block group of its own for its files. Otherwise all share one, and where the file system has no journal every new
/// file steps over each inode deleted there in the minutes before: milliseconds a pod, once hundreds have come and gone.
pub fn spread_directories(dir: &Path) -> io::Result<()> {
    /// `FS_TOPDIR_FL` of linux/fs.h.
    const TOP_OF_HIERARCHIES: libc::c_uint = 0x0002_0000;
    let dir = File::open(dir)?;
    let mut flags: libc::c_uint = 0;
    // SAFETY: both take a pointer to an int, whatever their numbers say; it is to a local.
    unsafe {
        if libc::ioctl(dir.as_raw_fd(), libc::FS_IOC_GETFLAGS, &mut flags) != 0 {
            return Err(io::Error::last_os_error());
        }
        flags |= TOP_OF_HIERARCHIES;
        match libc::ioctl(dir.as_raw_fd(), libc::FS_IOC_SETFLAGS, &flags) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// An alarm on CLOCK_BOOTTIME, readable once its time has come.
pub struct Alarm(TimerFd);

impl Alarm {
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Self(TimerFd::new(ClockId::CLOCK_BOOTTIME, flags)?))
    }

    /// Also silences an alarm that rings.
    pub fn set(&self, at: Option<BootMs>) -> io::Result<()> {
        let Some(at) = at else { return Ok(self.0.unset()?) };
        // Zero would switch it off; a time long past rings at once.
        let ms = at.0.max(1);
        let seconds = i64::try_from(ms / 1000).unwrap_or(i64::MAX);
        let time = time_spec(seconds, (ms % 1000) as u32 * 1_000_000);
        Ok(self.0.set(Expiration::OneShot(time), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?)
    }
}

impl AsFd for Alarm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A handle on a process, readable once it has ended.
/// Of a child between fork and exec: it ends when `parent` does, by SIGKILL, also where that has been already.
pub fn end_with(parent: Pid) -> io::Result<()> {
    // SAFETY: constants.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    if nix::unistd::getppid() == parent { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
}

pub fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; a new descriptor (always CLOEXEC) or -1 comes back.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Has the process of this handle not ended?
pub fn is_alive(pidfd: &OwnedFd) -> bool {
    poll(&mut [want(pidfd, libc::POLLIN)], Some(0)).is_ok_and(|ready| ready == 0)
}

/// One entry of a poll: the descriptor and what it is asked.
pub fn want(fd: &impl AsFd, events: i16) -> libc::pollfd {
    libc::pollfd { fd: fd.as_fd().as_raw_fd(), events, revents: 0 }
}

/// Waits for events, for ever or up to `timeout_ms`.
pub fn poll(fds: &mut [libc::pollfd], timeout_ms: Option<i32>) -> io::Result<usize> {
    loop {
        // SAFETY: the pointer and the length are the slice's.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_ms.unwrap_or(-1)) };
        match n {
            0.. => return Ok(n as usize),
            _ => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
    }
}

/// Writes a file so that it is there once this returns. After a crash before that it may hold less than `bytes`, or
/// nothing. One sync for name and content: ext4, XFS, btrfs and F2FS put a renamed file's new name on disk with it.
pub fn write_durably(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let tmp = dir.join(format!("{name}.tmp"));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&tmp)?;
    file.write_all(bytes)?;
    fs::rename(&tmp, dir.join(name))?;
    file.sync_all()
}

pub fn c_string(text: impl AsRef<OsStr>) -> io::Result<CString> {
    CString::new(text.as_ref().as_bytes())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the text holds a NUL byte"))
}

/// As dup2 with CLOEXEC.
pub fn dup_to(fd: RawFd, to: RawFd) -> io::Result<RawFd> {
    // SAFETY: no pointers.
    match unsafe { libc::dup3(fd, to, libc::O_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        fd => Ok(fd),
    }
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: no pointers; callers own no descriptor in the range any more.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

pub fn close_from(first: u32) -> io::Result<()> {
    close_range(first, u32::MAX)
}

pub fn close_below(end: u32) -> io::Result<()> {
    close_range(0, end - 1)
}

/// Opens `path` as if `root` were the file system's root, links and `..` included (openat2, Linux 5.6).
pub fn open_in_root(root: &impl AsFd, path: &Path, flags: i32) -> io::Result<OwnedFd> {
    open_how(root.as_fd().as_raw_fd(), path, flags, libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS)
}

/// Opens an absolute path on which there must be no symbolic link: ELOOP where one is.
pub fn open_without_links(path: &Path, flags: i32) -> io::Result<OwnedFd> {
    open_how(libc::AT_FDCWD, path, flags, libc::RESOLVE_NO_SYMLINKS)
}

/// Opens what lies below `dir`, without passing a symbolic link: ELOOP where one is.
pub fn open_beneath(dir: &impl AsFd, path: &Path, flags: i32) -> io::Result<OwnedFd> {
    let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS;
    open_how(dir.as_fd().as_raw_fd(), path, flags, resolve)
}

fn open_how(at: RawFd, path: &Path, flags: i32, resolve: u64) -> io::Result<OwnedFd> {
    let path = c_string(path)?;
    // SAFETY: plain integers; zero is valid for each.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.resolve = resolve;
    // SAFETY: both pointers outlive the call, and the size is that of `how`.
    let fd = unsafe { libc::syscall(libc::SYS_openat2, at, path.as_ptr(), &how, size_of_val(&how)) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// A mount of what lies at `path`, with what is mounted below, in no tree yet.
pub fn clone_mount(path: &Path) -> io::Result<OwnedFd> {
    let path = c_string(path)?;
    let flags =
        libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC as libc::c_uint | libc::AT_RECURSIVE as libc::c_uint;
    // SAFETY: a C string that outlives the call; a new descriptor or -1 comes back.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sets the attributes of a mount, and of those below (Linux 5.12).
pub fn set_mounts(mount: &OwnedFd, attr: &libc::mount_attr) -> io::Result<()> {
    let (fd, path, flags) = (mount.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH | libc::AT_RECURSIVE);
    // SAFETY: a constant and a valid pointer, with its size.
    let set = unsafe { libc::syscall(libc::SYS_mount_setattr, fd, path, flags, attr, size_of_val(attr)) };
    if set != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Puts a mount that is in no tree at `path`.
pub fn attach_mount(mount: &OwnedFd, path: &Path) -> io::Result<()> {
    let path = c_string(path)?;
    let (fd, flags) = (mount.as_raw_fd(), libc::MOVE_MOUNT_F_EMPTY_PATH);
    // SAFETY: C strings that outlive the call.
    let moved = unsafe {
        libc::syscall(libc::SYS_move_mount, fd, c"".as_ptr(), libc::AT_FDCWD, path.as_ptr(), flags)
    };
    if moved != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes a byte of a file for this process alone, until it closes the file or ends; `false` where another has it.
pub fn lock_byte(file: &File, at: i64) -> bool {
    // SAFETY: plain integers; zero is valid for each.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    (lock.l_start, lock.l_len) = (at as libc::off_t, 1);
    // SAFETY: the pointer is to a local.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &lock) == 0 }
}

/// What `act` does with files is done as user and group `id`, whom nothing is forbidden. Of one thread.
pub fn acting_as<T>(id: u32, act: impl FnOnce() -> T) -> T {
    let become_owner = |id: u32| {
        // SAFETY: no pointers.
        unsafe {
            libc::setfsgid(id);
            libc::setfsuid(id);
        }
    };
    become_owner(id);
    // A change from 0 takes the rights over files; those that may be had are taken again. One back to 0 gives them.
    let _ = raise_capabilities();
    let done = act();
    become_owner(0);
    // A change of user lets others look into it again, where the machine dumps such programs.
    let _ = keep_memory_private();
    done
}

/// linux/capability.h: sets of 64 bits, in two halves of three words.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

const CAPABILITIES_OF_THIS: CapabilityHeader = CapabilityHeader { version: 0x2008_0522, pid: 0 };

/// Makes all capabilities that are permitted effective.
fn raise_capabilities() -> io::Result<()> {
    // Of each half the effective, the permitted and the inheritable ones.
    let mut words = [0_u32; 6];
    // SAFETY: pointers to a constant and a local of the sizes that this version has.
    if unsafe { libc::syscall(libc::SYS_capget, &CAPABILITIES_OF_THIS, words.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    (words[0], words[3]) = (words[1], words[4]);
    // SAFETY: as above.
    match unsafe { libc::syscall(libc::SYS_capset, &CAPABILITIES_OF_THIS, words.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Keeps what this process has in memory from core dumps and from other processes of its user, until it becomes another
/// program: keys are in there, or what leads out of a pod. Children inherit it until their exec.
pub fn keep_memory_private() -> io::Result<()> {
    // SAFETY: constants.
    match unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives up every capability of this process's one thread but those of `bits`, for good: it could not get one back by an exec.
pub fn keep_capabilities(bits: u64) -> io::Result<()> {
    let (low, high) = (bits as u32, (bits >> 32) as u32);
    // Of each half the effective, the permitted and the inheritable ones.
    let kept = [low, low, 0, high, high, 0];
    // SAFETY: constants, then two pointers to locals of the sizes that this version has.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::syscall(libc::SYS_capset, &CAPABILITIES_OF_THIS, kept.as_ptr()) != 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Whoever started the shim may have closed 0, 1 or 2: what is opened next must not take their place.
pub fn open_standard_streams() -> io::Result<()> {
    loop {
        let fd = File::options().read(true).write(true).open("/dev/null")?;
        if fd.as_raw_fd() > 2 {
            return Ok(());
        }
        std::mem::forget(fd);
    }
}

/// Whatever the standard input was, it gives nothing more.
pub fn close_input() -> io::Result<()> {
    let nothing = File::open("/dev/null")?;
    Ok(nix::unistd::dup2_stdin(&nothing)?)
}

/// What deep calls have left below the stack's end is given back this far down.
const STACK_TRIM_BYTES: usize = 1 << 20;
/// Between the end of this function's frame and what is given back.
const STACK_KEPT_BYTES: usize = 16 << 10;

/// Gives memory that is no longer used back to the kernel: freed heap, and stack below the caller's.
#[inline(never)]
pub fn trim_memory() {
    let here = 0_u8;
    let end = (std::ptr::from_ref(&here) as usize).saturating_sub(STACK_KEPT_BYTES) & !0xffff;
    let start = end.saturating_sub(STACK_TRIM_BYTES);
    // SAFETY: the pages lie below every live frame; what of the range is not mapped the kernel passes over.
    unsafe {
        libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED);
    }
    #[cfg(target_env = "gnu")]
    // SAFETY: no pointers.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets go of the program's code and constants, and its libraries': what is needed of them again comes back from the
/// page cache, page by page. Most of it served only the start.
pub fn release_code() {
    // SAFETY: the callback keeps nothing of what it is given.
    unsafe { libc::dl_iterate_phdr(Some(release_object), std::ptr::null_mut()) };
}

/// # Safety
/// `object` is valid, as `dl_iterate_phdr` gives it.
unsafe extern "C" fn release_object(
    object: *mut libc::dl_phdr_info,
    _: libc::size_t,
    _: *mut libc::c_void,
) -> libc::c_int {
    #[cfg(target_pointer_width = "64")]
    type Header = libc::Elf64_Phdr;
    #[cfg(target_pointer_width = "32")]
    type Header = libc::Elf32_Phdr;
    const PAGE: usize = 4096;
    // SAFETY: `object` is valid, and so are the headers that it points to.
    let (base, headers) = unsafe {
        let object = &*object;
        (object.dlpi_addr as usize, std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()))
    };
    // What nothing may write is as the file has it. Relocated tables lie in segments that are writable at first.
    let constant = |header: &&Header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0;
    for header in headers.iter().filter(constant) {
        let begin = base + header.p_vaddr as usize;
        let (start, end) = (begin.next_multiple_of(PAGE), (begin + header.p_memsz as usize) & !(PAGE - 1));
        if start < end {
            // SAFETY: a private mapping of a file, never written: its pages come back with the same content.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
        }
    }
    0
}

#[cfg(test)]
mod tests {
    #[test]
    fn code_that_was_released_still_runs() {
        super::release_code();
        assert_eq!(super::c_string("still here").unwrap().as_bytes(), b"still here");
    }
}
