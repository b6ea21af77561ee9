//! The flags of the verbs that make jobs. Nothing here acts.

use std::path::PathBuf;

use berth_protocol::ids::JobName;
use clap::Args;

#[derive(Debug, Args)]
pub struct Submit {
    /// Job files, YAML or JSON; `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Wait for the jobs' ends; the exit code is that of the first that failed
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
pub struct Run {
    /// The job's name [default: made up]
    #[arg(long, value_name = "NAME")]
    pub name: Option<JobName>,
    /// The image, or `host`: the node's own file system
    #[arg(long, default_value = "host")]
    pub image: String,
    /// Cores, such as 2, 0.5 or 500m: reserved, and the most that it gets [default: 100m]
    #[arg(long)]
    pub cpu: Option<String>,
    /// Memory, such as 500Mi or 4Gi: reserved; beyond it the program is killed [default: 128Mi]
    #[arg(long)]
    pub memory: Option<String>,
    /// Devices, such as 1, or a share of one, such as 0.25
    #[arg(long)]
    pub gpu: Option<String>,
    /// An environment variable; without a value: the one set here
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// A directory of the node's, or a named volume
    #[arg(short, long = "volume", value_name = "SOURCE:MOUNT[:ro]")]
    pub volumes: Vec<String>,
    /// A path to keep in the depot when the job ends, for `berth cp`
    #[arg(long = "output", value_name = "PATH")]
    pub outputs: Vec<String>,
    /// The pod's network
    #[arg(long, value_parser = ["bridge", "host", "none"], value_name = "bridge|host|none")]
    pub network: Option<String>,
    /// Where the command runs [default: this directory, or the image's own]
    #[arg(long, value_name = "PATH")]
    pub workdir: Option<String>,
    /// Which nodes may run it: a CEL expression over `node`
    #[arg(long, value_name = "CEL")]
    pub affinity: Option<String>,
    /// From -1000 to 1000
    #[arg(long, allow_hyphen_values = true)]
    pub priority: Option<i32>,
    /// Start again after a failure, this many times
    #[arg(long, value_name = "N")]
    pub retries: Option<u32>,
    /// Print the job's name and leave it to itself
    #[arg(short, long)]
    pub detach: bool,
    /// Take this directory along in any case
    #[arg(long, conflicts_with = "no_workspace")]
    pub workspace: bool,
    /// Never take this directory along
    #[arg(long)]
    pub no_workspace: bool,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "CMD")]
    pub command: Vec<String>,
}
