//! The depot over HTTP: blobs by digest, stored logs, outputs.

use std::io::{BufReader, Read};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use berth_protocol::ids::{Digest, Namespace};
use berth_protocol::limits::LOG_RECORD_BYTES_MAX;
use berth_protocol::log::{RecordError, read_record};
use berth_protocol::message::node::DepotAccess;
use berth_protocol::message::query::{LogSource, Query};
use tokio::sync::mpsc;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::config::Settings;
use super::connect::Session;
use super::order::Line;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A depot that says nothing for this long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(60);

#[derive(Clone)]
pub struct Depot {
    agent: ureq::Agent,
    access: DepotAccess,
}

impl Depot {
    /// # Errors
    /// It is known by a certificate, and the user by none.
    pub fn new(access: DepotAccess, settings: &Settings) -> anyhow::Result<Self> {
        let mut tls = TlsConfig::builder();
        if access.url.starts_with("https://") {
            // Not what the answer says: that came through the broker.
            let ca = &settings
                .identity
                .as_ref()
                .context("the depot asks for TLS: `berth login TOKEN`")?
                .membership
                .ca;
            let ca = Certificate::from_pem(ca.as_bytes())?;
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            tls =
                tls.root_certs(RootCerts::new_with_certs(&[ca])).unversioned_rustls_crypto_provider(provider);
        }
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(SILENCE_MAX))
            .timeout_per_write(Some(SILENCE_MAX))
            .tls_config(tls.build())
            .build();
        Ok(Self { agent: config.new_agent(), access })
    }

    /// Asks the controller for access to a namespace's part.
    pub async fn of(session: &mut Session, namespace: &Namespace) -> anyhow::Result<Self> {
        let value = session.query(Query::Depot { namespace: namespace.clone() }).await?;
        let access = serde_json::from_value(value).context("the controller's reply cannot be read")?;
        Self::new(access, &session.settings)
    }

    fn url(&self, path: &str) -> String {
        format!("{}/{}", self.access.url.trim_end_matches('/'), path.trim_start_matches('/'))
    }

    fn authorization(&self) -> String {
        format!("Bearer {}", self.access.token)
    }

    /// The blob is there already.
    pub fn has(&self, digest: &Digest) -> anyhow::Result<bool> {
        let url = self.url(&blob(digest));
        let response = self.agent.head(&url).header("authorization", self.authorization()).call();
        let status =
            response.with_context(|| format!("cannot reach the depot at {}", self.access.url))?.status();
        match status.as_u16() {
            200 => Ok(true),
            404 => Ok(false),
            code => bail!("the depot answers {code} to HEAD {url}"),
        }
    }

    /// Brings a blob of `bytes` bytes.
    pub fn put(&self, digest: &Digest, bytes: u64, mut content: impl Read) -> anyhow::Result<()> {
        let url = self.url(&blob(digest));
        let request = self
            .agent
            .put(&url)
            .header("authorization", self.authorization())
            .header("content-length", bytes.to_string());
        let response = request
            .send(ureq::SendBody::from_reader(&mut content))
            .with_context(|| format!("cannot bring files to the depot at {}", self.access.url))?;
        refused("PUT", &url, response).map(drop)
    }

    /// Sends `body`; status and answer, of at most `bytes_max`, whatever the status.
    pub fn post(&self, path: &str, body: &[u8], bytes_max: usize) -> anyhow::Result<(u16, Vec<u8>)> {
        let request = self.agent.post(self.url(path)).header("authorization", self.authorization());
        self.whole(request.send(body), bytes_max)
    }

    /// As `post`.
    pub fn put_bytes(&self, path: &str, body: &[u8], bytes_max: usize) -> anyhow::Result<(u16, Vec<u8>)> {
        let request = self.agent.put(self.url(path)).header("authorization", self.authorization());
        self.whole(request.send(body), bytes_max)
    }

    /// As `post`, by another method.
    pub fn call(
        &self,
        method: ureq::http::Method,
        path: &str,
        body: Vec<u8>,
        bytes_max: usize,
    ) -> anyhow::Result<(u16, Vec<u8>)> {
        let request = ureq::http::Request::builder().method(method).uri(self.url(path));
        let request = request.header("authorization", self.authorization()).body(body)?;
        // HTTP allows a body in these too, and an empty one is none.
        let agent = self.agent.configure_request(request).allow_non_standard_methods(true).build();
        self.whole(self.agent.run(agent), bytes_max)
    }

    fn whole(
        &self,
        response: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
        bytes_max: usize,
    ) -> anyhow::Result<(u16, Vec<u8>)> {
        let response = response.with_context(|| format!("cannot reach the depot at {}", self.access.url))?;
        let (status, mut answer) = (response.status().as_u16(), Vec::new());
        response.into_body().into_reader().take(bytes_max as u64).read_to_end(&mut answer)?;
        Ok((status, answer))
    }

    /// The content of `path`, as it comes.
    pub fn get(&self, path: &str) -> anyhow::Result<impl Read + use<>> {
        let url = self.url(path);
        let response = self
            .agent
            .get(&url)
            .header("authorization", self.authorization())
            .call()
            .with_context(|| format!("cannot reach the depot at {}", self.access.url))?;
        let body = refused("GET", &url, response)?.into_body();
        Ok(BufReader::with_capacity(64 * 1024, body.into_reader()))
    }

    /// Reads the stored log of `from` piece by piece, as long as somebody takes them; the number of its last record.
    pub fn read_log(
        &self,
        path: &str,
        from: &LogSource,
        to: &mpsc::Sender<Vec<Line>>,
    ) -> anyhow::Result<u64> {
        let mut reader = self.get(path)?;
        let mut buffer = Vec::new();
        let mut last = 0;
        loop {
            let more = reader.by_ref().take(4 * LOG_RECORD_BYTES_MAX as u64).read_to_end(&mut buffer)?;
            let (mut at, mut lines) = (0, Vec::new());
            loop {
                match read_record(&buffer[at..]) {
                    Ok((record, length)) => {
                        last = record.seq;
                        at += length;
                        lines.push(Line {
                            pod: from.pod.clone(),
                            epoch: from.epoch,
                            seq: record.seq,
                            at: record.at,
                            container: record.container.clone(),
                            stream: record.stream,
                            bytes: record.bytes.to_vec(),
                        });
                    }
                    Err(RecordError::Torn) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            buffer.drain(..at);
            let taken = to.blocking_send(lines).is_ok();
            if !taken || more == 0 {
                return Ok(last);
            }
        }
    }
}

fn blob(digest: &Digest) -> String {
    format!("v1/blobs/{}", digest.hex())
}

/// An answer other than a success is an error with what the depot says about it.
fn refused(
    verb: &str,
    url: &str,
    response: ureq::http::Response<ureq::Body>,
) -> anyhow::Result<ureq::http::Response<ureq::Body>> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let mut text = String::new();
    // What it says is a courtesy; not to hear it is no second error.
    let _ = response.into_body().into_reader().take(300).read_to_string(&mut text);
    bail!("the depot answers {} to {verb} {url}: {}", status.as_u16(), text.trim())
}
