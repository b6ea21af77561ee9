use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    match &args[..] {
        [_, shim, dir] if shim == "shim" => berth_agent::shim::main(Path::new(dir)),
        _ => ExitCode::from(2),
    }
}
