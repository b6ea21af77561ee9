//! What a heartbeat's probe costs: the agent has 0.1 % of a core, 10 ms in each 10 s, and 4 MiB.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use berth_agent::io::probe::{Probe, ProbeConfig};
use nix::time::{ClockId, clock_gettime};

const SAMPLES: u32 = 1_000;
const SAMPLE_US_MAX: i64 = 3_000;
const HEAP_BYTES_MAX: usize = 64 << 10;

fn cpu_us() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    now.tv_sec() * 1_000_000 + now.tv_nsec() / 1_000
}

/// The system's allocator, counting what is held.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands every call on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size(), Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn heap_bytes() -> usize {
    HELD.load(Ordering::Relaxed)
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
