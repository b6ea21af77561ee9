//! The controller's own memory, between two changes: a small fleet's is idle nearly always, and is to be small then.

use std::fs;

/// Gives freed heap back to the kernel, and the code that only the start needed: what is wanted of it again comes back
/// from the page cache, page by page.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no pointers.
    unsafe {
        libc::malloc_trim(0);
    }
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for (start, end) in maps.lines().filter_map(code) {
        // SAFETY: a file's code, mapped so that nobody can write to it: its pages come back with the same content.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
}

/// Keeps what this process has in memory from core dumps and from other processes of its user: keys are in there.
pub fn keep_private() {
    // SAFETY: constants. A kernel that knows no such thing dumps nothing either.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
}

/// Where the code of a file is mapped, where this line of `/proc/self/maps` is about one.
fn code(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_ascii_whitespace();
    let (range, permissions, path) = (words.next()?, words.next()?, words.nth(3)?);
    let (start, end) = range.split_once('-')?;
    let is_code = permissions == "r-xp" && path.starts_with('/');
    is_code.then_some(())?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_alone_is_let_go_and_runs_on() {
        let line = "55d0c0a00000-55d0c1000000 r-xp 00200000 fe:00 1234   /usr/bin/berth-controller";
        assert_eq!(code(line), Some((0x55d0_c0a0_0000, 0x55d0_c100_0000)));
        for other in [
            "55d0c0a00000-55d0c1000000 r--p 00200000 fe:00 1234   /usr/bin/berth-controller",
            "55d0c0a00000-55d0c1000000 rw-p 00000000 00:00 0",
            "7ffd1a9f0000-7ffd1a9f2000 r-xp 00000000 00:00 0      [vdso]",
        ] {
            assert_eq!(code(other), None, "{other}");
        }
        give_back();
        assert!(fs::read_to_string("/proc/self/maps").unwrap().lines().any(|line| code(line).is_some()));
    }
}
