//! The words of the command line: verbs, flags, help. Nothing here acts.

use std::path::PathBuf;
use std::time::Duration;

use berth_protocol::broker::BrokerUrl;
use berth_protocol::ids::{ClusterName, ContainerName, JobName, Namespace, NodeId, PodName};
use berth_protocol::units::Millis;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Deserialize;

pub use super::job_words::{Run, Submit};
pub use super::member_words::{
    Approve, InviteNode, InviteUser, KeysVerb, NodeVerb, Rotate, SecretVerb, SetUser, UserVerb,
};
pub use super::saved_words::{
    Checkpoint, CheckpointVerb, Defrag, Drain, Fork, Migrate, NodeNames, Restore, Take, copies_for_fork,
};
use super::simulate::command::Simulate;

#[derive(Debug, Parser)]
#[command(
    name = "berth",
    version,
    about = "Run containers on unlike machines, and keep their work",
    propagate_version = false,
    disable_help_subcommand = true,
    after_help = "Examples:
  berth run -- python3 train.py        run a program, see its output, end with its exit code
  berth submit digits.yaml --wait      submit a job file and wait for its end
  berth get jobs -w                    watch the jobs of the namespace
  berth logs -f digits                 follow a job's output from its first line

The configuration file, ~/.config/berth/config.toml, may hold broker, cluster,
namespace, format and request-timeout."
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// Each is taken from the command line, else from the environment, else from the configuration file.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// The MQTT broker [default: mqtt://127.0.0.1:1883]
    #[arg(long, global = true, env = "BERTH_BROKER", hide_env_values = true, value_name = "URL")]
    pub broker: Option<BrokerUrl>,
    /// The fleet, where several share a broker [default: default]
    #[arg(long, global = true, env = "BERTH_CLUSTER", hide_env_values = true, value_name = "NAME")]
    pub cluster: Option<ClusterName>,
    /// The namespace [default: default]
    #[arg(short, long, global = true, env = "BERTH_NAMESPACE", hide_env_values = true, value_name = "NAME")]
    pub namespace: Option<Namespace>,
    /// How to print [default: table]
    #[arg(
        short = 'o',
        long,
        global = true,
        env = "BERTH_FORMAT",
        hide_env_values = true,
        value_name = "FORMAT"
    )]
    pub format: Option<Format>,
    /// How long to try to reach the broker, and the controller behind it [default: 30s]
    #[arg(long, global = true, env = "BERTH_REQUEST_TIMEOUT", hide_env_values = true, value_name = "DURATION", value_parser = duration)]
    pub request_timeout: Option<Duration>,
    /// Where your key and certificate are, as `berth login` left them [default: ~/.config/berth/identity, for root else
    /// /etc/berth/admin]
    #[arg(long, global = true, env = "BERTH_IDENTITY", hide_env_values = true, value_name = "DIR")]
    pub identity: Option<PathBuf>,
    /// The configuration file [default: ~/.config/berth/config.toml]
    #[arg(long, global = true, env = "BERTH_CONFIG", hide_env_values = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Columns for people
    Table,
    /// More columns
    Wide,
    /// Exactly what the controller says
    Json,
    /// The same as YAML
    Yaml,
    /// Names alone
    Name,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Submit job files
    #[command(after_help = "Examples:
  berth submit digits.yaml
  berth submit --wait train.yaml       end with the job's exit code
  generate-job | berth submit -

A job without a name is named after its file. The same file again changes
nothing; a changed one is a new generation of the job.")]
    Submit(Submit),
    /// Run a command as a job, with its output here, and end with its exit code
    #[command(after_help = "Examples:
  berth run --cpu 2 --memory 4Gi -- ./simulate --steps 1000
  berth run --gpu 1 --cpu 4 --memory 16Gi -- python3 train.py
  berth run --image docker.io/library/alpine:3 -- uname -a
  berth run --detach --name nightly --output results -- make results

Without --image the command runs on a copy-on-write view of the node's own file
system, in this directory. Where the job may land on another machine the
directory goes along, without what .berthignore names (the syntax of
.gitignore), at most 100 MiB. Ctrl-C cancels the job; again leaves it.

Exit codes: the command's own, 128 + signal, 130 cancelled, 125 where berth
itself failed.")]
    Run(Box<Run>),
    /// List jobs, pods, nodes, checkpoints or outputs
    #[command(after_help = "Examples:
  berth get jobs
  berth get nodes -o wide -l zone=lab
  berth get pods digits -w
  berth get jobs -A -o json")]
    Get(Get),
    /// Tell everything about a job, a pod, a node or a checkpoint
    #[command(after_help = "Examples:
  berth describe job digits
  berth describe pod digits-0
  berth describe node n1 -o json")]
    Describe(Describe),
    /// Show a job's output
    #[command(after_help = "Examples:
  berth logs digits
  berth logs -f digits                 from the first line, until the job ends
  berth logs digits/digits-3 --stream stderr

