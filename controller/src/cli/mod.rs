//! The command-line client `berth`: speaks MQTT with the controller and HTTP with its depot, and nothing else.
//!
//! It knows the protocol and none of the daemon's parts, but for the scheduler that it simulates. Everything that decides (exit codes, the order of log
//! records, tables, archives' contents) is apart from what talks, so that it can be tested without a broker.

mod act;
mod archive;
mod audit;
mod checkpoint;
mod command;
mod config;
mod connect;
mod cp;
mod defrag;
mod depot;
mod describe;
mod exit;
mod follow;
mod get;
#[cfg(test)]
mod golden;
mod https;
pub(crate) mod identity;
mod interrupts;
mod job_words;
mod jobfile;
mod keys;
mod logs;
mod member;
mod member_words;
mod node;
mod order;
mod render;
pub(crate) mod root;
mod run;
mod saved_words;
mod secret;
mod shell;
mod simulate;
mod submit;
mod table;
mod wait;
mod workspace;

use std::io::Write as _;

use clap::Parser as _;
use serde_json::Value;

use command::{CheckpointVerb, Cli, Format, Verb};
use config::Settings;

/// The caller's mistake: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(String);

impl Usage {
    fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

/// The whole program; ends the process.
pub fn main() -> ! {
    crate::io::memory::keep_private();
    let cli = Cli::parse_from(command::copies_for_fork(std::env::args_os().collect()));
    let code = match dispatch(cli) {
        Ok(code) => code,
        Err(error) => report(&error),
    };
    let _ = std::io::stdout().flush();
    // Not by returning: nothing that still runs in the background is worth waiting for.
    std::process::exit(i32::from(code))
}

fn dispatch(cli: Cli) -> anyhow::Result<u8> {
    match cli.verb {
        Verb::Completion { shell } => return shell::completion(shell),
        Verb::Man { dir } => return shell::man(&dir),
        Verb::Schema => return jobfile::print_schema(),
        _ => {}
    }
    let mut settings = Settings::load(&cli.global)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        member::renew(&mut settings).await;
        match cli.verb {
            Verb::Login { token } => member::login(&settings, &token).await,
            Verb::Node { verb } => member::node(&settings, verb).await,
            Verb::User { verb } => member::user(&settings, verb).await,
            Verb::Keys { verb } => keys::keys(&settings, verb).await,
            Verb::Secret { verb } => secret::secret(&settings, verb).await,
            Verb::Audit(args) => audit::audit(&settings, args).await,
            Verb::Submit(args) => submit::submit(&settings, args).await,
            Verb::Run(args) => run::run(&settings, *args).await,
            Verb::Get(args) => get::get(&settings, args).await,
            Verb::Describe(args) => describe::describe(&settings, args).await,
            Verb::Logs(args) => logs::logs(&settings, args).await,
            Verb::Wait(args) => wait::wait(&settings, args).await,
            Verb::Cp(args) => cp::cp(&settings, args).await,
            Verb::Cancel(args) => act::command(&settings, act::CANCEL, args).await,
            Verb::Suspend(args) => act::command(&settings, act::SUSPEND, args).await,
            Verb::Resume(args) => act::command(&settings, act::RESUME, args).await,
            Verb::Restart(args) => act::command(&settings, act::RESTART, args).await,
            Verb::Checkpoint(args) => match args.verb {
                Some(CheckpointVerb::Export(args)) => archive::export(&settings, args).await,
                Some(CheckpointVerb::Import(args)) => archive::import(&settings, args).await,
                None => checkpoint::checkpoint(&settings, args.take).await,
            },
            Verb::Restore(args) => checkpoint::restore(&settings, args).await,
            Verb::Fork(args) => checkpoint::fork(&settings, args).await,
            Verb::Migrate(args) => checkpoint::migrate(&settings, args).await,
            Verb::Defrag(args) => defrag::defrag(&settings, args).await,
            Verb::Drain(args) => node::drain(&settings, args).await,
            Verb::Cordon(args) => node::cordon(&settings, args, true).await,
            Verb::Uncordon(args) => node::cordon(&settings, args, false).await,
            Verb::Explain(args) => act::explain(&settings, args).await,
            Verb::Simulate(args) => simulate::simulate(&settings, args).await,
            Verb::Version(args) => act::version(&settings, args).await,
            Verb::Schema | Verb::Completion { .. } | Verb::Man { .. } => Ok(0),
        }
    })
}

/// Prints the chain of causes once and says what to end with.
fn report(error: &anyhow::Error) -> u8 {
    let io = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    if io.map(std::io::Error::kind).any(|kind| kind == std::io::ErrorKind::BrokenPipe) {
        return exit::BROKEN_PIPE;
    }
    eprintln!("berth: {error:#}");
    let usage = error.chain().any(|cause| cause.is::<Usage>());
    if usage { exit::USAGE } else { exit::BERTH }
}

/// Prints `value` as JSON or YAML.
fn print_value(format: Format, value: &Value) -> anyhow::Result<()> {
    let text = match format {
        Format::Yaml => serde_yaml_ng::to_string(value)?,
        _ => serde_json::to_string_pretty(value)? + "\n",
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}
