//! Starts the controller: configuration, logging, signals. Everything else is in the library.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use berth_controller::admin::Admin;
use berth_controller::config::{Admission, Config, Flags};
use berth_controller::run::{Daemon, RunError};
use berth_protocol::chain::chain;
use clap::Parser as _;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::LevelFilter;

/// Threads for files of the depot: they wait for the disk, and end when idle.
const FILE_THREADS_MAX: usize = 4;

fn main() -> ExitCode {
    berth_controller::io::memory::keep_private();
    one_arena();
    raise_file_limit();
    let mut flags = Flags::parse();
    log_to_stderr();
    if let Some(admin) = flags.admin.take() {
        return administer(admin);
    }
    let config = match Config::resolve(flags) {
        Ok(config) => config,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            return ExitCode::from(2);
        }
    };
    match serve(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Its findings are for stdout, as those of any command.
fn administer(admin: Admin) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(admin.run()) {
        Ok((told, sound)) => {
            println!("{told}");
            if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            tracing::error!("{}", chain(&error));
            ExitCode::from(2)
        }
    }
}

fn serve(config: Config) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(FILE_THREADS_MAX)
        .build()?;
    runtime.block_on(async {
        if matches!(config.admission, Admission::Dev(_)) {
            tracing::warn!("--dev: everybody who reaches the broker may submit jobs; for one person's machine and for tests only");
        }
        if config.hides_depot() {
            tracing::warn!(
                "other machines are let in, but told to reach the depot at {}, which is each one's own: name an address \
                 of this machine's with --listen-http, or say how they reach it with --depot-url",
                config.listen_http
            );
        }
        if config.keeps_depot_to_itself() {
            tracing::warn!(
                "the records are in etcd, for several controllers, but the depot is a directory of this machine's: logs and \
                 checkpoints are lost to another that takes over. Name a bucket with --depot"
            );
        }
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let mut stop = std::pin::pin!(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            tracing::info!("stopping");
        });
        let daemon = tokio::select! {
            biased;
            () = &mut stop => return Ok(()),
            daemon = Daemon::start(config) => daemon?,
        };
        daemon.run(stop).await
    })
}

/// One arena of malloc's for the few threads: each further one costs memory and buys nothing here.
fn one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: called before any other thread exists; it only sets a number.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// A connection is a file, and the usual limit of 1024 is less than a cluster's agents.
fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls only read and write `limit`. Where they fail, the limit stays what it was.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// One line an event. Under systemd the journal knows the time. `BERTH_LOG` is a level: error, warn, info, debug.
fn log_to_stderr() {
    let level = std::env::var("BERTH_LOG").ok().and_then(|level| level.parse().ok());
    let builder = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_max_level(level.unwrap_or(LevelFilter::INFO))
        .with_target(false);
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        builder.without_time().init();
    } else {
        builder.init();
    }
}
