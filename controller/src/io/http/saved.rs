//! Checkpoints over HTTP: grants, chunks, manifests, as `berth_protocol::chunk` describes. It moves bytes and checks
//! tokens; who may save or load a pod, it asks the loop.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use berth_protocol::checkpoint::CheckpointInfo;
use berth_protocol::chunk::{self, ChunkId, GrantFor, GrantRequest};
use berth_protocol::ids::{Digest, Namespace, NodeId};
use berth_protocol::job;
use berth_protocol::limits::{
    CHUNKS_ASKED_MAX, CHUNKS_FETCHED_MAX, JOB_FILE_BYTES_MAX, MANIFEST_BYTES_MAX, PACK_BYTES_MAX,
};
use berth_protocol::manifest::Manifest;
use berth_protocol::message::node::DepotAccess;
use berth_protocol::token::{self, Scope};
use berth_protocol::units::Millis;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Body, Frame, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use tokio::sync::{mpsc, oneshot};

use super::{Answer, INQUIRY_TIMEOUT, Inquiry, Service, clock, text};
use crate::core::{Granted, Imported};
use crate::io::depot::{DepotError, Kept};

const GRANT_BYTES_MAX: usize = 4096;
/// Renewed by asking again.
const GRANT_LIFE: Millis = Millis(600_000);
/// Frames read ahead of a client.
const AHEAD: usize = 2;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    Grants,
    Lacking,
    Chunks,
    Manifest(Digest),
    ChunksOf(Digest),
    Import(Digest),
}

impl Route {
    pub fn parse(levels: &[&str]) -> Option<Self> {
        let digest = |hex: &str| Digest::parse(&format!("sha256:{hex}")).ok();
        Some(match levels {
            ["v1", "grants"] => Route::Grants,
            ["v1", "chunks"] => Route::Chunks,
            ["v1", "chunks", "lacking"] => Route::Lacking,
            ["v1", "checkpoints", hex] => Route::Manifest(digest(hex)?),
            ["v1", "checkpoints", hex, "chunks"] => Route::ChunksOf(digest(hex)?),
            ["v1", "checkpoints", hex, "import"] => Route::Import(digest(hex)?),
            _ => return None,
        })
    }
}

pub(super) fn bytes(status: StatusCode, bytes: impl Into<Bytes>) -> Answer {
    let body = Full::new(bytes.into()).map_err(|never: Infallible| match never {});
    let mut answer = Response::new(body.boxed_unsync());
    *answer.status_mut() = status;
    answer
}

impl Service {
    pub(super) async fn saved(self: &Arc<Self>, route: Route, request: Request<Incoming>) -> Answer {
        let scope = match self.scope(&request) {
            Ok(scope) => scope,
            Err(why) => return text(StatusCode::UNAUTHORIZED, why),
        };
        let saves = match &scope {
            Scope::Save { namespace, .. } | Scope::Namespace(namespace) => Some(namespace),
            _ => None,
        };
        match (route, request.method()) {
            (Route::Grants, &Method::POST) => match scope {
                Scope::Node(node) => self.grant(node, request).await,
                _ => self.forbidden(),
            },
            (Route::Lacking, &Method::POST) if let Some(namespace) = saves => {
                self.lacking(namespace, request).await
            }
            (Route::Chunks, &Method::POST) if let Some(namespace) = saves => {
                self.add_chunks(namespace, request).await
            }
            (Route::Manifest(id), &Method::PUT) if saves.is_some() => {
                self.keep_manifest(&scope, id, request).await
            }
            (Route::Manifest(id), &Method::GET) if self.may_load(&scope, &id) => self.manifest(&id).await,
            (Route::ChunksOf(id), &Method::POST) if self.may_load(&scope, &id) => {
                self.chunks_of(id, request).await
            }
            (Route::Import(id), &Method::POST) => match scope {
                Scope::Namespace(namespace) => self.import(&namespace, id, request).await,
                _ => self.forbidden(),
            },
            (_, &Method::GET | &Method::POST | &Method::PUT) => self.forbidden(),
            _ => text(StatusCode::METHOD_NOT_ALLOWED, "checkpoints know GET, POST and PUT"),
        }
    }

    fn may_load(&self, scope: &Scope, id: &Digest) -> bool {
        match scope {
            Scope::Load { checkpoint } => checkpoint == id,
            Scope::Namespace(namespace) | Scope::View(namespace) => {
                self.depot.manifest_namespace(id).is_none_or(|whose| whose == *namespace)
            }
            _ => false,
        }
    }

