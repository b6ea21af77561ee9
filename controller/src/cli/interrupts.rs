//! Ctrl-C and SIGTERM while a job is in the foreground.

use berth_protocol::message::user::JobCommand;
use tokio::signal::unix::Signal;
use tokio::time::Instant;

/// What Ctrl-C does while a job is in the foreground.
pub struct Interrupts {
    pub int: Signal,
    pub term: Signal,
    /// Came once: the job is being cancelled by this command, to be sent again then.
    pub cancel: Option<(JobCommand, Instant)>,
    pub answered: bool,
}

/// Until one comes; without them never.
pub async fn interrupted(interrupts: &mut Option<Interrupts>) {
    match interrupts {
        Some(Interrupts { int, term, .. }) => tokio::select! {
            _ = int.recv() => {}
            _ = term.recv() => {}
        },
        None => std::future::pending().await,
    }
}