The text comes in order across restarts and moves; lines carry the pod's name
where the job has several. Times are those of writing, or of arrival while the
pod runs.")]
    Logs(Logs),
    /// Wait for a job to end, and end with its exit code
    #[command(after_help = "Examples:
  berth wait digits
  berth wait digits --timeout 10m || echo failed

Exit codes: the job's own (of several pods the first that failed), 128 + signal,
124 at the timeout, 130 cancelled, 125 where berth itself failed.")]
    Wait(Wait),
    /// Copy a job's outputs to a directory
    #[command(after_help = "Examples:
  berth cp digits ./results                     everything
  berth cp digits:/srv/app/model .              one path
  berth cp digits/digits-1:/srv/app/model .     of one pod")]
    Cp(Cp),
    /// Cancel jobs: their pods are stopped with their grace
    #[command(visible_alias = "delete", after_help = "Examples:\n  berth cancel digits")]
    Cancel(JobNames),
    /// Stop a job's pods until it is resumed
    #[command(after_help = "Examples:\n  berth suspend digits")]
    Suspend(JobNames),
    /// Let suspended jobs go on
    #[command(after_help = "Examples:\n  berth resume digits")]
    Resume(JobNames),
    /// Run jobs anew
    #[command(after_help = "Examples:\n  berth restart digits")]
    Restart(JobNames),
    /// Save a running job; it runs on
    #[command(after_help = "Examples:
  berth checkpoint digits
  berth checkpoint digits -o name      the checkpoint's digits alone
  berth checkpoint export 3f2a91c04d5e digits.tar
  berth checkpoint import digits.tar

Waits until the depot has it, and says how large it is and for how long the
program stood still. `berth get checkpoints` lists what is kept.")]
    Checkpoint(Checkpoint),
    /// Let a job go on from a checkpoint, under its own name or another
    #[command(after_help = "Examples:
  berth restore 3f2a91c04d5e                     set the job back to this checkpoint
  berth restore 3f2a91c04d5e --name second       a job of its own
  berth restore 3f2a91c04d5e --name second --node n2

The first digits will do where they name only one. What the job did outside
after the checkpoint happens again; a node's directories and named volumes are
not set back, but for named volumes with `save: true`. A checkpoint is of one
pod: of a job with several that pod is set back, and --name makes a job of one.")]
    Restore(Restore),
    /// Make several jobs of a running one, each going on from where it is
    #[command(after_help = "Examples:
  berth fork digits -n 4               digits-fork-1 to digits-fork-4
  berth fork digits -n 2 --checkpoint 3f2a91c04d5e

A checkpoint is of one pod: of a job with several too, each copy is a job of one.")]
    Fork(Fork),
    /// Move a running job to another node, with all its work
    #[command(after_help = "Examples:
  berth migrate digits --to n2

Refused before anything is stopped where the job could not go on there; `berth
explain` says what each node lacks. Ends once the move is accepted: `berth get
pods digits -w` shows it.")]
    Migrate(Migrate),
    /// Save every pod of a node and let it go on elsewhere
    #[command(after_help = "Examples:
  berth drain n1
  berth drain n1 --deadline 10m        what cannot be saved by then is stopped

What has no room elsewhere is saved, waits, and goes on when room comes. The
node takes no new pods until `berth uncordon`.")]
    Drain(Drain),
    /// Let nodes take no new pods; what runs there stays
    #[command(after_help = "Examples:\n  berth cordon n1 n2")]
    Cordon(NodeNames),
    /// Let nodes take pods again; ends a drain
    #[command(after_help = "Examples:\n  berth uncordon n1")]
    Uncordon(NodeNames),
    /// Let machines into the cluster, and take them out of it
    #[command(after_help = "Examples:
  berth node token                     a line to run on a new machine, good once
  berth node token gpu-7               for that node alone: also to come back after weeks away
  berth node token --approve           and the machine waits until it is approved
  berth node tokens                    who waits, with which key
  berth node approve gpu-8
  berth node remove gpu-7")]
    Node {
        #[command(subcommand)]
        verb: NodeVerb,
    },
    /// Let people into the cluster, and take them out of it
    #[command(after_help = "Examples:
  berth user token alice               a line for her to run, good once
  berth user token bob --admin         one who may let others in
  berth user token carol --role team-a=submit --role team-b=view
  berth user set carol team-a=admin team-b=none
  berth user list")]
    User {
        #[command(subcommand)]
        verb: UserVerb,
    },
    /// Replace the key by which nodes know the controller's orders
    #[command(after_help = "Examples:
  berth keys show
  berth keys rotate --root /media/stick/root.key

