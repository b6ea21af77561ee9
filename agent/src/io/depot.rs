//! The depot, from an agent's side: puts logs and outputs, fetches workspaces, over HTTP/1.1 with a token.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use berth_protocol::chunk::GrantRequest;
use berth_protocol::ids::{Digest, Epoch, PodId};
use berth_protocol::limits::POD_SECRETS_BYTES_MAX;
use berth_protocol::message::node::DepotAccess;
use berth_protocol::secret::SecretValues;
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Request, StatusCode};
use rustls::ClientConfig;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt, Take};
use tokio::time::timeout;

use super::http;

/// A depot that neither takes nor gives a byte for so long is asked again later; however long the whole takes.
const STALL_MAX: Duration = Duration::from_secs(300);
/// Of what it says to explain a refusal.
const REASON_BYTES_MAX: usize = 1024;
const CHUNK_BYTES: usize = 64 * 1024;
const GRANT_BYTES_MAX: usize = 16 * 1024;
/// Values are digits, two a byte; names and quotes are beside them.
const SECRETS_BYTES_MAX: usize = 2 * POD_SECRETS_BYTES_MAX + 64 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum DepotError {
    #[error("the controller has not yet said where the depot is")]
    NoAccess,
    #[error("`{0}` is not a depot's address")]
    Url(String),
    #[error("cannot reach the depot: {0}")]
    Connect(#[source] io::Error),
    #[error("the depot broke off: {0}")]
    Http(#[from] hyper::Error),
    #[error("the depot stands still: nothing went either way for {} s", STALL_MAX.as_secs())]
    Stalled,
    #[error("the depot refused: {status}{}{said}", if said.is_empty() { "" } else { ": " })]
    Refused { status: StatusCode, said: String },
    #[error("cannot read or write {path}: {source}")]
    File { path: String, source: io::Error },
    #[error("the depot's answer is no grant")]
    Grant,
    #[error("the controller's answer is not a pod's secrets")]
    Secrets,
    #[error("the depot sent something else than {0}")]
    Digest(Digest),
}

impl DepotError {
    /// The same again would meet the same answer.
    pub fn is_final(&self) -> bool {
        matches!(self, DepotError::Refused { status, .. } if *status == StatusCode::PAYLOAD_TOO_LARGE)
    }
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Sends `files`, one after the other, as the log of a pod's epoch.
pub async fn put_log(
    access: &DepotAccess,
    pod: &PodId,
    epoch: Epoch,
    files: Vec<Take<File>>,
) -> Result<(), DepotError> {
    let path = format!("/v1/logs/{}/{}/{epoch}", pod.uid, pod.index);
    exchange(access, None, Method::PUT, &path, files_body(files)).await.map(drop)
}

/// Sends a file under its digest, which is returned with the file's size; `None` where there is no such file.
pub async fn put_file(
    access: Option<&DepotAccess>,
    path: &Path,
) -> Result<Option<(Digest, berth_protocol::units::Bytes)>, DepotError> {
    let access = access.ok_or(DepotError::NoAccess)?;
    let wrong = |source| DepotError::File { path: path.display().to_string(), source };
    let mut file = match File::open(path).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(wrong)?,
    };
    let mut hash = <sha2::Sha256 as sha2::Digest>::new();
    let (mut buffer, mut bytes) = (vec![0; CHUNK_BYTES], 0);
    loop {
        match file.read(&mut buffer).await.map_err(wrong)? {
            0 => break,
            length => {
                bytes += length as u64;
                sha2::Digest::update(&mut hash, &buffer[..length]);
            }
        }
    }
    let digest = Digest::from_bytes(sha2::Digest::finalize(hash).into());
    file.rewind().await.map_err(wrong)?;
    let path = format!("/v1/blobs/{}", digest.hex());
    exchange(access, None, Method::PUT, &path, files_body(vec![file.take(u64::MAX)])).await.map(drop)?;
    Ok(Some((digest, berth_protocol::units::Bytes(bytes))))
}

/// Exchanges the node's token for one that is good for one pod's saving or loading alone.
pub async fn grant(access: Option<&DepotAccess>, request: &GrantRequest) -> Result<DepotAccess, DepotError> {
    let access = access.ok_or(DepotError::NoAccess)?;
    let json = serde_json::to_vec(request).map_err(|_| DepotError::Grant)?;
    let body = StreamBody::new(stream::once(async { Ok(Frame::data(Bytes::from(json))) })).boxed_unsync();
    let answer = exchange(access, None, Method::POST, "/v1/grants", body).await?;
    serde_json::from_slice(&text(answer, GRANT_BYTES_MAX).await?).map_err(|_| DepotError::Grant)
}

/// A short answer, whole.
async fn text(body: Incoming, bytes_max: usize) -> Result<Bytes, DepotError> {
    let whole = timeout(STALL_MAX, Limited::new(body, bytes_max).collect());
    let whole = whole.await.map_err(|_| DepotError::Stalled)?;
    Ok(whole.map_err(|_| DepotError::Grant)?.to_bytes())
}

/// Fetches a blob into `to`, which is left only if every byte is as the digest says.
pub async fn get_blob(access: &DepotAccess, digest: &Digest, to: &Path) -> Result<(), DepotError> {
    let wrong = |source| DepotError::File { path: to.display().to_string(), source };
    let path = format!("/v1/blobs/{}", digest.hex());
    let mut body = exchange(access, None, Method::GET, &path, files_body(Vec::new())).await?;
    let mut file = File::create(to).await.map_err(wrong)?;
    let mut hash = <sha2::Sha256 as sha2::Digest>::new();
    while let Some(frame) = timeout(STALL_MAX, body.frame()).await.map_err(|_| DepotError::Stalled)? {
        if let Ok(data) = frame?.into_data() {
            sha2::Digest::update(&mut hash, &data);
            file.write_all(&data).await.map_err(wrong)?;
        }
    }
    file.flush().await.map_err(wrong)?;
    if *digest != Digest::from_bytes(sha2::Digest::finalize(hash).into()) {
        let _ = tokio::fs::remove_file(to).await;
        return Err(DepotError::Digest(*digest));
    }
    Ok(())
}

/// The files as one body, a chunk at a time: a log is never held in memory whole.
fn files_body(files: Vec<Take<File>>) -> Body {
    let chunks = stream::unfold(VecDeque::from(files), |mut files| async move {
        loop {
            let mut buffer = BytesMut::with_capacity(CHUNK_BYTES);
            match files.front_mut()?.read_buf(&mut buffer).await {
                Ok(length) if length > 0 => {
                    return Some((Ok::<_, Infallible>(Frame::data(buffer.freeze())), files));
                }
                _ => drop(files.pop_front()),
            }
        }
    });
    StreamBody::new(chunks).boxed_unsync()
}

/// What a pod's containers mount. `shown`: by which the controller knows this node, where it knows nodes by certificates:
/// the token has come through the broker.
pub async fn get_secrets(
    access: Option<&DepotAccess>,
    shown: Option<Arc<ClientConfig>>,
    pod: &PodId,
    epoch: Epoch,
) -> Result<SecretValues, DepotError> {
    let access = access.ok_or(DepotError::NoAccess)?;
    let path = format!("/v1/pods/{}/{}/{epoch}/secrets", pod.uid, pod.index);
    let answer = exchange(access, shown, Method::GET, &path, files_body(Vec::new())).await?;
    serde_json::from_slice(&text(answer, SECRETS_BYTES_MAX).await?).map_err(|_| DepotError::Secrets)
}

/// `shown`: what to show to a depot that asks for a certificate; else the token alone says who asks.
async fn exchange(
    access: &DepotAccess,
    shown: Option<Arc<ClientConfig>>,
    method: Method,
    path: &str,
    body: Body,
) -> Result<Incoming, DepotError> {
    let authority = http::authority(access).ok_or_else(|| DepotError::Url(access.url.clone()))?;
    let moved = Arc::new(AtomicU64::new(0));
    let counted = moved.clone();
    let body = body.map_frame(move |frame| {
        counted.fetch_add(1, Ordering::Relaxed);
        frame
    });
    let work = async {
        let mut sender = match (&access.tls, shown) {
            (Some(server), Some(shown)) => http::connect_as(authority, &server.party.dns_name(), shown).await,
            (server, _) => http::connect_to(authority, server.as_ref()).await,
        }
        .map_err(DepotError::Connect)?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", authority)
            .header("authorization", format!("Bearer {}", access.token))
            .body(body.boxed_unsync())
            .map_err(|_| DepotError::Url(access.url.clone()))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let said = text(response.into_body(), REASON_BYTES_MAX).await.unwrap_or_default();
        Err(DepotError::Refused { status, said: String::from_utf8_lossy(&said).trim().to_owned() })
    };
    let stalled = async {
        let mut before = None;
        while before.replace(moved.load(Ordering::Relaxed)) != Some(moved.load(Ordering::Relaxed)) {
            tokio::time::sleep(STALL_MAX).await;
        }
    };
    tokio::select! {
        result = work => result,
        () = stalled => Err(DepotError::Stalled),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use berth_protocol::units::Timestamp;

    use super::*;

    /// A depot that has nothing but this.
    fn depot(blob: &'static [u8]) -> DepotAccess {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]).unwrap();
            write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", blob.len()).unwrap();
            stream.write_all(blob).unwrap();
        });
        DepotAccess { url, token: "token".to_owned(), expires: Timestamp(0), tls: None, peer: None }
    }

    #[tokio::test]
    async fn a_blob_is_left_only_if_it_is_what_its_digest_says() {
        let dir = tempfile::tempdir().unwrap();
        let (digest, to) = (Digest::of(b"berth"), dir.path().join("blob"));
        get_blob(&depot(b"berth"), &digest, &to).await.unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"berth");
        // One bit is another.
        let changed = get_blob(&depot(b"bdrth"), &digest, &to).await;
        assert!(matches!(changed, Err(DepotError::Digest(named)) if named == digest), "{changed:?}");
        assert!(!to.exists());
    }
}
