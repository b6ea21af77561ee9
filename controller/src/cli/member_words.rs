//! The flags of the verbs about who belongs to the cluster. Nothing here acts.

use std::path::PathBuf;
use std::time::Duration;

use berth_protocol::ids::{Namespace, NodeId, SecretName, UserName};
use berth_protocol::join::{InvitationId, Role, RoleError};
use berth_protocol::sign::Fingerprint;
use clap::{Args, Subcommand};

use super::command::duration;

#[derive(Debug, Subcommand)]
pub enum NodeVerb {
    /// Make a token, good once: the line that a new machine runs
    Token(InviteNode),
    /// List the tokens that are still good, for nodes and users, and the machines that wait to be approved
    Tokens,
    /// Let a machine in that waits: its agent shows the fingerprint of its key, and so does `tokens`
    Approve(Approve),
    /// Do not let it in; its token is good for nothing any more
    Deny { node: NodeId },
    /// Take a token back
    Revoke { id: InvitationId },
    /// Say that a silent machine will not be back soon: its pods go elsewhere as soon as their leases are over
    ///
    /// After a minute of silence that happens by itself, but where more than half of the nodes are silent at once. Pods that are
    /// to `continue` without a controller stay until the machine is seen without them, or said to be off. A machine that is
    /// heard again is taken back, and stops what has gone elsewhere.
    #[command(
        after_help = "Examples:\n  berth node lost n1\n  berth node lost n1 --powered-off    it has burnt, or its plug is pulled"
    )]
    Lost {
        node: NodeId,
        /// Nothing runs on it any more: pods that are to `continue` go elsewhere, too. If it is not so, they run twice
        #[arg(long)]
        powered_off: bool,
    },
    /// Take a machine out of the cluster: nothing that it says is heard any more
    Remove { node: NodeId },
}

#[derive(Debug, Subcommand)]
pub enum KeysVerb {
    /// Have the controller sign with another key, which the cluster's root names
    Rotate(Rotate),
    /// Show the root and the key in use
    Show,
}

#[derive(Debug, Args)]
pub struct Rotate {
    /// The root's file, as `berth-controller init` left it
    #[arg(long, value_name = "FILE")]
    pub root: PathBuf,
    /// How long the key is good [default: 365d]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub life: Option<Duration>,
}

#[derive(Debug, Subcommand)]
pub enum SecretVerb {
    /// Set a secret, at most 64 KiB: of a file, or of what is piped in, byte for byte
    Set {
        name: SecretName,
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// List a namespace's secrets; values are never shown
    List,
    /// Remove a secret; pods that have it keep it
    Remove { name: SecretName },
}

#[derive(Debug, Args)]
pub struct Approve {
    pub node: NodeId,
    /// Only if its key is this one, as its agent shows it
    #[arg(long, value_name = "DIGITS")]
    pub fingerprint: Option<Fingerprint>,
}

#[derive(Debug, Args)]
pub struct InviteNode {
    /// For this node alone, also where it belongs already: then the machine takes its place
    pub node: Option<NodeId>,
    /// The machine waits, for 24 hours, until an admin has compared its key and approved it
    #[arg(long)]
    pub approve: bool,
    /// How long it is good [default: 15m, at most 24h]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub life: Option<Duration>,
}

#[derive(Debug, Subcommand)]
pub enum UserVerb {
    /// Make a token, good once: the line that the user runs
    Token(InviteUser),
    /// Change what a user may do
    Set(SetUser),
    /// List users and what they may do; who is no admin sees what concerns them
    List,
    /// Take a user out of the cluster; jobs go on
    Remove { user: UserName },
}

#[derive(Debug, Args)]
pub struct SetUser {
    pub user: UserName,
    /// As `team-a=submit`; `team-a=none` takes the role there away
    #[arg(value_name = "NAMESPACE=ROLE", value_parser = role_or_none)]
    pub roles: Vec<(Namespace, Option<Role>)>,
    /// An admin of the cluster from now on
    #[arg(long, conflicts_with = "no_admin")]
    pub admin: bool,
    /// No admin of the cluster any more
    #[arg(long)]
    pub no_admin: bool,
}

fn role(text: &str) -> Result<(Namespace, Role), String> {
    match role_or_none(text)? {
        (namespace, Some(role)) => Ok((namespace, role)),
        (namespace, None) => Err(format!("leave {namespace} out where there is to be no role")),
    }
}

fn role_or_none(text: &str) -> Result<(Namespace, Option<Role>), String> {
    let (namespace, role) =
        text.split_once('=').ok_or_else(|| format!("write {text}=view, {text}=submit or {text}=admin"))?;
    let namespace = Namespace::parse(namespace).map_err(|error| error.to_string())?;
    match role {
        "none" => Ok((namespace, None)),
        role => {
            role.parse().map(|role| (namespace, Some(role))).map_err(|error: RoleError| error.to_string())
        }
    }
}

#[derive(Debug, Args)]
pub struct InviteUser {
    pub user: UserName,
    /// One who may let others in and take them out, directs nodes, and has every role everywhere
    #[arg(long)]
    pub admin: bool,
    /// What the user may do in a namespace: view, submit or admin, each with what stands before it; may be repeated
    /// [default: default=submit]
    #[arg(long = "role", value_name = "NAMESPACE=ROLE", value_parser = role)]
    pub roles: Vec<(Namespace, Role)>,
    /// How long it is good [default: 15m, at most 24h]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub life: Option<Duration>,
}
