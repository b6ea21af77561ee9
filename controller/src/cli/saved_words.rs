//! The flags of the verbs about saved work and about nodes. Nothing here acts.

use std::path::PathBuf;
use std::time::Duration;

use berth_protocol::ids::{JobName, NodeId};
use clap::{Args, Subcommand};

use super::command::duration;

#[derive(Debug, Args)]
pub struct NodeNames {
    #[arg(required = true, value_name = "NODE")]
    pub nodes: Vec<NodeId>,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Checkpoint {
    #[command(subcommand)]
    pub verb: Option<CheckpointVerb>,
    #[command(flatten)]
    pub take: Take,
}

#[derive(Debug, Subcommand)]
pub enum CheckpointVerb {
    /// Write a checkpoint to a file, in the layout of podman's, which checkpointctl shows
    #[command(after_help = "Examples:
  berth checkpoint export 3f2a91c04d5e digits.tar
  berth checkpoint export 3f2a91c04d5e - | zstd > digits.tar.zst
  checkpointctl show digits.tar

The first container of the pod lies where such archives have theirs; what else
there is of the pod is below berth/.")]
    Export(Export),
    /// Bring an exported checkpoint into the depot
    #[command(after_help = "Examples:
  berth checkpoint import digits.tar
  berth restore 3f2a91c04d5e --name digits

An archive of berth's own, of this namespace. It is kept for seven days, and
longer as long as a job goes on from it. A checkpoint is as powerful as root on
the node that starts it: import what you trust.")]
    Import(Import),
}

#[derive(Debug, Args)]
pub struct Export {
    /// The checkpoint, by its first digits
    #[arg(value_name = "CHECKPOINT")]
    pub checkpoint: String,
    /// Where to write it; `-`: standard output
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Import {
    /// The archive; `-`: standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Take {
    /// The job to save
    #[arg(required = true)]
    pub job: Option<JobName>,
    /// Do not wait for it
    #[arg(long)]
    pub no_wait: bool,
    /// Give up waiting after this long
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "10m")]
    pub timeout: Duration,
}

#[derive(Debug, Args)]
pub struct Restore {
    /// The checkpoint, by its first digits
    #[arg(value_name = "CHECKPOINT")]
    pub checkpoint: String,
    /// The new job's name [default: set back the job it is of]
    #[arg(long, value_name = "JOB")]
    pub name: Option<JobName>,
    /// Where to go on
    #[arg(long, value_name = "NODE")]
    pub node: Option<NodeId>,
}

#[derive(Debug, Args)]
pub struct Fork {
    /// The job to copy
    pub job: JobName,
    /// How many copies; here `-n NUMBER` says the same
    #[arg(long = "copies", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub copies: u32,
    /// From this checkpoint [default: one that is taken now]
    #[arg(long, value_name = "CHECKPOINT")]
    pub checkpoint: Option<String>,
    /// Give up waiting for the checkpoint after this long
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "10m")]
    pub timeout: Duration,
}

#[derive(Debug, Args)]
pub struct Migrate {
    /// The job to move
    pub job: JobName,
    /// Where to
    #[arg(long, value_name = "NODE")]
    pub to: NodeId,
}

#[derive(Debug, Args)]
pub struct Drain {
    /// The node to empty
    pub node: NodeId,
    /// Stop what could not be saved after this long
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub deadline: Option<Duration>,
    /// Do not wait until it is empty
    #[arg(long)]
    pub no_wait: bool,
}

#[derive(Debug, Args)]
pub struct Defrag {
    /// Only tell what would be moved
    #[arg(long)]
    pub dry_run: bool,
    /// Move at most this many pods
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub moves: u8,
}

/// `berth fork JOB -n 4` is about copies, though `-n` names the namespace everywhere else: where a number follows it.
pub fn copies_for_fork(mut args: Vec<std::ffi::OsString>) -> Vec<std::ffi::OsString> {
    let verb = args.iter().position(|arg| arg == "fork");
    let number = |arg: &std::ffi::OsString| arg.to_str().is_some_and(|text| text.parse::<u32>().is_ok());
    if let Some(verb) = verb
        && let Some(at) =
            (verb + 1..args.len()).find(|at| args[*at] == "-n" && args.get(at + 1).is_some_and(number))
    {
        args[at] = "--copies".into();
    }
    args
}
