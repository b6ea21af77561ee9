//! How this machine comes to belong to a cluster, and stays: `berth-agent join TOKEN`, and the renewal of its certificate.

use std::io::{BufRead as _, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use berth_protocol::broker::BrokerUrl;
use berth_protocol::codec;
use berth_protocol::ids::{NodeId, SessionNonce};
use berth_protocol::join::{JoinRequest, JoinToken, Membership, MustWait};
use berth_protocol::message::node::{Heartbeat, Lease};
use berth_protocol::sign::{Key, Signer};
use berth_protocol::tls::{Party, is_of_ca, joining};
use berth_protocol::topic::{NodeTopic, Topic};
use berth_protocol::units::Millis;
use bytes::Bytes;
use clap::Parser;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode};
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::sync::mpsc;

use super::bus::{Bus, BusEvent};
use super::clock;
use super::http;
use super::identity::{self, Shown};
use crate::config::{DATA_DIR, host_name};

const WITHIN: Duration = Duration::from_secs(20);
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// One that waits to be approved asks so often.
const ASKED_AGAIN: Duration = Duration::from_secs(2);
/// Of a token on stdin: several times the longest.
const TOKEN_BYTES_MAX: u64 = 4096;
/// A certificate is renewed this long before its end, of the 30 days that it is good.
const RENEWED_BEFORE: Millis = Millis(10 * 86_400_000);
/// How often that is looked at, and tried again.
const LOOK: Duration = Duration::from_secs(3600);
/// How long the way through the broker is looked for, and how often it is tried again.
const PROBED_WITHIN: Duration = Duration::from_secs(10);
const PROBED_AGAIN: Duration = Duration::from_secs(2);
const PROBE_EVENTS: usize = 16;
const UNIT: &str = "berth-agent.service";

/// Show a controller's token, once, and belong to its cluster.
#[derive(Parser, Debug)]
#[command(
    name = "berth-agent join",
    after_help = "Examples:
  berth-agent join b1c0ffee…@ctl.example.org:7420
  berth-agent join --node gpu-7 b1c0ffee…@ctl.example.org:7420
  berth-agent join - <token            the token from stdin: arguments are seen by every user of the machine

