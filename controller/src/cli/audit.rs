//! `audit`: who has asked the controller for what, and what came of it.

use std::io::Write as _;

use anyhow::Context as _;
use berth_protocol::message::query::{AuditRow, Outcome, Page, Query};
use serde_json::Value;

use super::command::{Audit, Format};
use super::config::Settings;
use super::connect::Session;
use super::print_value;
use super::table::{Cell, Table, Tone};

pub async fn audit(settings: &Settings, args: Audit) -> anyhow::Result<u8> {
    let namespace = settings.namespace_given.then(|| settings.namespace.clone());
    let mut session = Session::open(settings, Vec::new()).await?;
    let (mut rows, mut after) = (Vec::new(), None);
    while rows.len() < args.last {
        let query = Query::Audit { namespace: namespace.clone(), after: after.clone() };
        let page: Page<Value> = serde_json::from_value(session.query(query).await?)
            .context("the controller's reply is not a page")?;
        rows.extend(page.rows);
        if page.next.is_none() || page.next == after {
            break;
        }
        after = page.next;
    }
    session.close().await;
    rows.truncate(args.last);
    rows.reverse();
    if !matches!(settings.format, Format::Table | Format::Wide | Format::Name) {
        print_value(settings.format, &Value::Array(rows))?;
        return Ok(0);
    }
    let mut table = Table::new(vec!["AT", "WHO", "FROM", "WHAT", "ON", "OUTCOME"]);
    for row in rows {
        let row: AuditRow = serde_json::from_value(row)
            .context("the controller's reply cannot be read: is it of another version?")?;
        table.push(cells(row));
    }
    write!(std::io::stdout(), "{}", table.render(true, false, &mut Vec::new()))?;
    Ok(0)
}

fn cells(row: AuditRow) -> Vec<Cell> {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let outcome = match (row.outcome, row.why) {
        (Outcome::Accepted, _) => Cell::toned("accepted", Tone::Good),
        (Outcome::Refused, None) => Cell::toned("refused", Tone::Bad),
        (Outcome::Refused, Some(why)) => {
            // One line, whatever was said.
            let why: String = why.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            Cell::toned(format!("refused: {why}"), Tone::Bad)
        }
    };
    let who = row.who.map(|who| who.trim_start_matches("user:").to_owned());
    vec![
        row.at.to_string().into(),
        or_dash(who).into(),
        or_dash(row.from.map(|from| from.to_string())).into(),
        row.what.into(),
        row.on.into(),
        outcome,
    ]
}
