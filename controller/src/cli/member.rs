//! Verbs about who belongs to the cluster: `login`, `node …`, `user …`.

use std::io::{BufRead as _, Read as _, Write as _};

use anyhow::Context as _;
use berth_protocol::join::{
    Approval, InvitationId, InvitationStatus, Invited, JoinRequest, JoinToken, MemberStatus, Membership,
    Roles, UserChange, WaitingStatus, first_roles,
};
use berth_protocol::sign::{Key, SEED_BYTES};
use berth_protocol::tls::{Party, joining};
use berth_protocol::units::{Millis, Timestamp};
use hyper::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::command::{Approve, Format, InviteNode, InviteUser, NodeVerb, SetUser, UserVerb};
use super::config::Settings;
use super::identity::Identity;
use super::table::Table;
use super::{Usage, https, print_value};

/// A third of the way before a certificate's end it is renewed.
const RENEWED_BEFORE: Millis = Millis(10 * 86_400_000);
/// Of a token on stdin: several times the longest.
const TOKEN_BYTES_MAX: u64 = 4096;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Invitation {
    token: String,
    id: InvitationId,
    expires: Timestamp,
}

/// What a user may do, in a cell.
fn told(admin: bool, roles: &Roles) -> String {
    let roles = roles.iter().map(|(namespace, role)| format!("{namespace}={role}"));
    let all: Vec<String> = admin.then(|| "admin".to_owned()).into_iter().chain(roles).collect();
    if all.is_empty() { "-".to_owned() } else { all.join(" ") }
}

/// `berth login TOKEN`; `-` is stdin's first line.
pub async fn login(settings: &Settings, token: &str) -> anyhow::Result<u8> {
    let mut line = String::new();
    if token == "-" {
        let stdin = std::io::stdin().lock().take(TOKEN_BYTES_MAX);
        std::io::BufReader::new(stdin).read_line(&mut line).context("cannot read the token")?;
    }
    let token = if token == "-" { &line } else { token };
    let token: JoinToken = token.parse().map_err(|error| Usage::new(format!("{error}")))?;
    let dir = settings
        .own_identity
        .as_deref()
        .context("there is no home directory to keep the key in: name one with --identity DIR")?;
    let seed: [u8; SEED_BYTES] = crate::io::random::bytes().context("no randomness")?;
    let key = Key::from_seed(&seed);
    let request = JoinRequest::new(&token, None, None, &key);
    let membership: Membership =
        https::ask(joining(token.ca)?, &token.controller, Method::POST, "/v1/join", &request).await?;
    let (party, cluster) = (membership.party.clone(), membership.cluster.clone());
    Identity::new(dir, membership, key).save(&seed)?;
    writeln!(std::io::stdout(), "you are {party} of the cluster {cluster}; the key is in {}", dir.display())?;
    Ok(0)
}

/// Renews the certificate where that is due. What stands in the way is said and is no error: it is good for some days yet.
pub async fn renew(settings: &mut Settings) {
    let Some(identity) = &mut settings.identity else { return };
    let now = crate::io::clock::now().wall;
    if now.plus(RENEWED_BEFORE) < identity.membership.expires {
        return;
    }
    let renewed = async {
        let authority = authority(identity)?;
        let membership =
            https::ask(identity.tls()?, &authority, Method::POST, "/v1/renew", &json!({})).await?;
        identity.membership = membership;
        identity.save_membership()
    };
    if let Err(error) = renewed.await {
        let expires = settings.identity.as_ref().map(|identity| identity.membership.expires);
        eprintln!(
            "berth: your certificate ends at {}, and it could not be renewed: {error:#}",
            expires.map(|at| at.to_string()).unwrap_or_default()
        );
    }
}

pub fn authority(identity: &Identity) -> anyhow::Result<String> {
    let url = &identity.membership.url;
    Ok(url
        .strip_prefix("https://")
        .with_context(|| format!("`{url}` is no controller's address"))?
        .to_owned())
}

pub async fn ask<T: serde::de::DeserializeOwned>(
    settings: &Settings,
    method: Method,
    path: &str,
    body: &impl Serialize,
) -> anyhow::Result<T> {
    let identity = settings.identity.as_ref().context(
        "you belong to no cluster here: `berth login TOKEN`, with a token from an admin's `berth user token NAME`; with --dev \
         nobody needs one",
    )?;
    https::ask(identity.tls()?, &authority(identity)?, method, path, body).await
}

pub async fn node(settings: &Settings, verb: NodeVerb) -> anyhow::Result<u8> {
    match verb {
        NodeVerb::Token(InviteNode { node, approve, life }) => {
            let life = life.map(super::connect::millis);
            let asked = json!({"who": Invited::Node(node), "life": life, "approve": approve});
            invite(settings, &asked, "berth-agent join").await
        }
        NodeVerb::Tokens => tokens(settings).await,
        NodeVerb::Approve(Approve { node, fingerprint }) => {
            let approval = Approval { fingerprint };
            let _: Value = ask(settings, Method::POST, &format!("/v1/waiting/{node}"), &approval).await?;
            writeln!(std::io::stdout(), "node {node} is let in, as soon as it asks again")?;
            Ok(0)
        }
        NodeVerb::Deny { node } => {
            let _: Value = ask(settings, Method::DELETE, &format!("/v1/waiting/{node}"), &json!({})).await?;
            writeln!(
                std::io::stdout(),
                "node {node} is not let in, and its token is good for nothing any more"
            )?;
            Ok(0)
        }
        NodeVerb::Lost { node, powered_off } => super::node::lost(settings, node, powered_off).await,
        NodeVerb::Revoke { id } => revoke(settings, id).await,
        NodeVerb::Remove { node } => {
            let _: Value = ask(settings, Method::DELETE, &format!("/v1/nodes/{node}"), &json!({})).await?;
            writeln!(
                std::io::stdout(),
                "node {node} does not belong to the cluster any more: it gets no grants, and its pods go elsewhere once their \
                 leases are over"
            )?;
            Ok(0)
        }
    }
}