For an admin, on whichever machine has the root's file: the file's content stays
there. The controller draws the new key and signs with it at once; nothing is
restarted, no pod is touched. Once a year, and whenever a machine that had the
old key, or a backup of the store, may have been read by others.")]
    Keys {
        #[command(subcommand)]
        verb: KeysVerb,
    },
    /// Keep what jobs may mount and nobody may read: keys, passwords
    #[command(after_help = "Examples:
  berth secret set wandb key.txt
  pass wandb | berth secret set wandb
  berth secret list -n team-a
  berth secret remove wandb

A job of the namespace mounts it as a file, in memory: `secrets: [{name: wandb,
mount: /run/secrets/wandb}]`. It goes from here to the controller and from there
to the job's node over TLS, and is in no job file, environment or log.")]
    Secret {
        #[command(subcommand)]
        verb: SecretVerb,
    },
    /// Show who has asked the controller for what, and what came of it
    #[command(after_help = "Examples:
  berth audit                          the last fifty entries
  berth audit --last 1000 -o json
  berth audit -n team-a                what was asked of one namespace's jobs

Whole it is for admins; a namespace's is for that namespace's admins too. Entries
are kept for 90 days.")]
    Audit(Audit),
    /// Show a token that an admin made, and belong to the cluster
    #[command(after_help = "Examples:
  berth login b1c0ffee…@ctl.example.org:7420
  berth login - <token                 from stdin: arguments are seen by all users

The key is made here and stays here; the certificate is renewed by any later
command, in its last ten days.")]
    Login {
        /// What `berth user token` printed; `-` reads it from stdin
        token: String,
    },
    /// Move running pods, with all their work, so that the fleet is packed better
    #[command(after_help = "Examples:
  berth defrag --dry-run               who would go where, and what it gains
  berth defrag                         have them moved
  berth defrag --moves 20 -o json

Moves first for a waiting job that would then fit; where there is none, so that
fewer free GPUs are left in pieces that nobody can use. Ends once the moves are
ordered: `berth get pods -w` shows them.")]
    Defrag(Defrag),
    /// Tell for each node why a job's pods are there, or why they do not fit
    #[command(after_help = "Examples:\n  berth explain digits")]
    Explain(JobArg),
    /// Try the scheduler on fleets and pods from files, without running anything
    #[command(after_help = "Examples:
  berth simulate --nodes nodes.csv --pods pods.csv
  berth simulate --nodes live --pods pods.csv --seed 1..3 --plot fill.svg
  berth simulate --nodes nodes.csv --pods pods.csv --churn 0.96 --moves 8 -o json

Percentages are means over the arrivals at which 100 or 130 % of the fleet's
GPUs (of its cores, where it has none) were asked for. With -o json: an object a
line, one for each seed, and the means last.")]
    Simulate(Simulate),
    /// Print the JSON Schema of the job file
    #[command(after_help = "Examples:\n  berth schema > job.schema.json")]
    Schema,
    /// Print the versions of this program and of the controller
    #[command(after_help = "Examples:\n  berth version --client")]
    Version(Version),
    /// Print a completion script for a shell
    #[command(after_help = "Examples:
  berth completion bash > /etc/bash_completion.d/berth
  berth completion zsh > \"${fpath[1]}/_berth\"")]
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual's pages into a directory
    #[command(hide = true)]
    Man {
        /// The directory, made where it is missing
        dir: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct Get {
    /// What to list
    pub kind: Kind,
    /// One of them; for pods also a job, for checkpoints and outputs the job
    pub name: Option<String>,
    /// All namespaces
    #[arg(short = 'A', long)]
    pub all_namespaces: bool,
    /// Stay, and print what changes
    #[arg(short, long)]
    pub watch: bool,
    /// Nodes with these labels, such as zone=lab,gpu!=none,ssd
    #[arg(short = 'l', long, value_name = "LABELS")]
    pub selector: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    #[value(alias = "job")]
    Jobs,
    #[value(alias = "pod")]
    Pods,
    #[value(alias = "node")]
    Nodes,
    #[value(alias = "checkpoint")]
    Checkpoints,
    #[value(alias = "output")]
    Outputs,
}

#[derive(Debug, Args)]
pub struct Describe {
    #[command(subcommand)]
    pub what: Described,
}

#[derive(Debug, Subcommand)]
#[command(disable_help_subcommand = true)]
pub enum Described {
    /// A job, its pods and its file
    Job { name: JobName },
    /// A pod
    Pod { name: PodName },
    /// A node
    Node { name: NodeId },
    /// A checkpoint, by its first digits, and what a node must have to go on from it
    Checkpoint {
        #[arg(value_name = "DIGITS")]
        name: String,
    },
}

#[derive(Debug, Args)]
pub struct Logs {
    /// The job, or one of its pods
    #[arg(value_name = "JOB[/POD]")]
    pub target: LogTarget,
    /// Stay until the job ends
    #[arg(short, long)]
    pub follow: bool,
    /// Begin each line with its time
    #[arg(long)]
    pub timestamps: bool,
    /// One of the two alone
    #[arg(long, value_parser = ["stdout", "stderr"], value_name = "stdout|stderr")]
    pub stream: Option<String>,
    /// One container of the pods alone
    #[arg(short, long, value_name = "NAME")]
    pub container: Option<ContainerName>,
}

/// `JOB` or `JOB/POD`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogTarget {
    pub job: JobName,
    pub pod: Option<PodName>,
}

