//! Gives back what an idle agent does not need: free heap, and pages of the program that a busy moment brought in.
//!
//! The kernel maps 64 KiB around every page of the program that runs, so that a start touches most of it. Dropped
//! pages of code and constants come back from the page cache, those few that a heartbeat needs.

use std::fs;

/// Pages of the program that are never written: its code, and the constants before it. What lies behind the code has
/// been relocated, and would come back as it is in the file.
fn unwritten(maps: &str, program: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    for line in maps.lines().filter(|line| line.ends_with(program)) {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(mode)) = (fields.next(), fields.next()) else { continue };
        if !matches!(mode, "r--p" | "r-xp") {
            break;
        }
        let hex = |text: &str| usize::from_str_radix(text, 16).ok();
        if let Some((Some(from), Some(to))) = range.split_once('-').map(|(from, to)| (hex(from), hex(to))) {
            found.push((from, to));
        }
        if mode == "r-xp" {
            break;
        }
    }
    found
}

/// Makes the process as small as it can be while it idles. Takes about a millisecond.
pub fn trim() {
    // SAFETY: returns free memory of this process's allocator to the kernel.
    unsafe { libc::malloc_trim(0) };
    let Ok(program) = fs::read_link("/proc/self/exe") else { return };
    let Ok(maps) = fs::read_to_string("/proc/self/maps") else { return };
    for (from, to) in unwritten(&maps, &program.to_string_lossy()) {
        // SAFETY: a private mapping of a file that nothing has written to: every page can be read again.
        unsafe { libc::madvise(from as *mut libc::c_void, to - from, libc::MADV_DONTNEED) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_never_written_is_dropped() {
        let maps = "\
55d0-55d4 r--p 00000000 fe:00 1 /usr/bin/berth-agent
55d4-55e0 r-xp 00004000 fe:00 1 /usr/bin/berth-agent
55e0-55e2 r--p 00010000 fe:00 1 /usr/bin/berth-agent
55e2-55e3 rw-p 00012000 fe:00 1 /usr/bin/berth-agent
7f00-7f10 r-xp 00000000 fe:00 2 /usr/lib/libc.so.6
";
        assert_eq!(unwritten(maps, "/usr/bin/berth-agent"), [(0x55d0, 0x55d4), (0x55d4, 0x55e0)]);
    }

    #[test]
    fn a_trimmed_process_goes_on() {
        trim();
        assert_eq!("still here".len(), 10);
    }
}
