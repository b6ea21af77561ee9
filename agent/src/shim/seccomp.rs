//! The system calls that a container may make: Docker's default profile, as a table and the filter made of it.
//!
//! libseccomp knows the calls' numbers; the filter itself is made here, since libseccomp takes milliseconds to do so
//! and this takes microseconds: each number's action is found by bisection over ranges.

use std::collections::BTreeSet;
use std::io;

use libc::sock_filter;
use libseccomp::{ScmpArch, ScmpSyscall};

/// Allowed whatever the capabilities are.
const ALLOW: &str = "\
    accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32 \
    clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 \
    clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 \
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old \
    eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate \
    fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr \
    flistxattr flock fork fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate \
    ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake futimesat getcpu getcwd \
    getdents getdents64 getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer \
    getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresgid32 getresuid \
    getresuid32 getrlimit get_robust_list getrusage getsid getsockname getsockopt get_thread_area gettid \
    gettimeofday getuid getuid32 getxattr inotify_add_watch inotify_init inotify_init1 inotify_rm_watch \
    io_cancel ioctl io_destroy io_getevents io_pgetevents io_pgetevents_time64 ioprio_get ioprio_set io_setup \
    io_submit ipc kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lchown32 \
    lgetxattr link linkat listen listxattr llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64 \
    madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock \
    mlock2 mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 \
    mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock \
    munlockall munmap name_to_handle_at nanosleep newfstatat _newselect open openat openat2 pause pidfd_open \
    pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 \
    preadv preadv2 prlimit64 process_mrelease process_vm_readv process_vm_writev pselect6 pselect6_time64 \
    ptrace pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recv recvfrom recvmmsg \
    recvmmsg_time64 recvmsg remap_file_pages removexattr rename renameat renameat2 restart_syscall rmdir rseq \
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait \
    rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_getparam \
    sched_get_priority_max sched_get_priority_min sched_getscheduler sched_rr_get_interval \
    sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield \
    seccomp select semctl semget semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg \
    sendto setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid \
    setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit \
    set_robust_list setsid setsockopt set_thread_area set_tid_address setuid setuid32 setxattr shmat shmctl \
    shmdt shmget shutdown sigaltstack signalfd signalfd4 sigprocmask sigreturn socketcall socketpair splice \
    stat stat64 statfs statfs64 statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time \
    timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 \
    timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate \
    truncate64 ugetrlimit umask uname unlink unlinkat utime utimensat utimensat_time64 utimes vfork vmsplice \
    wait4 waitid waitpid write writev arch_prctl modify_ldt arm_fadvise64_64 arm_sync_file_range \
    sync_file_range2 breakpoint cacheflush set_tls";

