//! Requests to the controller itself: small ones, each on a connection of its own.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

const WITHIN: Duration = Duration::from_secs(20);
const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// Asks the controller at `HOST:PORT` and returns what it answers; a refusal is an error in its words.
pub async fn ask<T: DeserializeOwned>(
    tls: Arc<ClientConfig>,
    authority: &str,
    method: Method,
    path: &str,
    body: &impl Serialize,
) -> anyhow::Result<T> {
    let answer = send(tls, authority, method, path, serde_json::to_vec(body)?).await?;
    serde_json::from_slice(&answer)
        .context("the controller's answer cannot be read: is it of another version?")
}

/// Likewise, of any bytes.
pub async fn send(
    tls: Arc<ClientConfig>,
    authority: &str,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> anyhow::Result<Bytes> {
    let exchange = async {
        let unreachable = || format!("cannot reach the controller at {authority}");
        let (host, _) =
            authority.rsplit_once(':').with_context(|| format!("`{authority}` is not HOST:PORT"))?;
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())
            .with_context(|| format!("`{host}` is not a host"))?;
        let stream = TcpStream::connect(authority).await.with_context(unreachable)?;
        let stream = TlsConnector::from(tls).connect(name, stream).await.with_context(unreachable)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.with_context(unreachable)?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", authority)
            .body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await.with_context(unreachable)?;
        let status = response.status();
        let answer = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let answer =
            answer.map_err(|error| anyhow::anyhow!("the controller's answer broke off: {error}"))?.to_bytes();
        if !status.is_success() {
            bail!(
                "the controller refuses ({}): {}",
                status.as_u16(),
                String::from_utf8_lossy(&answer).trim()
            );
        }
        Ok(answer)
    };
    let sent = tokio::time::timeout(WITHIN, exchange).await;
    sent.with_context(|| format!("the controller at {authority} does not answer"))?
}
