//! The command-line client.

fn main() -> ! {
    berth_controller::cli::main()
}
