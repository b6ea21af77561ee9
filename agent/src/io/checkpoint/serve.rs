//! Chunks of the checkpoints that this node keeps, for the nodes that their pods go to: the same request as the depot's,
//! without the way through it. What is sent is not looked at: whoever asked holds each chunk against its name.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use berth_protocol::chunk::{ChunkId, Encoding, Frame, read_ids};
use berth_protocol::ids::Digest;
use berth_protocol::limits::CHUNKS_FETCHED_MAX;
use berth_protocol::message::node::ChunkServer;
use berth_protocol::token::{self, Scope};
use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Limited, StreamBody};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;

use super::fetch::{Kept, Place, held};
use crate::io::clock;
use crate::io::identity::Shown;

/// More wait for their turn.
const CONNECTIONS_MAX: usize = 4;
const CONNECTION_LIFE: Duration = Duration::from_secs(600);
const HEADER_WITHIN: Duration = Duration::from_secs(10);
/// Chunks read ahead of whoever takes them.
const AHEAD: usize = 2;

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// Serves from now on what `cache` keeps; returns where, and what tokens for it are made with.
///
/// # Errors
/// The address is not this machine's, or taken.
pub async fn listen(
    address: SocketAddr,
    cache: PathBuf,
    shown: Option<Arc<Shown>>,
) -> io::Result<ChunkServer> {
    let listener = TcpListener::bind(address).await?;
    let scheme = if shown.is_some() { "https" } else { "http" };
    let url = format!("{scheme}://{}", listener.local_addr()?);
    let server = ChunkServer { url, secret: clock::random_bytes()? };
    tokio::spawn(accept(listener, Arc::new((server.secret, cache)), shown));
    Ok(server)
}

async fn accept(listener: TcpListener, shelf: Arc<([u8; 32], PathBuf)>, shown: Option<Arc<Shown>>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    while let Ok(place) = places.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (shelf, tls) = (shelf.clone(), shown.as_ref().map(|shown| shown.server()));
                let served = async {
                    match tls {
                        None => serve(stream, shelf).await,
                        Some(tls) => match TlsAcceptor::from(tls).accept(stream).await {
                            Ok(stream) => serve(stream, shelf).await,
                            Err(error) => tracing::debug!("a node that wants chunks broke off: {error}"),
                        },
                    }
                };
                tokio::spawn(async move {
                    let _ = tokio::time::timeout(CONNECTION_LIFE, served).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!("no other node can fetch chunks from here now: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, shelf: Arc<([u8; 32], PathBuf)>) {
    let service = service_fn(move |request| {
        let shelf = shelf.clone();
        async move {
            let answer = answer(request, &shelf).await;
            Ok::<_, Infallible>(answer.unwrap_or_else(empty))
        }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_WITHIN);
    // One that breaks off has nobody to be told.
    let _ = http.serve_connection(TokioIo::new(stream), service).await;
}

fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Empty::new().boxed_unsync());
    *answer.status_mut() = status;
    answer
}

async fn answer(request: Request<Incoming>, shelf: &([u8; 32], PathBuf)) -> Result<Answer, StatusCode> {
    let levels: Vec<&str> = request.uri().path().split('/').skip(1).collect();
    let ["v1", "checkpoints", hex, "chunks"] = levels[..] else { return Err(StatusCode::NOT_FOUND) };
    let id = Digest::parse(&format!("sha256:{hex}")).map_err(|_| StatusCode::NOT_FOUND)?;
    if request.method() != Method::POST {
        return Err(StatusCode::METHOD_NOT_ALLOWED);
    }
    let shown = request.headers().get("authorization").and_then(|value| value.to_str().ok());
    let shown = shown.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    match token::verify(&shelf.0, shown, clock::now().wall) {
        Ok(Scope::Load { checkpoint }) if checkpoint == id => {}
        _ => return Err(StatusCode::UNAUTHORIZED),
    }
    let body = Limited::new(request.into_body(), CHUNKS_FETCHED_MAX * ChunkId::BYTES).collect().await;
    let body = body.map_err(|_| StatusCode::PAYLOAD_TOO_LARGE)?.to_bytes();
    let ids = read_ids(&body).map_err(|_| StatusCode::BAD_REQUEST)?;
    let dir = shelf.1.join(id.hex());
    let look = move || {
        let wanted: BTreeMap<ChunkId, ()> = ids.iter().map(|id| (*id, ())).collect();
        let places = held(&[Kept::read(dir)?], &wanted);
        ids.into_iter().map(|id| Some((id, places.get(&id)?.clone()))).collect::<Option<Vec<_>>>()
    };
    let places = tokio::task::spawn_blocking(look).await.ok().flatten().ok_or(StatusCode::NOT_FOUND)?;
    tracing::debug!("another node is given {} chunks of checkpoint {id}", places.len());
    let (frames, read) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        for (id, place) in places {
            // Cut short, it is asked for elsewhere; and whoever asked may have gone.
            let Ok(frame) = frame(id, &place) else { return };
            if frames.blocking_send(frame).is_err() {
                return;
            }
        }
    });
    let frames = stream::unfold(read, |mut read| async move {
        let frame = read.recv().await?;
        Some((Ok::<_, Infallible>(hyper::body::Frame::data(Bytes::from(frame))), read))
    });
    Ok(Response::new(StreamBody::new(frames).boxed_unsync()))
}

fn frame(id: ChunkId, place: &Place) -> io::Result<Vec<u8>> {
    let mut content = vec![0; place.bytes as usize];
    File::open(&place.path)?.read_exact_at(&mut content, place.offset)?;
    let mut out = Vec::with_capacity(content.len() + berth_protocol::chunk::FRAME_HEADER_BYTES);
    Frame { id, encoding: Encoding::Raw, content_bytes: place.bytes, bytes: &content }.write(&mut out);
    Ok(out)
}