`berth node token` at the controller prints the line. The machine's key is made here and never leaves it. Where the
package's unit is there it is enabled and started. With a token from `berth node token --approve` it waits for an admin's
word, and says what is to be compared. A machine that was away for so long that its certificate has ended
joins again, with a token from `berth node token NODE`; its pods and their records stay."
)]
struct Args {
    /// What `berth node token` printed; `-` reads it from stdin, so that it is in no list of processes
    token: String,
    /// This node's name [default: the token's, else the host's]
    #[arg(long, env = "BERTH_NODE", value_name = "NAME")]
    node: Option<NodeId>,
    /// Where the agent keeps its identity, ledger, pods and images [default: /var/lib/berth/agent]
    #[arg(long, env = "BERTH_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

pub fn main() -> ExitCode {
    let args = Args::parse_from(std::env::args_os().skip(1));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let joined = runtime.context("cannot start").and_then(|runtime| runtime.block_on(join(args)));
    match joined {
        Ok(told) => {
            println!("{told}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("berth-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn join(args: Args) -> Result<String> {
    let Args { token, node, data_dir } = args;
    let token = read_token(token)?;
    let data_dir = data_dir.unwrap_or_else(|| DATA_DIR.into());
    if let Some(before) = identity::membership(&data_dir)? {
        let ca = CertificateDer::from_pem_slice(before.ca.as_bytes());
        // Its pods, and what it was ordered, are the other's.
        if !ca.is_ok_and(|ca| is_of_ca(&ca, &token.ca)) {
            let (cluster, dir) = (before.cluster, data_dir.display());
            bail!(
                "this machine belongs to another cluster, {cluster}: stop the agent and move {dir} away first"
            );
        }
    }
    let key = identity::key(&data_dir)?;
    let host = NodeId::parse(&host_name()).ok();
    let request = JoinRequest::new(&token, node.map(Party::Node), host, &key);
    let membership = admitted(&token, &request).await?;
    let Party::Node(node) = &membership.party else {
        bail!("the token is for a user: `berth login TOKEN`");
    };
    identity::keep_membership(&data_dir, &membership)?;
    if let Err(why) = probe(&data_dir, &membership, node).await {
        eprintln!("berth-agent: {why:#}");
    }
    let told = format!("this machine is {node} of the cluster {}", membership.cluster);
    Ok(match start_unit(&data_dir) {
        Some(Ok(())) => format!("{told}; {UNIT} is enabled and runs"),
        Some(Err(why)) => format!("{told}; {UNIT} does not start: {why}"),
        None => format!("{told}; start it: berth-agent --data-dir {}", data_dir.display()),
    })
}

/// Shows the token, and waits where an admin has to say that this machine is let in.
async fn admitted(token: &JoinToken, request: &JoinRequest) -> Result<Membership> {
    let (tls, body) = (joining(token.ca)?, serde_json::to_vec(request)?);
    let mut waits_until = None;
    loop {
        match ask(tls.clone(), &token.controller, "/v1/join", body.clone()).await {
            Ok(Answer::Told(membership)) => return Ok(*membership),
            Ok(Answer::Refused(why)) if waits_until.is_some() => {
                bail!("an admin has denied this machine, or none has approved it in time: {why}")
            }
            Ok(Answer::Refused(why)) => bail!("the controller refuses: {why}"),
            Ok(Answer::Waits(MustWait { node, until })) => {
                if waits_until.replace(until).is_none() {
                    eprintln!(
                        "berth-agent: this machine waits, until {until}, for an admin to say `berth node approve {node}`. To be \
                         compared with what `berth node tokens` shows there, the fingerprint of its key:\n  {}",
                        request.key.fingerprint()
                    );
                }
            }
            // While it waits its controller may be starting anew.
            Err(error) if waits_until.is_none_or(|until| until < clock::now().wall) => return Err(error),
            Err(_) => {}
        }
        tokio::time::sleep(ASKED_AGAIN).await;
    }
}

/// Says whether the controller hears this node through the broker, and is heard: brokers acknowledge what their rules then
/// drop, and grant subscriptions that they never serve.
async fn probe(data_dir: &Path, membership: &Membership, node: &NodeId) -> Result<()> {
    let key = identity::key(data_dir)?;
    let (broker, cluster) = (&membership.broker, &membership.cluster);
    let shown = Arc::new(Shown::new(membership, &key)?);
    let nonce = SessionNonce::parse(&format!("probe-{}-{}", std::process::id(), clock::now().boot.0))?;
    let (events, mut heard) = mpsc::channel(PROBE_EVENTS);
    let signer = Signer::new(cluster.clone(), key);
    let bus = Bus::connect(&BrokerUrl::parse(broker)?, node, &nonce, signer, Some(shown), events);
    let (beats, lease) = (Topic::node(node, NodeTopic::Heartbeat), Topic::node(node, NodeTopic::Lease));
    // Of no session that the controller knows: it grants nothing, and asks this one to say hello.
    let beat = Heartbeat::probe(nonce.clone(), clock::now().boot);
    let until = tokio::time::Instant::now() + PROBED_WITHIN;
    while tokio::time::Instant::now() < until {
        bus.publish(&beats, &beat);
        let again = until.min(tokio::time::Instant::now() + PROBED_AGAIN);
        while let Ok(Some(event)) = tokio::time::timeout_at(again, heard.recv()).await {
            match event {
                BusEvent::Message { topic, payload } if topic == lease => {
                    if codec::decode::<Lease>(&topic, &payload).is_ok_and(|lease| lease.nonce == nonce) {
                        bus.disconnect();
                        return Ok(());
                    }
                }
                BusEvent::Up => break,
                BusEvent::Message { .. } | BusEvent::Down => {}
            }
        }
    }
    let top = format!("berth/v1/{cluster}/nodes/{node}");
    if bus.is_up() {
        bail!(
            "the controller does not hear {node} through the broker {broker}, or is not heard: do its rules let {node} say \
             {top}/heartbeat and hear {top}/lease? (for Mosquitto `berth-controller broker-config mosquitto` writes them)"
        );
    }
    bail!(
        "the broker {broker} cannot be reached from here, or does not let {node} in, or not hear {top}/lease: is that its \
         address, and are its rules those of the cluster? (for Mosquitto `berth-controller broker-config mosquitto` writes them)"
    )
}

/// The token that was given, or stdin's first line for `-`.
fn read_token(given: String) -> Result<JoinToken> {
    let text = match given.as_str() {
        "-" => {
            let mut line = String::new();
            let stdin = std::io::stdin().lock().take(TOKEN_BYTES_MAX);
            std::io::BufReader::new(stdin).read_line(&mut line).context("cannot read the token")?;
            line
        }
        _ => given,
    };
    Ok(text.parse()?)
}

/// Enables and starts the service, where there is one for this directory.
fn start_unit(data_dir: &Path) -> Option<Result<(), String>> {
    if data_dir != Path::new(DATA_DIR) || !Path::new("/run/systemd/system").exists() {
        return None;
    }
    let systemctl = |args: &[&str]| Command::new("systemctl").args(args).output();
    systemctl(&["cat", UNIT]).ok().filter(|shown| shown.status.success())?;
    // A restart, for one that runs shows its last certificate.
    for args in [&["enable", "--quiet", UNIT][..], &["restart", UNIT]] {
        match systemctl(args) {
            Ok(done) if done.status.success() => {}
            Ok(done) => return Some(Err(String::from_utf8_lossy(&done.stderr).trim().to_owned())),
            Err(error) => return Some(Err(error.to_string())),
        }
    }
    Some(Ok(()))
}

/// Renews the certificate of a running agent whenever that is due.
pub async fn renew(data_dir: PathBuf, mut membership: Membership, shown: Arc<Shown>) {
    let mut told = false;
    loop {
        if clock::now().wall.plus(RENEWED_BEFORE) >= membership.expires {
            match renewed(&data_dir, &membership, &shown).await {
                Ok(new) => {
                    tracing::info!("this node's certificate is renewed until {}", new.expires);
                    (membership, told) = (new, false);
                }
                Err(error) if !told => {
                    let until = membership.expires;
                    tracing::warn!(
                        "this node's certificate, good until {until}, cannot be renewed: {error:#}; trying again. Once it has \
                         ended, `berth node token {}` at the controller makes the line that lets this machine back in",
                        membership.party
                    );
                    told = true;
                }
                Err(_) => {}
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn renewed(data_dir: &Path, membership: &Membership, shown: &Shown) -> Result<Membership> {
    let authority = membership.url.strip_prefix("https://").context("its controller has no address")?;
    let new = match ask(shown.client(), authority, "/v1/renew", b"{}".to_vec()).await? {
        Answer::Told(new) => *new,
        Answer::Refused(why) => bail!("the controller refuses: {why}"),
        Answer::Waits(_) => bail!("the controller's answer is none to this: is it of another version?"),
    };
    let new = under_its_root(membership, new);
    let key: Key = identity::key(data_dir)?;
    shown.renew(&new, &key)?;
    identity::keep_membership(data_dir, &new)?;
    Ok(new)
}

/// The root is the one that this node was told of as it joined: whoever makes certificates puts no other in its place.
fn under_its_root(before: &Membership, renewed: Membership) -> Membership {
    Membership { root: before.root, ..renewed }
}

/// What the controller answers to one that joins, or renews its certificate.
enum Answer {
    Told(Box<Membership>),
    Waits(MustWait),
    /// In its words.
    Refused(String),
}

/// Asks the controller at `HOST:PORT`.
async fn ask(tls: Arc<ClientConfig>, authority: &str, path: &str, body: Vec<u8>) -> Result<Answer> {
    let exchange = async {
        let (host, _) =
            authority.rsplit_once(':').with_context(|| format!("`{authority}` is not HOST:PORT"))?;
        let unreachable = || format!("cannot reach the controller at {authority}");
        let mut sender = http::connect_as(authority, host.trim_matches(['[', ']']), tls)
            .await
            .with_context(unreachable)?;
        let request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header("host", authority)
            .body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await.with_context(unreachable)?;
        let status = response.status();
        let answer = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let answer =
            answer.map_err(|error| anyhow::anyhow!("the controller's answer broke off: {error}"))?.to_bytes();
        let read = match status {
            StatusCode::ACCEPTED => serde_json::from_slice(&answer).map(Answer::Waits),
            status if status.is_success() => serde_json::from_slice(&answer).map(Answer::Told),
            _ => Ok(Answer::Refused(String::from_utf8_lossy(&answer).trim().to_owned())),
        };
        read.context("the controller's answer cannot be read: is it of another version?")
    };
    tokio::time::timeout(WITHIN, exchange)
        .await
        .with_context(|| format!("the controller at {authority} does not answer"))?
}

#[cfg(test)]
mod tests {
    use berth_protocol::ids::ClusterName;
    use berth_protocol::sign::PublicKey;
    use berth_protocol::units::Timestamp;

    use super::*;

    #[test]
    fn a_renewed_certificate_brings_no_other_root() {
        let membership = |root, expires| Membership {
            cluster: ClusterName::parse("lab").unwrap(),
            party: "a1".parse().unwrap(),
            ca: String::new(),
            certificate: String::new(),
            expires: Timestamp(expires),
            root: PublicKey::from_bytes([root; 32]),
            delegation: None,
            broker: String::new(),
            url: String::new(),
        };
        assert_eq!(under_its_root(&membership(1, 1), membership(9, 2)), membership(1, 2));
    }
}