    pub(super) async fn whole(&self, request: Request<Incoming>, max: usize) -> Result<Bytes, Answer> {
        match Limited::new(request.into_body(), max).collect().await {
            Ok(whole) => Ok(whole.to_bytes()),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => {
                Err(text(StatusCode::PAYLOAD_TOO_LARGE, format!("at most {max} bytes are allowed here")))
            }
            Err(error) => Err(text(StatusCode::BAD_REQUEST, format!("it broke off: {error}"))),
        }
    }

    async fn ids(&self, request: Request<Incoming>, max: usize) -> Result<Vec<ChunkId>, Answer> {
        let bytes = self.whole(request, max * ChunkId::BYTES).await?;
        chunk::read_ids(&bytes).map_err(|error| text(StatusCode::BAD_REQUEST, error.to_string()))
    }

    /// A token for one pod's saving or restoring, if the pod is the node's.
    async fn grant(&self, node: NodeId, request: Request<Incoming>) -> Answer {
        let bytes = match self.whole(request, GRANT_BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(answer) => return answer,
        };
        let asked: GrantRequest = match serde_json::from_slice(&bytes) {
            Ok(asked) => asked,
            Err(error) => return text(StatusCode::BAD_REQUEST, error.to_string()),
        };
        let (pod, epoch, what) = (asked.pod.clone(), asked.epoch, asked.what);
        let (reply, answer) = oneshot::channel();
        let inquiry = Inquiry::Grant { node, asked, reply };
        let inquired = async {
            self.inquiries.send(inquiry).await.ok()?;
            answer.await.ok()
        };
        match tokio::time::timeout(INQUIRY_TIMEOUT, inquired).await.ok().flatten() {
            Some(Some(Granted { namespace, url, tls, holder })) => {
                let scope = match what {
                    GrantFor::Save => Scope::Save { namespace, pod, epoch },
                    GrantFor::Load { checkpoint } => Scope::Load { checkpoint },
                };
                let expires = clock::now().wall.plus(GRANT_LIFE);
                let access = |url, secret: &[u8; 32], tls, peer| DepotAccess {
                    url,
                    token: token::mint(secret, &scope, expires),
                    expires,
                    tls,
                    peer,
                };
                let peer =
                    holder.map(|(server, tls)| Box::new(access(server.url, &server.secret, tls, None)));
                let access = access(url, &self.secret, tls, peer);
                // Plain data, which serde writes without fail.
                self::bytes(StatusCode::OK, serde_json::to_vec(&access).unwrap_or_default())
            }
            Some(None) => self.forbidden(),
            None => text(StatusCode::SERVICE_UNAVAILABLE, "the controller is too busy to answer"),
        }
    }

    async fn lacking(&self, namespace: &Namespace, request: Request<Incoming>) -> Answer {
        match self.ids(request, CHUNKS_ASKED_MAX).await {
            Ok(ids) => bytes(StatusCode::OK, chunk::write_ids(&self.depot.lacking(namespace, &ids))),
            Err(answer) => answer,
        }
    }

    async fn add_chunks(&self, namespace: &Namespace, request: Request<Incoming>) -> Answer {
        // Each holds its pack in memory.
        let Ok(_place) = self.packs.acquire().await else {
            return text(StatusCode::SERVICE_UNAVAILABLE, "the controller is stopping");
        };
        let frames = match self.whole(request, PACK_BYTES_MAX).await {
            Ok(frames) => frames,
            Err(answer) => return answer,
        };
        match self.depot.add_chunks(namespace, frames).await {
            Ok(()) => text(StatusCode::CREATED, "kept"),
            Err(DepotError::Bases(lacking)) => bytes(StatusCode::CONFLICT, chunk::write_ids(&lacking)),
            Err(error) => self.failed(&error),
        }
    }

    async fn keep_manifest(&self, scope: &Scope, id: Digest, request: Request<Incoming>) -> Answer {
        let bytes = match self.whole(request, MANIFEST_BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(answer) => return answer,
        };
        let manifest = match Manifest::parse(&id, &bytes) {
            Ok(manifest) => manifest,
            Err(error) => return text(StatusCode::BAD_REQUEST, error.to_string()),
        };
        let theirs = match scope {
            Scope::Save { namespace, pod, epoch } => {
                manifest.namespace == *namespace && manifest.pod == *pod && manifest.epoch == *epoch
            }
            Scope::Namespace(namespace) => manifest.namespace == *namespace,
            _ => false,
        };
        if !theirs {
            return self.forbidden();
        }
        match self.depot.keep_manifest(id, bytes, &manifest).await {
            Ok(Kept::New) => text(StatusCode::CREATED, "kept"),
            Ok(Kept::Known) => text(StatusCode::OK, "it was there"),
            Ok(Kept::Lacking(ids)) => self::bytes(StatusCode::CONFLICT, chunk::write_ids(&ids)),
            Err(error) => self.failed(&error),
        }
    }

