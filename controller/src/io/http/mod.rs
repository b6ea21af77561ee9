//! The controller's HTTP: `/healthz`, `/metrics`, and the depot behind its tokens. It moves bytes and checks tokens;
//! how the controller is, it asks the loop.

mod connection;
mod inquiry;
mod members;
mod saved;
mod secrets;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use berth_protocol::ids::{Digest, Epoch, JobUid};
use berth_protocol::limits::{OUTPUT_BYTES_MAX, WORKSPACE_BYTES_MAX};
use berth_protocol::tls::Peer;
use berth_protocol::token::{self, Scope};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_rustls::TlsAcceptor;

use super::clock;
use super::depot::{Depot, DepotError, Item};
use super::front::{self, Tls};
use super::metrics::{self, Refusals};
use super::vault::Vault;

const CONNECTIONS_MAX: usize = 1024;
const PACKS_MAX: usize = 4;
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the loop may take to say how it is.
const INQUIRY_TIMEOUT: Duration = Duration::from_secs(2);
const HEADER_BYTES_MAX: usize = 16 * 1024;

const LOG_BYTES_MAX: u64 = 256 << 20;

#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for HTTP (stop whatever does, or choose another --listen-http)")]
pub struct HttpError {
    address: SocketAddr,
    source: io::Error,
}

use self::connection::{Counted, Moving, Open, UnderWay};
pub use self::inquiry::{Inquiry, Report};
pub use self::members::{About, Hall};

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Default)]
struct Visitor {
    /// As its certificate says, if it showed one.
    peer: Option<Peer>,
    from: Option<IpAddr>,
}

/// Who serves.
pub struct Server {
    listener: TcpListener,
    service: Arc<Service>,
}

struct Service {
    depot: Arc<Depot>,
    secret: [u8; 32],
    vault: Vault,
    refusals: Arc<Refusals>,
    inquiries: mpsc::Sender<Inquiry>,
    /// Where it is not everybody that is let in.
    hall: Option<Hall>,
    /// Packs that may be in memory at once.
    packs: Semaphore,
}

