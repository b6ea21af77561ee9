use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("image") => berth_agent::io::image::worker_main(),
        _ => ExitCode::from(2),
    }
}