    /// Records a checkpoint whose manifest was put before; the body is its job's file.
    async fn import(&self, namespace: &Namespace, id: Digest, request: Request<Incoming>) -> Answer {
        let bytes = match self.whole(request, JOB_FILE_BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(answer) => return answer,
        };
        let manifest = match self.depot.manifest(&id).await {
            Ok(Some(found)) => Manifest::parse(&id, &found),
            Ok(None) => return text(StatusCode::NOT_FOUND, "the depot does not have this checkpoint"),
            Err(error) => return self.failed(&error),
        };
        let manifest = match manifest {
            Ok(manifest) if manifest.namespace == *namespace => manifest,
            Ok(_) => return self.forbidden(),
            Err(error) => return text(StatusCode::BAD_REQUEST, error.to_string()),
        };
        let spec = match job::parse(&bytes, None) {
            Ok(parsed) => parsed.spec,
            Err(errors) => {
                let all: Vec<String> =
                    errors.iter().map(|error| format!("{}: {}", error.field, error.message)).collect();
                return text(StatusCode::BAD_REQUEST, all.join("; "));
            }
        };
        if spec.pod != manifest.template {
            return text(StatusCode::BAD_REQUEST, "the job's file is not of the checkpoint's job");
        }
        let bytes = berth_protocol::units::Bytes(manifest.bytes());
        let info = CheckpointInfo {
            id,
            level: 0,
            at: manifest.at,
            kind: manifest.kind,
            bytes,
            new_bytes: bytes,
            frozen_ms: 0,
            log_records: manifest.log_records,
            needs: manifest.needs,
        };
        let Manifest { pod, epoch, node, .. } = manifest;
        let (reply, answer) = oneshot::channel();
        let imported = Box::new(Imported { info, pod, epoch, node, spec });
        let inquired = async {
            self.inquiries.send(Inquiry::Import { imported, reply }).await.ok()?;
            answer.await.ok()
        };
        match tokio::time::timeout(INQUIRY_TIMEOUT, inquired).await.ok().flatten() {
            Some(()) => text(StatusCode::CREATED, "recorded"),
            None => text(StatusCode::SERVICE_UNAVAILABLE, "the controller is too busy to answer"),
        }
    }

    async fn manifest(&self, id: &Digest) -> Answer {
        match self.depot.manifest(id).await {
            Ok(Some(found)) => bytes(StatusCode::OK, found),
            Ok(None) => text(StatusCode::NOT_FOUND, "the depot does not have this checkpoint"),
            Err(error) => self.failed(&error),
        }
    }

    async fn chunks_of(self: &Arc<Self>, id: Digest, request: Request<Incoming>) -> Answer {
        let ids = match self.ids(request, CHUNKS_FETCHED_MAX).await {
            Ok(ids) => ids,
            Err(answer) => return answer,
        };
        let whose = self.depot.manifest_namespace(&id).filter(|_| self.depot.manifest_names(&id, &ids));
        let Some(namespace) = whose else {
            return text(StatusCode::NOT_FOUND, "not all of these are chunks of this checkpoint");
        };
        let (tx, frames) = mpsc::channel(AHEAD);
        let depot = self.depot.clone();
        tokio::spawn(async move {
            for id in ids {
                let frame = match depot.frame(&namespace, &id).await {
                    Ok(Some(frame)) => Ok(frame),
                    Ok(None) => Err(io::Error::other(format!("chunk {id} is not in the depot"))),
                    Err(error) => Err(io::Error::other(error)),
                };
                let over = frame.is_err();
                // A client that has gone wants no more.
                if tx.send(frame).await.is_err() || over {
                    return;
                }
            }
        });
        Response::new(Frames(frames).boxed_unsync())
    }
}

/// Frames as they are read.
struct Frames(mpsc::Receiver<io::Result<Bytes>>);

impl Body for Frames {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.0.poll_recv(cx).map(|next| next.map(|bytes| bytes.map(Frame::data)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes() {
        let digest = Digest::of(b"");
        let manifest = format!("v1/checkpoints/{}", digest.hex());
        let chunks = format!("{manifest}/chunks");
        for (path, route) in [
            ("v1/grants", Some(Route::Grants)),
            ("v1/chunks", Some(Route::Chunks)),
            ("v1/chunks/lacking", Some(Route::Lacking)),
            (&manifest, Some(Route::Manifest(digest))),
            (&chunks, Some(Route::ChunksOf(digest))),
            (&format!("{manifest}/import"), Some(Route::Import(digest))),
            ("v1/chunks/other", None),
            ("v1/checkpoints/..", None),
        ] {
            assert_eq!(Route::parse(&path.split('/').collect::<Vec<_>>()), route, "{path}");
        }
    }
}
