//! Chunks of which a node says only by what they differ from one that is here: most of a page that a program wrote to is as
//! it was. They are kept whole, so that none needs another.

use berth_protocol::chunk::{ChunkId, Frame};
use berth_protocol::ids::Namespace;
use berth_protocol::limits::PACK_BYTES_MAX;
use bytes::Bytes;

use super::packs::{self, PackError};
use super::{Depot, DepotError};

impl Depot {
    /// `frames` with every difference applied.
    pub(super) async fn applied(&self, namespace: &Namespace, frames: Bytes) -> Result<Bytes, DepotError> {
        let differences = differences(&frames)?;
        if differences.is_empty() {
            return Ok(frames);
        }
        let (mut whole, mut lacking, mut end) = (Vec::new(), Vec::new(), 0);
        for Difference { base, from, to } in differences {
            whole.extend_from_slice(&frames[end..from]);
            end = to;
            let Some(there) = self.frame(namespace, &base).await? else {
                lacking.push(base);
                continue;
            };
            let said = frames.slice(from..to);
            let applied = tokio::task::spawn_blocking(move || packs::apply(&said, &there));
            whole.extend(applied.await.map_err(|error| DepotError::Broken(error.to_string()))??);
        }
        whole.extend_from_slice(&frames[end..]);
        match lacking.is_empty() {
            true if whole.len() > PACK_BYTES_MAX => Err(DepotError::TooLarge { max: PACK_BYTES_MAX as u64 }),
            true => Ok(whole.into()),
            false => Err(DepotError::Bases(lacking)),
        }
    }
}

/// One frame that says a difference, and where it lies.
struct Difference {
    base: ChunkId,
    from: usize,
    to: usize,
}

/// All of them; what they are to become is no more than a pack holds.
fn differences(frames: &[u8]) -> Result<Vec<Difference>, DepotError> {
    let (mut found, mut at, mut content) = (Vec::new(), 0, 0);
    while at < frames.len() {
        let (frame, length) = Frame::read(&frames[at..]).map_err(|source| PackError::Frame { at, source })?;
        if let Some((base, _)) = frame.difference() {
            content += frame.content_bytes as usize;
            found.push(Difference { base, from: at, to: at + length });
        }
        at += length;
    }
    if content > PACK_BYTES_MAX {
        return Err(DepotError::TooLarge { max: PACK_BYTES_MAX as u64 });
    }
    Ok(found)
}
