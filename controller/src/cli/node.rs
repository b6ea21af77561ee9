//! Verbs about nodes: `drain`, `cordon`, `uncordon`, `node lost`.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use berth_protocol::ids::NodeId;
use berth_protocol::message::query::Query;
use berth_protocol::message::user::NodeStatus;
use berth_protocol::units::Millis;
use serde_json::Value;

use super::command::{Drain, Format, NodeNames};
use super::config::Settings;
use super::connect::Session;
use super::print_value;

/// How often a node that is being emptied is looked at.
const LOOK: Duration = Duration::from_millis(500);

fn node(value: &Value) -> anyhow::Result<NodeStatus> {
    serde_json::from_value(value.clone())
        .context("the controller's reply cannot be read: is it of another version?")
}

fn print(settings: &Settings, value: &Value, said: &str) -> anyhow::Result<()> {
    let name = node(value)?.node;
    match settings.format {
        Format::Table | Format::Wide => writeln!(std::io::stdout(), "node {name} {said}")?,
        Format::Name => writeln!(std::io::stdout(), "{name}")?,
        format => print_value(format, value)?,
    }
    Ok(())
}

pub async fn cordon(settings: &Settings, args: NodeNames, cordoned: bool) -> anyhow::Result<u8> {
    let mut session = Session::open(settings, Vec::new()).await?;
    for node in args.nodes {
        let (query, said) = match cordoned {
            true => (Query::Cordon { node }, "takes no new pods"),
            false => (Query::Uncordon { node }, "takes pods again"),
        };
        let value = session.query(query).await?;
        print(settings, &value, said)?;
    }
    session.close().await;
    Ok(0)
}

pub async fn lost(settings: &Settings, node: NodeId, powered_off: bool) -> anyhow::Result<u8> {
    let mut session = Session::open(settings, Vec::new()).await?;
    let value = session.query(Query::NodeLost { node, powered_off }).await?;
    let said = match powered_off {
        true => "is lost, and nothing runs there: its pods go elsewhere once their leases are over",
        false => {
            "is lost: its pods go elsewhere once their leases are over, but for those that are to `continue`; where it is off, \
             say --powered-off"
        }
    };
    print(settings, &value, said)?;
    session.close().await;
    Ok(0)
}

pub async fn drain(settings: &Settings, args: Drain) -> anyhow::Result<u8> {
    let mut session = Session::open(settings, Vec::new()).await?;
    let within = |deadline: Duration| Millis(u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX));
    let query = Query::Drain { node: args.node.clone(), deadline: args.deadline.map(within) };
    let mut value = session.query(query).await?;
    if !args.no_wait {
        value = until_empty(&mut session, &args.node, value).await?;
    }
    session.close().await;
    let left = node(&value)?.pods;
    let said = match left {
        0 => "is drained: nothing of it is left, and it takes no new pods until `berth uncordon`".to_owned(),
        left => format!("is being drained: {left} pods are still there"),
    };
    print(settings, &value, &said)?;
    Ok(0)
}

async fn until_empty(session: &mut Session, id: &NodeId, mut value: Value) -> anyhow::Result<Value> {
    let terminal = std::io::stderr().is_terminal();
    let mut shown = None;
    loop {
        let left = node(&value)?.pods;
        if left == 0 {
            return Ok(value);
        }
        if terminal && shown != Some(left) {
            eprintln!("{left} pods are still on {id}");
            shown = Some(left);
        }
        tokio::time::sleep(LOOK).await;
        value = session.query(Query::Node { node: id.clone() }).await?;
        // Someone took the drain back.
        anyhow::ensure!(
            node(&value)?.drain.is_some(),
            "node {id} was uncordoned: it is not drained any more"
        );
    }
}
