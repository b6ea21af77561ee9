//! `berth-agent`: the node daemon, and its hidden subcommands `shim` and `image`, chosen before any thread exists.

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

use berth_agent::config::{Args, Config};
use berth_agent::{cuda, io, logging, run, shim};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    // The node's key, words that open the depot, what leads out of a pod: whatever this process is to be. A kernel that
    // knows no such thing dumps nothing either.
    let _ = shim::sys::keep_memory_private();
    let mut args = std::env::args_os().skip(1);
    let first = args.next();
    match (first.as_deref().and_then(OsStr::to_str), args.next()) {
        (Some("shim"), Some(dir)) => return shim::main(Path::new(&dir)),
        (Some(cuda::SUBCOMMAND), what) => return cuda::main(what.is_some_and(|what| what == cuda::CHECK)),
        (Some("join"), _) => return io::join::main(),
        (Some("image"), _) => return io::image::worker_main(),
        (Some("checkpoint"), _) => return io::checkpoint::worker_main(),
        (Some("pack"), Some(dir)) => return io::outputs::pack_main(Path::new(&dir)),
        (Some("unpack"), Some(archive)) => {
            let dir = args.next().unwrap_or_default();
            return io::unpack::main(Path::new(&archive), Path::new(&dir));
        }
        _ => {}
    }
    // The one subcommand for people takes the daemon's flags behind it.
    let doctor = first.as_deref() == Some(OsStr::new("doctor"));
    let args = Args::parse_from(
        std::env::args_os().enumerate().filter(|(n, _)| !doctor || *n != 1).map(|(_, arg)| arg),
    );
    let config = match Config::from_args(args) {
        config if doctor => return io::doctor::main(config),
        Ok(config) => config,
        Err(error) => {
            eprintln!("berth-agent: {error:#}");
            return ExitCode::from(2);
        }
    };
    logging::init();
    match serve(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// For what would hold up the agent's one thread: files, and processes that do not want to end.
const BLOCKING_THREADS: usize = 4;

fn serve(config: Config) -> anyhow::Result<()> {
    // Freed memory goes back at once: an agent is idle nearly always.
    nix_mallopt();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()?;
    runtime.block_on(async {
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        let shutdown = async move {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
        };
        Ok(run::run(config, shutdown).await?)
    })
}

fn nix_mallopt() {
    // SAFETY: sets allocator parameters before other threads exist.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 * 1024);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 * 1024);
    }
}