impl Server {
    pub async fn bind(
        address: SocketAddr,
        depot: Arc<Depot>,
        secret: [u8; 32],
        refusals: Arc<Refusals>,
        inquiries: mpsc::Sender<Inquiry>,
        hall: Option<Hall>,
    ) -> Result<Self, HttpError> {
        let listener = TcpListener::bind(address).await.map_err(|source| HttpError { address, source })?;
        Ok(Self {
            listener,
            service: Arc::new(Service {
                depot,
                secret,
                vault: Vault::of(&secret),
                refusals,
                inquiries,
                hall,
                packs: Semaphore::new(PACKS_MAX),
            }),
        })
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until dropped.
    pub async fn run(self) {
        let mut open: VecDeque<Open> = VecDeque::new();
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    open.retain(|open| !open.task.is_finished());
                    if open.len() >= CONNECTIONS_MAX {
                        // The oldest on which nobody is being answered: who says nothing keeps nobody out.
                        let idle = open.iter().position(|open| open.answering.load(Ordering::Relaxed) == 0);
                        if let Some(open) = open.remove(idle.unwrap_or(0)) {
                            open.task.abort();
                        }
                    }
                    let answering = Arc::new(AtomicUsize::new(0));
                    let task = tokio::spawn(self.service.clone().serve(stream, answering.clone()));
                    open.push_back(Open { task: task.abort_handle(), answering });
                }
                Err(error) => {
                    // Out of file descriptors, as a rule: wait for some to come back.
                    tracing::warn!(%error, "cannot accept an HTTP connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

type Answer = Response<UnsyncBoxBody<Bytes, io::Error>>;

fn text(status: StatusCode, text: impl Into<String>) -> Answer {
    let mut text = text.into();
    if !text.ends_with('\n') {
        text.push('\n');
    }
    let body = Full::new(Bytes::from(text)).map_err(|never: Infallible| match never {});
    let mut answer = Response::new(body.boxed_unsync());
    *answer.status_mut() = status;
    answer
        .headers_mut()
        .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

/// What a path names.
#[derive(Debug, PartialEq, Eq)]
enum Route {
    Health,
    Metrics,
    Item(Item),
    Saved(saved::Route),
    Members(members::Route),
    Secrets(secrets::Route),
}

impl Route {
    fn parse(path: &str) -> Option<Self> {
        let levels: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
        Some(match levels[..] {
            ["healthz"] => Route::Health,
            ["metrics"] => Route::Metrics,
            ["v1", "blobs", hex] => Route::Item(Item::Blob(Digest::parse(&format!("sha256:{hex}")).ok()?)),
            ["v1", "logs", uid, index, epoch] => {
                let pod = JobUid::parse(uid).ok()?.pod(number(index)?);
                Route::Item(Item::Log { pod, epoch: Epoch(number(epoch)?) })
            }
            _ => {
                let saved = saved::Route::parse(&levels).map(Route::Saved);
                let secrets = || secrets::Route::parse(&levels).map(Route::Secrets);
                saved.or_else(secrets).or_else(|| members::Route::parse(&levels).map(Route::Members))?
            }
        })
    }
}

/// Does a request's path name anything here?
pub fn is_path(path: &str) -> bool {
    Route::parse(path).is_some()
}

/// A number in its one spelling.
fn number<T: std::str::FromStr + ToString>(text: &str) -> Option<T> {
    text.parse().ok().filter(|number: &T| number.to_string() == text)
}

/// The most bytes that `scope` may put there; `None`: it may not.
fn put_bytes_max(scope: &Scope, item: &Item) -> Option<u64> {
    match (scope, item) {
        (Scope::Node(_), Item::Blob(_)) => Some(OUTPUT_BYTES_MAX),
        (Scope::Node(_), Item::Log { .. }) => Some(LOG_BYTES_MAX),
        (Scope::Namespace(_), Item::Blob(_)) => Some(WORKSPACE_BYTES_MAX),
        (Scope::Namespace(_), Item::Log { .. })
        | (Scope::View(_) | Scope::Save { .. } | Scope::Load { .. }, _) => None,
    }
}

// Whose job a log is of, the depot does not know; ids of jobs are not to be guessed.
fn may_get(scope: &Scope, item: &Item) -> bool {
    matches!((scope, item), (Scope::Namespace(_) | Scope::View(_), _) | (Scope::Node(_), Item::Blob(_)))
}

impl Service {
    async fn serve(self: Arc<Self>, stream: TcpStream, answering: Arc<AtomicUsize>) {
        let _ = stream.set_nodelay(true);
        let from = stream.peer_addr().ok().map(|address| address.ip());
        let Some(Tls { config, .. }) = self.hall.as_ref().map(|hall| &hall.tls) else {
            return self.converse(stream, Visitor { peer: None, from }, answering).await;
        };
        let accepted = TlsAcceptor::from(config.clone()).accept(stream);
        // One that knows another CA says so itself.
        if let Ok(Ok(stream)) = tokio::time::timeout(HEADER_TIMEOUT, accepted).await {
            let peer = front::peer(&stream);
            self.converse(stream, Visitor { peer, from }, answering).await;
        }
    }

    async fn converse(
        self: Arc<Self>,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        visitor: Visitor,
        answering: Arc<AtomicUsize>,
    ) {
        let io = TokioIo::new(Moving::new(stream));
        let service = hyper::service::service_fn(move |request| {
            let (service, visitor) = (self.clone(), visitor.clone());
            let under_way = UnderWay::new(answering.clone());
            async move {
                let answer = service.answer(request, visitor).await;
                // Until its last byte is on its way.
                Ok::<_, Infallible>(answer.map(|body| Counted::new(body, under_way)))
            }
        });
        // A peer that breaks off is no news.
        let _ = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(HEADER_BYTES_MAX)
            .serve_connection(io, service)
            .await;
    }

    async fn answer(self: &Arc<Self>, request: Request<Incoming>, visitor: Visitor) -> Answer {
        let Some(route) = Route::parse(request.uri().path()) else {
            return text(StatusCode::NOT_FOUND, "there is nothing here");
        };
        let reading = matches!(*request.method(), Method::GET | Method::HEAD);
        match route {
            Route::Health if reading => self.health().await,
            Route::Metrics if reading && self.is_strange(visitor.peer.as_ref()) => {
                text(StatusCode::UNAUTHORIZED, "this takes the certificate of a member of the cluster")
            }
            Route::Metrics if reading => self.metrics().await,
            Route::Item(item) => self.item(item, request).await,
            Route::Saved(route) => self.saved(route, request).await,
            Route::Secrets(route) => self.secrets(route, request, visitor).await,
            Route::Members(route) => self.members(route, request, visitor).await,
            _ => text(StatusCode::METHOD_NOT_ALLOWED, "this can only be read"),
        }
    }

    /// One that does not belong, where that counts.
    fn is_strange(&self, peer: Option<&Peer>) -> bool {
        self.hall.as_ref().is_some_and(|hall| !peer.is_some_and(|peer| hall.tls.members.knows(peer)))
    }

    async fn report(&self) -> Option<Report> {
        let (inquiry, report) = oneshot::channel();
        let asked = async {
            self.inquiries.send(Inquiry::Report(inquiry)).await.ok()?;
            report.await.ok()
        };
        tokio::time::timeout(INQUIRY_TIMEOUT, asked).await.ok().flatten()
    }

    async fn health(&self) -> Answer {
        match self.report().await {
            Some(Report { bus_up: true, .. }) => text(StatusCode::OK, "ok"),
            Some(_) => text(StatusCode::SERVICE_UNAVAILABLE, "the broker is not connected"),
            None => text(
                StatusCode::SERVICE_UNAVAILABLE,
                "the controller is too busy to answer, or waits for its store",
            ),
        }
    }

    async fn metrics(&self) -> Answer {
        match self.report().await {
            Some(report) => text(StatusCode::OK, metrics::render(report, &self.refusals)),
            None => text(StatusCode::SERVICE_UNAVAILABLE, "the controller is too busy to answer"),
        }
    }

    async fn item(&self, item: Item, request: Request<Incoming>) -> Answer {
        let scope = match self.scope(&request) {
            Ok(scope) => scope,
            Err(why) => return text(StatusCode::UNAUTHORIZED, why),
        };
        match *request.method() {
            Method::PUT => match put_bytes_max(&scope, &item) {
                Some(bytes_max) => self.put(&item, bytes_max, request).await,
                None => self.forbidden(),
            },
            Method::GET | Method::HEAD if may_get(&scope, &item) => self.get(&item, request.method()).await,
            Method::GET | Method::HEAD => self.forbidden(),
            _ => text(StatusCode::METHOD_NOT_ALLOWED, "the depot knows GET, HEAD and PUT"),
        }
    }

    fn scope(&self, request: &Request<Incoming>) -> Result<Scope, String> {
        let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let verified = match header.and_then(|value| value.strip_prefix("Bearer ")) {
            Some(shown) => {
                token::verify(&self.secret, shown, clock::now().wall).map_err(|error| error.to_string())
            }
            None => Err("the depot wants `Authorization: Bearer TOKEN`".to_owned()),
        };
        verified
            .inspect_err(|why| self.refusals.refuse("token", format_args!("a request to the depot: {why}")))
    }

    fn forbidden(&self) -> Answer {
        self.refusals.refuse("token", format_args!("a request to the depot: its token does not allow it"));
        text(StatusCode::FORBIDDEN, "the token does not allow this")
    }

    async fn put(&self, item: &Item, bytes_max: u64, request: Request<Incoming>) -> Answer {
        let announced: Option<u64> =
            request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let result = match announced {
            Some(bytes) if bytes > bytes_max => Err(DepotError::TooLarge { max: bytes_max }),
            _ => self.depot.put(item, bytes_max, request.into_body()).await,
        };
        match result {
            Ok(_) => text(StatusCode::CREATED, "kept"),
            Err(error) => self.failed(&error),
        }
    }

    async fn get(&self, item: &Item, method: &Method) -> Answer {
        match self.depot.get(item).await {
            Ok(Some(content)) => {
                let mut answer = Response::new(());
                let headers = answer.headers_mut();
                headers.insert(CONTENT_LENGTH, content.bytes().into());
                headers.insert(
                    CONTENT_TYPE,
                    hyper::header::HeaderValue::from_static("application/octet-stream"),
                );
                if method == Method::HEAD {
                    return answer.map(|()| {
                        http_body_util::Empty::new()
                            .map_err(|never: Infallible| match never {})
                            .boxed_unsync()
                    });
                }
                answer.map(|()| content.boxed_unsync())
            }
            Ok(None) => text(StatusCode::NOT_FOUND, "the depot does not have it"),
            Err(error) => self.failed(&error),
        }
    }

    fn failed(&self, error: &DepotError) -> Answer {
        let status = match error {
            DepotError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            DepotError::Digest { .. }
            | DepotError::NotALog { .. }
            | DepotError::Broken(_)
            | DepotError::Pack(_) => StatusCode::BAD_REQUEST,
            DepotError::Bases(_) => StatusCode::CONFLICT,
            DepotError::Quota { .. } => StatusCode::INSUFFICIENT_STORAGE,
            DepotError::Bucket { .. } | DepotError::Url(_) => StatusCode::BAD_GATEWAY,
            DepotError::Io { .. } if error.is_disk_full() => StatusCode::INSUFFICIENT_STORAGE,
            DepotError::Altered { .. } | DepotError::Io { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        match error {
            DepotError::Io { source, .. } => {
                tracing::error!("{error}: {source}");
                text(
                    status,
                    if error.is_disk_full() { "the depot's disk is full" } else { "the depot's disk fails" },
                )
            }
            DepotError::Altered { .. } => {
                tracing::error!("{error}");
                text(status, "the depot's file is damaged")
            }
            DepotError::Bucket { .. } => {
                tracing::error!("{error}");
                text(status, "the depot's bucket fails")
            }
            _ => {
                self.refusals.refuse("depot", format_args!("an upload: {error}"));
                text(status, error.to_string())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let blob = Route::Item(Item::Blob(Digest::of(b"")));
        assert_eq!(Route::parse(&format!("/v1/blobs/{hex}")), Some(blob));
        let log = Item::Log { pod: JobUid::parse("u1").unwrap().pod(3), epoch: Epoch(2) };
        assert_eq!(Route::parse("/v1/logs/u1/3/2"), Some(Route::Item(log)));
        for bad in [
            "",
            "/",
            "/v1/blobs/",
            "/v1/blobs/../x",
            "/v1/logs/u1/3",
            "/v1/logs/u1/03/2",
            "/v1/logs/../3/2",
            "/v1/logs/u1/-1/2",
        ] {
            assert_eq!(Route::parse(bad), None, "{bad}");
        }
    }
}
