//! What a heartbeat's probe costs: the agent has 0.1 % of a core, 10 ms in each 10 s, and 4 MiB.

use berth_agent::io::probe::{Probe, ProbeConfig};
use nix::time::{ClockId, clock_gettime};

const SAMPLES: u32 = 1_000;
const SAMPLE_US_MAX: i64 = 3_000;
const HEAP_BYTES_MAX: usize = 256 << 10;

fn cpu_us() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    now.tv_sec() * 1_000_000 + now.tv_nsec() / 1_000
}

#[cfg(target_env = "gnu")]
fn heap_bytes() -> usize {
    // SAFETY: reads the allocator's own counters.
    unsafe { libc::mallinfo2() }.uordblks
}

#[cfg(not(target_env = "gnu"))]
fn heap_bytes() -> usize {
    0
}

#[tokio::test(flavor = "current_thread")]
async fn a_sample_is_cheap_and_keeps_nothing() {
    let data = tempfile::tempdir().unwrap();
    let config = ProbeConfig { data_dir: data.path().into(), ..ProbeConfig::default() };
    let (heap, cpu) = (heap_bytes(), cpu_us());
    let mut probe = Probe::new(config).await;
    let first = (heap_bytes().saturating_sub(heap), cpu_us() - cpu);
    for _ in 0..10 {
        probe.sample().await;
    }
    let (heap, cpu) = (heap_bytes(), cpu_us());
    for _ in 0..SAMPLES {
        probe.sample().await;
    }
    let each = (cpu_us() - cpu) / i64::from(SAMPLES);
    let grown = heap_bytes().saturating_sub(heap);
    println!(
        "first look: {} µs, {} bytes of heap; then {each} µs each, {grown} bytes more",
        first.1, first.0
    );
    assert!(each <= SAMPLE_US_MAX, "{each} µs a sample");
    assert!(first.0 <= HEAP_BYTES_MAX && grown <= 4096, "{first:?}, {grown} bytes in {SAMPLES} samples");
}
