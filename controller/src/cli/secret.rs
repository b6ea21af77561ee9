//! `secret …`: what jobs mount and nobody reads back.

use std::io::{IsTerminal as _, Read as _, Write as _};

use anyhow::{Context as _, bail};
use berth_protocol::ids::SecretName;
use berth_protocol::limits::SECRET_BYTES_MAX;
use berth_protocol::message::query::SecretRow;
use hyper::Method;

use super::command::{Format, SecretVerb};
use super::config::Settings;
use super::connect::Session;
use super::depot::Depot;
use super::table::Table;
use super::{Usage, https, member, print_value};

pub async fn secret(settings: &Settings, verb: SecretVerb) -> anyhow::Result<u8> {
    let namespace = &settings.namespace;
    match verb {
        SecretVerb::Set { name, file } => {
            let value = match file.filter(|file| file.as_os_str() != "-") {
                Some(file) => {
                    std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?
                }
                None => from_stdin()?,
            };
            if value.is_empty() {
                return Err(Usage::new("the value is empty").into());
            }
            if value.len() > SECRET_BYTES_MAX {
                let text =
                    format!("the value has {} bytes, at most {SECRET_BYTES_MAX} are kept", value.len());
                return Err(Usage::new(text).into());
            }
            ask(settings, Method::PUT, Some(&name), value).await?;
            writeln!(
                std::io::stdout(),
                "secret {namespace}/{name} is set; pods that are placed from now on have it"
            )?;
        }
        SecretVerb::Remove { name } => {
            ask(settings, Method::DELETE, Some(&name), Vec::new()).await?;
            writeln!(std::io::stdout(), "secret {namespace}/{name} is removed; pods that have it keep it")?;
        }
        SecretVerb::List => list(settings).await?,
    }
    Ok(0)
}

fn from_stdin() -> anyhow::Result<Vec<u8>> {
    if std::io::stdin().is_terminal() {
        eprintln!("berth: type the value, then Ctrl-D");
    }
    let mut value = Vec::new();
    let most = u64::try_from(SECRET_BYTES_MAX)? + 1;
    std::io::stdin().take(most).read_to_end(&mut value).context("cannot read the value")?;
    Ok(value)
}

async fn list(settings: &Settings) -> anyhow::Result<()> {
    let answer = ask(settings, Method::GET, None, Vec::new()).await?;
    let rows: Vec<SecretRow> = serde_json::from_slice(&answer)
        .context("the controller's answer cannot be read: is it of another version?")?;
    match settings.format {
        Format::Table | Format::Wide => {
            let mut table = Table::new(vec!["NAME", "VERSION", "SET", "BY"]);
            for SecretRow { name, version, at, by } in rows {
                let by = by.map_or_else(|| "-".to_owned(), |by| by.trim_start_matches("user:").to_owned());
                table.push(vec![
                    name.to_string().into(),
                    version.to_string().into(),
                    at.to_string().into(),
                    by.into(),
                ]);
            }
            write!(std::io::stdout(), "{}", table.render(true, false, &mut Vec::new()))?;
        }
        Format::Name => {
            rows.iter().try_for_each(|row| writeln!(std::io::stdout(), "{}", row.name))?;
        }
        format => print_value(format, &serde_json::to_value(&rows)?)?,
    }
    Ok(())
}

/// Straight to the controller, never through the broker: by the user's certificate, or with --dev by a token.
async fn ask(
    settings: &Settings,
    method: Method,
    name: Option<&SecretName>,
    value: Vec<u8>,
) -> anyhow::Result<Vec<u8>> {
    let namespace = &settings.namespace;
    let name = name.map(|name| format!("/{name}")).unwrap_or_default();
    let path = format!("/v1/secrets/{namespace}{name}");
    if let Some(identity) = &settings.identity {
        let answer =
            https::send(identity.tls()?, &member::authority(identity)?, method, &path, value).await?;
        return Ok(answer.to_vec());
    }
    let mut session = Session::open(settings, Vec::new()).await?;
    let depot = Depot::of(&mut session, namespace).await?;
    session.close().await;
    let (status, answer) = depot.call(method, &path, value, ANSWER_BYTES_MAX)?;
    if status >= 300 {
        bail!("the controller refuses ({status}): {}", String::from_utf8_lossy(&answer).trim());
    }
    Ok(answer)
}

const ANSWER_BYTES_MAX: usize = 4 << 20;
