//! `keys …`: which key signs the controller's orders, and another one in its place.

use std::io::Write as _;

use anyhow::bail;
use berth_protocol::delegation::{Delegation, LIFE};
use berth_protocol::join::{DrawnKey, KeyStatus};
use hyper::Method;
use serde_json::{Value, json};

use super::command::{Format, KeysVerb, Rotate};
use super::config::Settings;
use super::connect::millis;
use super::member::ask;
use super::print_value;
use super::root::Root;

const PATH: &str = "/v1/key";

pub async fn keys(settings: &Settings, verb: KeysVerb) -> anyhow::Result<u8> {
    match verb {
        KeysVerb::Show => show(settings).await,
        KeysVerb::Rotate(args) => rotate(settings, args).await,
    }
}

async fn show(settings: &Settings) -> anyhow::Result<u8> {
    let status: KeyStatus = ask(settings, Method::GET, PATH, &json!({})).await?;
    let mut out = std::io::stdout();
    match settings.format {
        Format::Table | Format::Wide => {
            writeln!(out, "cluster  {}", status.cluster)?;
            match (status.root, status.delegation) {
                (Some(root), Some(Delegation { key, serial, issued, expires, .. })) => writeln!(
                    out,
                    "root     {root:?}\nkey      {key:?}\nserial   {serial}\nissued   {issued}\nexpires  {expires}"
                )?,
                _ => writeln!(
                    out,
                    "key      the one that its members were told as they joined: it was set up before there were roots"
                )?,
            }
        }
        Format::Name => {
            status.delegation.iter().try_for_each(|delegation| writeln!(out, "{:?}", delegation.key))?;
        }
        format => print_value(format, &serde_json::to_value(&status)?)?,
    }
    Ok(0)
}

/// The controller draws a key, the root names it here, and only that goes back: neither's secret half is seen by the other.
async fn rotate(settings: &Settings, args: Rotate) -> anyhow::Result<u8> {
    let root = Root::load(&args.root)?;
    let before: KeyStatus = ask(settings, Method::GET, PATH, &json!({})).await?;
    let own = root.key.public();
    if before.cluster != root.cluster || before.root.is_some_and(|known| known != own) {
        bail!(
            "{} is the root {} of the cluster {}; the one that the members of {} know is {}",
            args.root.display(),
            own.short(),
            root.cluster,
            before.cluster,
            before.root.map_or_else(|| "another".to_owned(), |known| known.short()),
        );
    }
    let DrawnKey { key } = ask(settings, Method::POST, PATH, &json!({})).await?;
    let after = before.delegation.map(|delegation| delegation.serial);
    let life = args.life.map_or(LIFE, millis);
    let now = crate::io::clock::now().wall;
    let delegation = Delegation::new(&root.key, &root.cluster, key, after, now, life);
    let _: Value = ask(settings, Method::PUT, PATH, &delegation).await?;
    match settings.format {
        Format::Table | Format::Wide => writeln!(
            std::io::stdout(),
            "the controller signs with key {} from now on, until {}; a node that has heard it obeys no earlier one",
            key.short(),
            delegation.expires
        )?,
        Format::Name => writeln!(std::io::stdout(), "{key:?}")?,
        format => print_value(format, &serde_json::to_value(&delegation)?)?,
    }
    Ok(0)
}