pub async fn user(settings: &Settings, verb: UserVerb) -> anyhow::Result<u8> {
    match verb {
        UserVerb::Token(InviteUser { user, admin, roles, life }) => {
            // An admin has every role without being told so.
            let roles = if roles.is_empty() && !admin { first_roles() } else { roles.into_iter().collect() };
            let who = Invited::User { user, admin, roles };
            let asked = json!({"who": who, "life": life.map(super::connect::millis)});
            invite(settings, &asked, "berth login").await
        }
        UserVerb::Set(SetUser { user, roles, admin, no_admin }) => {
            let change = UserChange {
                admin: (admin || no_admin).then_some(admin),
                roles: roles.into_iter().collect(),
            };
            if change == UserChange::default() {
                return Err(
                    Usage::new("what is to change? write NAMESPACE=ROLE, --admin or --no-admin").into()
                );
            }
            let _: Value = ask(settings, Method::POST, &format!("/v1/users/{user}"), &change).await?;
            writeln!(std::io::stdout(), "user {user} is set; what {user} has open is connected anew")?;
            Ok(0)
        }
        UserVerb::List => {
            let all: Vec<MemberStatus> = ask(settings, Method::GET, "/v1/members", &json!({})).await?;
            let users: Vec<MemberStatus> =
                all.into_iter().filter(|member| matches!(member.party, Party::User(_))).collect();
            if !matches!(settings.format, Format::Table | Format::Wide | Format::Name) {
                print_value(settings.format, &serde_json::to_value(&users)?)?;
                return Ok(0);
            }
            let mut table = Table::new(vec!["USER", "SINCE", "ROLES"]);
            for MemberStatus { party, since, admin, roles } in users {
                let name = party.to_string().trim_start_matches("user:").to_owned();
                table.push(vec![name.into(), since.to_string().into(), told(admin, &roles).into()]);
            }
            print(&table)
        }
        UserVerb::Remove { user } => {
            let _: Value = ask(settings, Method::DELETE, &format!("/v1/users/{user}"), &json!({})).await?;
            writeln!(std::io::stdout(), "user {user} does not belong to the cluster any more; jobs go on")?;
            Ok(0)
        }
    }
}

async fn invite(settings: &Settings, asked: &Value, command: &str) -> anyhow::Result<u8> {
    let made: Invitation = ask(settings, Method::POST, "/v1/invitations", asked).await?;
    match settings.format {
        Format::Table | Format::Wide => {
            writeln!(std::io::stdout(), "{command} {}", made.token)?;
            eprintln!("good once, until {}; `berth node revoke {}` takes it back", made.expires, made.id);
        }
        Format::Name => writeln!(std::io::stdout(), "{}", made.token)?,
        format => print_value(format, &serde_json::to_value(&made)?)?,
    }
    Ok(0)
}

async fn tokens(settings: &Settings) -> anyhow::Result<u8> {
    let open: Vec<InvitationStatus> = ask(settings, Method::GET, "/v1/invitations", &json!({})).await?;
    if !matches!(settings.format, Format::Table | Format::Wide | Format::Name) {
        print_value(settings.format, &serde_json::to_value(&open)?)?;
        return Ok(0);
    }
    let mut table = Table::new(vec!["ID", "FOR", "EXPIRES", "WAITS", "KEY", "FROM"]);
    for InvitationStatus { id, who, expires, approve, waiting } in open {
        let who = match who {
            Invited::Node(None) => "any node".to_owned(),
            Invited::Node(Some(node)) => format!("node {node}"),
            Invited::User { user, admin, roles } => format!("user {user} ({})", told(admin, &roles)),
        };
        let none = || "-".to_owned();
        let (waits, key, from) = match waiting {
            Some(WaitingStatus { node, fingerprint, from, approved, .. }) => {
                let waits = if approved { format!("{node} (approved)") } else { node.to_string() };
                (waits, fingerprint.to_string(), from.map_or_else(none, |from| from.to_string()))
            }
            None => (if approve { "nobody yet".to_owned() } else { none() }, none(), none()),
        };
        let cells = [id.to_string(), who, expires.to_string(), waits, key, from];
        table.push(cells.into_iter().map(Into::into).collect());
    }
    print(&table)
}

fn print(table: &Table) -> anyhow::Result<u8> {
    write!(std::io::stdout(), "{}", table.render(true, false, &mut Vec::new()))?;
    Ok(0)
}

async fn revoke(settings: &Settings, id: InvitationId) -> anyhow::Result<u8> {
    let _: Value = ask(settings, Method::DELETE, &format!("/v1/invitations/{id}"), &json!({})).await?;
    writeln!(std::io::stdout(), "token {id} is good for nothing any more")?;
    Ok(0)
}