/// Allowed to who has the capability.
const BY_CAPABILITY: [(&str, &str); 14] = [
    ("DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr \
         move_mount open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount \
         umount2 unshare",
    ),
    ("SYS_BOOT", "reboot"),
    ("SYS_CHROOT", "chroot"),
    ("SYS_MODULE", "delete_module init_module finit_module"),
    ("SYS_PACCT", "acct"),
    ("SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    ("SYS_RAWIO", "iopl ioperm"),
    ("SYS_TIME", "settimeofday stime clock_settime clock_settime64"),
    ("SYS_TTY_CONFIG", "vhangup"),
    ("SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("SYSLOG", "syslog"),
    ("BPF", "bpf"),
    ("PERFMON", "perf_event_open"),
];

/// Namespaces that `clone` may not make without SYS_ADMIN: all but CLONE_NEWTIME, whose bit is part of the signal.
const CLONE_NAMESPACES: u32 = 0x7e02_0000;
const AF_VSOCK: u32 = 40;
/// Linux, Linux32, the two with UNAME26, and the question.
const PERSONALITIES: [u32; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Between an architecture's newest call and the block of numbers of the next one.
const GAP_MIN: u32 = 1 << 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Allow,
    Errno(i32),
    /// Allowed unless it makes namespaces.
    Clone,
    Socket,
    Personality,
}

/// The architectures whose programs this machine runs, each with the kernel's number for it.
#[cfg(target_arch = "x86_64")]
const ARCHS: [(ScmpArch, u32); 2] = [(ScmpArch::X8664, 0xc000_003e), (ScmpArch::X86, 0x4000_0003)];
#[cfg(target_arch = "aarch64")]
const ARCHS: [(ScmpArch, u32); 2] = [(ScmpArch::Aarch64, 0xc000_00b7), (ScmpArch::Arm, 0x4000_0028)];
#[cfg(target_arch = "arm")]
const ARCHS: [(ScmpArch, u32); 1] = [(ScmpArch::Arm, 0x4000_0028)];
#[cfg(target_arch = "riscv64")]
const ARCHS: [(ScmpArch, u32); 1] = [(ScmpArch::Riscv64, 0xc000_00f3)];

/// What 32-bit x86 has as calls of their own beside `socketcall` and `ipc`; libseccomp knows them as these only.
const X86_DIRECT: [(&str, u32); 2] = [
    (
        "socket socketpair bind connect listen accept4 getsockopt setsockopt getsockname getpeername sendto sendmsg \
         recvfrom recvmsg shutdown",
        359,
    ),
    ("semget semctl shmget shmctl shmat shmdt msgget msgsnd msgrcv msgctl", 393),
];

fn number(name: &str, arch: ScmpArch) -> Option<u32> {
    let number = ScmpSyscall::from_name_by_arch(name, arch).ok()?.as_raw_syscall();
    if let (true, -999..0) = (arch == ScmpArch::X86, number) {
        return X86_DIRECT.iter().find_map(|(names, first)| {
            names.split_whitespace().zip(*first..).find_map(|(n, number)| (n == name).then_some(number))
        });
    }
    // Negative: unknown to this architecture.
    u32::try_from(number).ok()
}

/// The filter for a process with these capabilities (named without `CAP_`).
pub fn filter(capabilities: &BTreeSet<String>) -> Vec<sock_filter> {
    let mut program = vec![load(OFFSET_ARCH)];
    for (arch, number) in ARCHS {
        let part = bisect(&steps(arch, capabilities));
        program.extend([jump(BPF_JEQ, number, 1, 0), skip(part.len() + 1), load(OFFSET_NUMBER)]);
        program.extend(part);
    }
    program.push(ret(libc::SECCOMP_RET_KILL_PROCESS));
    program
}

/// The filter for a process of this machine's own architecture that needs these calls alone.
pub fn only(calls: &[libc::c_long]) -> Vec<sock_filter> {
    let mut program = vec![load(OFFSET_ARCH), jump(BPF_JEQ, ARCHS[0].1, 1, 0)];
    program.extend([errno(libc::EPERM), load(OFFSET_NUMBER)]);
    for call in calls {
        // Numbers of calls are small and positive.
        program.extend([jump(BPF_JEQ, *call as u32, 0, 1), ret(libc::SECCOMP_RET_ALLOW)]);
    }
    program.push(errno(libc::EPERM));
    program
}

/// The filter for a process of this machine's own architecture that needs none of these calls, and no sockets of this family.
pub fn without(calls: &[libc::c_long], family: u32) -> Vec<sock_filter> {
    let mut program = vec![load(OFFSET_ARCH), jump(BPF_JEQ, ARCHS[0].1, 1, 0)];
    program.extend([errno(libc::EPERM), load(OFFSET_NUMBER)]);
    // The same calls by x32's numbers.
    program.extend([jump(BPF_JGE, X32, 0, 1), errno(libc::EPERM)]);
    for call in calls {
        program.extend([jump(BPF_JEQ, *call as u32, 0, 1), errno(libc::EPERM)]);
    }
    program.extend([jump(BPF_JEQ, libc::SYS_socket as u32, 0, 3), load(OFFSET_ARG0)]);
    program.extend([jump(BPF_JEQ, family, 0, 1), errno(libc::EPERM), ret(libc::SECCOMP_RET_ALLOW)]);
    program
}

/// Puts the calling process under `program`; it must have no_new_privs.
pub fn install(program: &[sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    // The kernel only reads it.
    let prog = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: `prog` and what it points to outlive the call.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &prog) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The action from each number on, until the next; ascending, the first at 0.
fn steps(arch: ScmpArch, capabilities: &BTreeSet<String>) -> Vec<(u32, Action)> {
    let mut known = Vec::with_capacity(1024);
    let mut add = |arch| {
        let mut put = |names: &str, action| {
            known.extend(names.split_whitespace().filter_map(|name| Some((number(name, arch)?, action))));
        };
        put("clone3", Action::Errno(libc::ENOSYS));
        put("clone", Action::Clone);
        put("socket", Action::Socket);
        put("personality", Action::Personality);
        put(ALLOW, Action::Allow);
        for (_, names) in BY_CAPABILITY.iter().filter(|(name, _)| capabilities.contains(*name)) {
            put(names, Action::Allow);
        }
    };
    add(arch);
    if arch == ScmpArch::X8664 {
        // The same number of architecture, and a bit in the call's.
        add(ScmpArch::X32);
    }
    // Where a capability allows what has a rule of its own, the later word counts.
    known.sort_by_key(|(number, _)| *number);
    let denied = Action::Errno(libc::EPERM);
    let mut steps = vec![(0, denied)];
    for (i, (number, action)) in known.iter().enumerate() {
        if known.get(i + 1).is_some_and(|(next, _)| next == number) {
            continue;
        }
        push(&mut steps, *number, *action);
        // Newer than this table: programs try such calls and fall back where the kernel lacks them.
        let newest = known.get(i + 1).is_none_or(|(next, _)| next - number > GAP_MIN);
        push(&mut steps, number + 1, if newest { Action::Errno(libc::ENOSYS) } else { denied });
    }
    steps
}

fn push(steps: &mut Vec<(u32, Action)>, from: u32, action: Action) {
    steps.pop_if(|(last, _)| *last == from);
    if steps.last().is_none_or(|(_, last)| *last != action) {
        steps.push((from, action));
    }
}

/// Calls of x32 have this bit; on other architectures no call has so high a number.
const X32: u32 = 0x4000_0000;
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;
/// The lower half of the first argument; all machines that berth runs on are little-endian.
const OFFSET_ARG0: u32 = 16;
const BPF_JEQ: u16 = 0x10;
const BPF_JGE: u16 = 0x30;
const BPF_JSET: u16 = 0x40;

fn load(offset: u32) -> sock_filter {
    sock_filter { code: 0x20, jt: 0, jf: 0, k: offset }
}

fn jump(test: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: 0x05 | test, jt, jf, k }
}

fn skip(instructions: usize) -> sock_filter {
    // A filter has at most 4096.
    sock_filter { code: 0x05, jt: 0, jf: 0, k: instructions as u32 }
}

fn ret(value: u32) -> sock_filter {
    sock_filter { code: 0x06, jt: 0, jf: 0, k: value }
}

fn errno(value: i32) -> sock_filter {
    ret(libc::SECCOMP_RET_ERRNO | value as u32)
}

/// With the call's number in the accumulator: finds its step and does what that says.
fn bisect(steps: &[(u32, Action)]) -> Vec<sock_filter> {
    if let [(_, action)] = steps {
        return act(*action);
    }
    let (lower, upper) = steps.split_at(steps.len() / 2);
    let (from, lower, upper) = (upper[0].0, bisect(lower), bisect(upper));
    let mut code = match u8::try_from(lower.len()) {
        Ok(over) => vec![jump(BPF_JGE, from, over, 0)],
        Err(_) => vec![jump(BPF_JGE, from, 0, 1), skip(lower.len())],
    };
    code.extend(lower);
    code.extend(upper);
    code
}

fn act(action: Action) -> Vec<sock_filter> {
    let allow = ret(libc::SECCOMP_RET_ALLOW);
    match action {
        Action::Allow => vec![allow],
        Action::Errno(value) => vec![errno(value)],
        Action::Clone => {
            vec![load(OFFSET_ARG0), jump(BPF_JSET, CLONE_NAMESPACES, 0, 1), errno(libc::EPERM), allow]
        }
        Action::Socket => vec![load(OFFSET_ARG0), jump(BPF_JEQ, AF_VSOCK, 0, 1), errno(libc::EPERM), allow],
        Action::Personality => {
            let mut code = vec![load(OFFSET_ARG0)];
            for (i, value) in PERSONALITIES.iter().enumerate() {
                code.push(jump(BPF_JEQ, *value, (PERSONALITIES.len() - i) as u8, 0));
            }
            code.extend([errno(libc::EPERM), allow]);
            code
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter as the kernel would.
    fn run(program: &[sock_filter], arch: u32, number: u32, arg0: u32) -> u32 {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let i = program[at];
            at += 1;
            match i.code {
                0x20 => accumulator = [number, arch, 0, 0, arg0][i.k as usize / 4],
                0x06 => return i.k,
                0x05 => at += i.k as usize,
                code => {
                    let test = match code & 0xf0 {
                        BPF_JEQ => accumulator == i.k,
                        BPF_JGE => accumulator >= i.k,
                        BPF_JSET => accumulator & i.k != 0,
                        other => panic!("{other}"),
                    };
                    at += usize::from(if test { i.jt } else { i.jf });
                }
            }
        }
    }

    const ALLOWED: u32 = libc::SECCOMP_RET_ALLOW;
    const DENIED: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    const UNKNOWN: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

    #[test]
    fn what_is_left_out_is_left_out_by_every_number() {
        let program = without(&[libc::SYS_execve], libc::AF_UNIX as u32);
        let (own, execve, socket) = (ARCHS[0].1, libc::SYS_execve as u32, libc::SYS_socket as u32);
        for (arch, number, arg0, expect) in [
            (own, execve, 0, DENIED),
            (own, execve | X32, 0, DENIED),
            (own ^ 1, libc::SYS_read as u32, 0, DENIED),
            (own, libc::SYS_read as u32, 0, ALLOWED),
            (own, socket, libc::AF_UNIX as u32, DENIED),
            (own, socket, libc::AF_INET as u32, ALLOWED),
        ] {
            assert_eq!(run(&program, arch, number, arg0), expect, "{arch:x} {number:x} {arg0}");
        }
    }

    #[test]
    fn every_call_gets_the_tables_action() {
        let none = BTreeSet::new();
        let program = filter(&none);
        assert!(program.len() < 4096);
        for (arch, audit) in ARCHS {
            let steps = steps(arch, &none);
            for number in 0..600 {
                let step = steps.iter().rposition(|(from, _)| *from <= number).unwrap();
                let expect = match steps[step].1 {
                    Action::Allow => ALLOWED,
                    Action::Errno(e) => libc::SECCOMP_RET_ERRNO | e as u32,
                    _ => continue,
                };
                assert_eq!(run(&program, audit, number, 0), expect, "{arch:?} {number}");
            }
            let number = |name| number(name, arch).unwrap();
            for (name, arg0, expect) in [
                ("read", 0, ALLOWED),
                ("openat", 0, ALLOWED),
                ("mount", 0, DENIED),
                ("setns", 0, DENIED),
                ("keyctl", 0, DENIED),
                ("clone3", 0, UNKNOWN),
                ("clone", 0x11, ALLOWED),
                ("clone", 0x1000_0000, DENIED),
                ("socket", 2, ALLOWED),
                ("socket", AF_VSOCK, DENIED),
                ("personality", 8, ALLOWED),
                ("personality", 0xffff_ffff, ALLOWED),
                ("personality", 0x4_0000, DENIED),
            ] {
                assert_eq!(run(&program, audit, number(name), arg0), expect, "{arch:?} {name} {arg0:#x}");
            }
            assert_eq!(run(&program, audit, 100_000, 0), UNKNOWN);
        }
        assert_eq!(run(&program, 0x1234, 0, 0), libc::SECCOMP_RET_KILL_PROCESS);
    }

    #[test]
    fn only_what_is_named_is_allowed() {
        let program = only(&[libc::SYS_read, libc::SYS_exit_group]);
        let own = ARCHS[0].1;
        for (call, expect) in [
            (libc::SYS_read, ALLOWED),
            (libc::SYS_exit_group, ALLOWED),
            (libc::SYS_write, DENIED),
            (libc::SYS_openat, DENIED),
        ] {
            assert_eq!(run(&program, own, call as u32, 0), expect, "{call}");
        }
        assert_eq!(run(&program, own ^ 1, libc::SYS_read as u32, 0), DENIED);
    }

    #[test]
    fn a_capability_opens_its_calls() {
        let program = filter(&BTreeSet::from(["SYS_ADMIN".to_owned()]));
        for (arch, audit) in ARCHS {
            for name in ["mount", "clone3", "unshare"] {
                let number = ScmpSyscall::from_name_by_arch(name, arch).unwrap().as_raw_syscall() as u32;
                assert_eq!(run(&program, audit, number, 0), ALLOWED, "{name}");
            }
            let clone = ScmpSyscall::from_name_by_arch("clone", arch).unwrap().as_raw_syscall() as u32;
            assert_eq!(run(&program, audit, clone, 0x1000_0000), ALLOWED);
        }
    }
}
