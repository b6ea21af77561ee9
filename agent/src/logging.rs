//! Lines on stderr: plain under systemd, which stamps them itself; with time and colour on a terminal.

use std::io::IsTerminal;

pub fn init() {
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let level = match std::env::var("BERTH_LOG").as_deref() {
        Ok("debug") => tracing::Level::DEBUG,
        Ok("warn") => tracing::Level::WARN,
        Ok("error") => tracing::Level::ERROR,
        _ => tracing::Level::INFO,
    };
    let lines = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_max_level(level)
        .with_target(false);
    if journal {
        lines.without_time().init();
    } else {
        lines.init();
    }
}