impl std::str::FromStr for LogTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((job, pod)) = text.split_once('/') else {
            return Ok(Self { job: JobName::parse(text).map_err(|e| e.to_string())?, pod: None });
        };
        let job = JobName::parse(job).map_err(|e| e.to_string())?;
        let pod = match pod.parse::<u32>() {
            Ok(index) => job.pod(index),
            Err(_) => PodName::parse(pod).map_err(|e| e.to_string())?,
        };
        if pod.job != job {
            return Err(format!("pod `{pod}` is not one of job `{job}`"));
        }
        Ok(Self { job, pod: Some(pod) })
    }
}

#[derive(Debug, Args)]
pub struct Wait {
    /// The job to wait for
    pub job: JobName,
    /// Give up after this long, with exit code 124
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub timeout: Option<Duration>,
}

#[derive(Debug, Args)]
pub struct Cp {
    /// Whose outputs, and which path of them
    #[arg(value_name = "JOB[/POD][:PATH]")]
    pub source: CpSource,
    /// Where to
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
}

/// `JOB[/POD][:PATH]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpSource {
    pub target: LogTarget,
    /// Without a leading slash; none: everything.
    pub path: Option<PathBuf>,
}

impl std::str::FromStr for CpSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (target, path) = text.split_once(':').unwrap_or((text, ""));
        let path = path.trim_matches('/');
        if path.split('/').any(|part| part == "..") {
            return Err(format!("`{path}` leads out of the job's outputs"));
        }
        Ok(Self { target: target.parse()?, path: (!path.is_empty()).then(|| path.into()) })
    }
}

#[derive(Debug, Args)]
pub struct JobNames {
    #[arg(required = true, value_name = "JOB")]
    pub jobs: Vec<JobName>,
}

#[derive(Debug, Args)]
pub struct JobArg {
    pub job: JobName,
}

#[derive(Debug, Args)]
pub struct Audit {
    /// So many entries, the latest
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub last: usize,
}

#[derive(Debug, Args)]
pub struct Version {
    /// Do not ask the controller
    #[arg(long)]
    pub client: bool,
}

pub fn duration(text: &str) -> Result<Duration, String> {
    Millis::parse(text).map(Millis::duration).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_visible_verb_has_examples() {
        for verb in Cli::command().get_subcommands().filter(|verb| !verb.is_hide_set()) {
            let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.starts_with("Examples:"), "{}", verb.get_name());
            assert!(verb.get_about().is_some(), "{}", verb.get_name());
        }
    }

    #[test]
    fn the_number_of_copies_is_no_namespace() {
        for (line, copies, namespace) in [
            ("berth fork digits -n 4", 4, None),
            ("berth -n lab fork digits -n 4", 4, Some("lab")),
            ("berth fork digits --copies 2 -n lab", 2, Some("lab")),
            ("berth fork digits", 1, None),
        ] {
            let args = line.split(' ').map(Into::into).collect();
            let cli = Cli::try_parse_from(copies_for_fork(args)).unwrap();
            let Verb::Fork(fork) = cli.verb else { panic!("{line}") };
            assert_eq!(fork.copies, copies, "{line}");
            assert_eq!(cli.global.namespace.as_ref().map(Namespace::as_str), namespace, "{line}");
        }
        let other = ["berth", "-n", "4", "get", "jobs"].map(Into::into).to_vec();
        assert_eq!(copies_for_fork(other.clone()), other);
    }

    #[test]
    fn targets() {
        let parse =
            |text: &str| text.parse::<LogTarget>().map(|t| (t.job.to_string(), t.pod.map(|p| p.to_string())));
        assert_eq!(parse("digits"), Ok(("digits".into(), None)));
        assert_eq!(parse("digits/digits-3"), Ok(("digits".into(), Some("digits-3".into()))));
        assert_eq!(parse("digits/3"), Ok(("digits".into(), Some("digits-3".into()))));
        assert!(parse("digits/other-3").is_err());
        let path = |text: &str| text.parse::<CpSource>().map(|s| s.path.map(|p| p.display().to_string()));
        assert_eq!(path("digits"), Ok(None));
        assert_eq!(path("digits:/srv/model/"), Ok(Some("srv/model".into())));
        assert!(path("digits:/srv/../../etc").is_err());
    }
}
