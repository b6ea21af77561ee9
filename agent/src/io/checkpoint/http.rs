//! The depot's HTTP, from a transferring child: small requests with a token, one connection after the other.

use std::time::Duration;

use berth_protocol::message::node::DepotAccess;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode};
use tokio::time::{Instant, sleep_until, timeout};

use super::super::http;

/// One exchange of at most a pack.
const EXCHANGE_MAX: Duration = Duration::from_secs(120);

#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("`{0}` is not its address")]
    Url(String),
    #[error("cannot be reached: {0}")]
    Connect(#[source] std::io::Error),
    #[error("broke off: {0}")]
    Http(#[from] hyper::Error),
    #[error("took too long")]
    Slow,
    #[error("answered with more than {0} bytes")]
    TooLarge(usize),
    #[error("refused: {0}")]
    Refused(StatusCode),
}

impl HttpError {
    pub fn retriable(&self) -> bool {
        match self {
            HttpError::Refused(status) => {
                *status == StatusCode::UNAUTHORIZED
                    || *status == StatusCode::TOO_MANY_REQUESTS
                    || status.is_server_error() && *status != StatusCode::INSUFFICIENT_STORAGE
            }
            HttpError::Url(_) | HttpError::TooLarge(_) => false,
            HttpError::Connect(_) | HttpError::Http(_) | HttpError::Slow => true,
        }
    }
}

pub struct Client<'a> {
    access: &'a DepotAccess,
    /// Bytes a second; zero: no bound.
    rate: u64,
    free_at: Instant,
    connection: Option<hyper::client::conn::http1::SendRequest<Full<Bytes>>>,
}

impl<'a> Client<'a> {
    pub fn new(access: &'a DepotAccess, rate: u64) -> Self {
        Self { access, rate, free_at: Instant::now(), connection: None }
    }

    fn authority(&self) -> Result<&'a str, HttpError> {
        http::authority(self.access).ok_or_else(|| HttpError::Url(self.access.url.clone()))
    }

    /// Sends one request; status and body come back whatever the status, the body up to `bytes_max`.
    pub async fn send(
        &mut self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        bytes_max: usize,
    ) -> Result<(StatusCode, Bytes), HttpError> {
        sleep_until(self.free_at).await;
        let sent = body.len();
        let answer = timeout(EXCHANGE_MAX, self.exchange(method, path, body, bytes_max))
            .await
            .map_err(|_| HttpError::Slow)??;
        let micros = ((sent + answer.1.len()) as u64).saturating_mul(1_000_000).checked_div(self.rate);
        if let Some(pause) = micros.map(Duration::from_micros) {
            self.free_at = self.free_at.max(Instant::now()) + pause;
        }
        Ok(answer)
    }

    async fn exchange(
        &mut self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        bytes_max: usize,
    ) -> Result<(StatusCode, Bytes), HttpError> {
        let authority = self.authority()?;
        let mut sender = match self.connection.take().filter(|sender| !sender.is_closed()) {
            Some(sender) => sender,
            None => {
                http::connect_to(authority, self.access.tls.as_ref()).await.map_err(HttpError::Connect)?
            }
        };
        sender.ready().await?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", authority)
            .header("authorization", format!("Bearer {}", self.access.token))
            .body(Full::new(Bytes::from(body)))
            .map_err(|_| HttpError::Url(self.access.url.clone()))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), bytes_max).collect().await;
        let body = body.map_err(|_| HttpError::TooLarge(bytes_max))?.to_bytes();
        self.connection = Some(sender);
        Ok((status, body))
    }

    /// As `send`, where anything but success is an error.
    pub async fn ask(
        &mut self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        bytes_max: usize,
    ) -> Result<Bytes, HttpError> {
        match self.send(method, path, body, bytes_max).await? {
            (status, body) if status.is_success() => Ok(body),
            (status, _) => Err(HttpError::Refused(status)),
        }
    }
}
