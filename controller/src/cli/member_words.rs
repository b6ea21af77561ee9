//! The flags of the verbs about who belongs to the cluster. Nothing here acts.

use std::time::Duration;

use berth_protocol::ids::{NodeId, UserName};
use berth_protocol::join::InvitationId;
use clap::{Args, Subcommand};

use super::command::duration;

#[derive(Debug, Subcommand)]
pub enum NodeVerb {
    /// Make a token, good once: the line that a new machine runs
    Token(InviteNode),
    /// List the tokens that are still good, for nodes and users
    Tokens,
    /// Take a token back
    Revoke { id: InvitationId },
    /// Take a machine out of the cluster: nothing that it says is heard any more
    Remove { node: NodeId },
}

#[derive(Debug, Args)]
pub struct InviteNode {
    /// For this node alone, also where it belongs already: then the machine takes its place
    pub node: Option<NodeId>,
    /// How long it is good [default: 15m, at most 24h]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub life: Option<Duration>,
}

#[derive(Debug, Subcommand)]
pub enum UserVerb {
    /// Make a token, good once: the line that the user runs
    Token(InviteUser),
    /// List users
    List,
    /// Take a user out of the cluster; jobs go on
    Remove { user: UserName },
}

#[derive(Debug, Args)]
pub struct InviteUser {
    pub user: UserName,
    /// One who may let others in, and take them out
    #[arg(long)]
    pub admin: bool,
    /// How long it is good [default: 15m, at most 24h]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub life: Option<Duration>,
}
