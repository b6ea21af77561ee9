//! Time of this thread on a processor: what other programs do beside a simulation does not count.

pub struct Stopwatch(f64);

impl Stopwatch {
    pub fn start() -> Self {
        Self(thread_seconds())
    }

    pub fn seconds(&self) -> f64 {
        thread_seconds() - self.0
    }
}

fn thread_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock writes into `time`, which outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
