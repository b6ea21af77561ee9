//! A checkpoint of this node's into the depot: cut, asked about, what lacks sent, and last the manifest, which makes
//! it one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use berth_protocol::checkpoint::CheckpointInfo;
use berth_protocol::chunk::{ChunkId, read_ids, write_ids};
use berth_protocol::ids::Digest;
use berth_protocol::job::{DisconnectAction, VolumeSource};
use berth_protocol::limits::{CHUNK_BYTES_MAX, CHUNKS_ASKED_MAX, PACK_BYTES_MAX};
use berth_protocol::manifest::{MANIFEST_VERSION, Manifest, Piece, SavedContainer, SavedFile, SavedVolume};
use berth_protocol::message::node::DepotAccess;
use berth_protocol::units::Bytes;
use hyper::{Method, StatusCode};

use super::earlier::{Base, Earlier, write_difference};
use super::http::{Client, HttpError};
use super::{Said, Store, TransferError, chunks, pages, say};
use crate::shim::checkpoint::Parts;
use crate::shim::sys;
use crate::task::file;

/// A container's part that is no image of CRIU's, by the name that it has among them.
pub const WORKSPACE: &str = "workspace.tar";
const LAYER: &str = "upper.tar";
const CONFIG: &str = "config.json";
/// The manifest's copy in the checkpoint's directory, by which a restore here finds that it fetches nothing.
pub const MANIFEST: &str = "manifest.json";
/// The depot may collect what it had when it was asked.
const TRIES_MAX: u32 = 4;
/// Frames' headers, and what compresses badly.
const PACK_SLACK_BYTES: usize = 2 * CHUNK_BYTES_MAX;

/// One file of the checkpoint, and where it lies.
struct Part {
    path: PathBuf,
    saved: SavedFile,
}

pub async fn store(order: &Store, access: &DepotAccess) -> Result<CheckpointInfo, TransferError> {
    let (manifest, parts) = match sealed(order) {
        Some(sealed) => sealed,
        None => describe(order)?,
    };
    let (id, bytes) = manifest.render().map_err(|e| TransferError::Unfit(e.to_string()))?;
    let mut client = Client::new(access, order.rate);
    let all: BTreeSet<ChunkId> = manifest.chunks().map(|(id, _)| id).collect();
    let mut lacking = ask(&mut client, &all).await?;
    let mut bases = bases(&mut client, order, &parts, &lacking).await?;
    let mut sent = 0;
    for _ in 0..TRIES_MAX {
        sent += match send(&mut client, &parts, &lacking, &bases).await {
            // The depot has let go meanwhile what these differ from.
            Err(TransferError::Depot(HttpError::Refused(StatusCode::CONFLICT))) if !bases.is_empty() => {
                bases.clear();
                continue;
            }
            sent => sent?,
        };
        let path = format!("/v1/checkpoints/{}", id.hex());
        let bound = ChunkId::BYTES * CHUNKS_ASKED_MAX;
        match client.send(Method::PUT, &path, bytes.clone(), bound).await? {
            (status, _) if status.is_success() => {
                fs::write(order.dir.join(MANIFEST), &bytes)
                    .map_err(TransferError::io("cannot keep the manifest"))?;
                // It may have to serve when the machine has ended and the depot is out of reach.
                if order.template.on_disconnect.action == DisconnectAction::Continue {
                    super::name(&order.dir, &order.pod)
                        .and_then(|()| sync(&order.dir))
                        .map_err(unsynced(order))?;
                }
                let saved = &order.saved;
                return Ok(CheckpointInfo {
                    id,
                    level: saved.level,
                    at: saved.at,
                    kind: saved.kind,
                    bytes: Bytes(manifest.bytes()),
                    new_bytes: Bytes(sent),
                    frozen_ms: saved.frozen_ms,
                    log_records: saved.log_records,
                    needs: manifest.needs,
                });
            }
            (StatusCode::CONFLICT, ids) => {
                lacking =
                    read_ids(&ids).map_err(|e| TransferError::Unfit(e.to_string()))?.into_iter().collect();
            }
            (status, _) => return Err(HttpError::Refused(status).into()),
        }
    }
    Err(HttpError::Refused(StatusCode::CONFLICT).into())
}

/// Makes a checkpoint outlast the machine's end, and fit to begin from without the depot.
///
/// # Errors
/// It is not read, or not on disk.
pub fn seal(order: &Store) -> Result<(), TransferError> {
    if sealed(order).is_some() {
        return Ok(());
    }
    let (manifest, _) = describe(order)?;
    let (_, bytes) = manifest.render().map_err(|e| TransferError::Unfit(e.to_string()))?;
    sync(&order.dir).map_err(unsynced(order))?;
    // Last: where it is, all the rest is.
    sys::write_durably(&order.dir, MANIFEST, &bytes).map_err(unsynced(order))
}

fn unsynced(order: &Store) -> impl FnOnce(io::Error) -> TransferError {
    TransferError::io(format!("cannot write {} to its disk", order.dir.display()))
}

/// All that was written to the file system of `dir` is on disk when this returns.
fn sync(dir: &Path) -> io::Result<()> {
    Ok(nix::unistd::syncfs(File::open(dir)?)?)
}

/// What was said of the checkpoint when it was sealed: what it needs is of the machine as it was then.
fn sealed(order: &Store) -> Option<(Manifest, Vec<Part>)> {
    let bytes = fs::read(order.dir.join(MANIFEST)).ok()?;
    let manifest = Manifest::parse(&Digest::of(&bytes), &bytes).ok()?;
    let layout = Parts::new(order.dir.clone());
    let places = super::fetch::places(&manifest, &order.template.volumes, &layout).ok()?;
    let parts = places.into_iter().map(|(path, saved)| Part { path, saved: saved.clone() }).collect();
    Some((manifest, parts))
}

fn describe(order: &Store) -> Result<(Manifest, Vec<Part>), TransferError> {
    let layout = Parts::new(order.dir.clone());
    let mut parts = Vec::new();
    let mut take =
        |path: PathBuf, name: &str, cuts: Option<&Vec<(u64, u64)>>| -> Result<SavedFile, TransferError> {
            let wrong = || TransferError::io(format!("cannot read {}", path.display()));
            let bytes = fs::metadata(&path).map_err(wrong())?.len();
            let saved = chunks::pieces(&path, name, &pages::cuts(bytes, cuts)).map_err(wrong())?;
            parts.push(Part { path, saved: saved.clone() });
            Ok(saved)
        };
    let mut containers = Vec::new();
    for (index, container) in order.saved.containers.iter().enumerate() {
        let images = layout.images(&container.name);
        let mut dump = Vec::new();
        if images.is_dir() {
            let wrong = || TransferError::io(format!("cannot read {}", images.display()));
            let mappings = pages::mappings(&images).map_err(wrong())?;
            let mut names = Vec::new();
            for entry in fs::read_dir(&images).map_err(wrong())? {
                names.extend(entry.map_err(wrong())?.file_name().into_string());
            }
            names.sort();
            for name in names.iter().filter(|name| name.ends_with(".img")) {
                dump.push(take(images.join(name), name, mappings.get(name))?);
            }
        }
        let workspace = layout.workspace(&container.name);
        if workspace.is_file() {
            dump.push(take(workspace, WORKSPACE, None)?);
        }
        if index == 0 {
            dump.push(take(layout.saved(), file::SAVED, None)?);
            if layout.kept().is_file() {
                dump.push(take(layout.kept(), file::KEPT, None)?);
            }
        }
        containers.push(SavedContainer {
            name: container.name.clone(),
            image: order.images.get(index).copied().flatten(),
            dump,
            config: match layout.config(&container.name) {
                path if path.is_file() => Some(take(path, CONFIG, None)?),
                _ => None,
            },
            layer: Some(take(layout.upper(&container.name), LAYER, None)?),
            notes: Default::default(),
        });
    }
    let mut volumes = Vec::new();
    for (index, volume) in order.template.volumes.iter().enumerate() {
        let archive = layout.volume(index);
        if archive.is_file() {
            let archive = take(archive, &format!("{index}.tar"), None)?;
            let name = match &volume.source {
                VolumeSource::Named(name) => Some(name.clone()),
                VolumeSource::Host(_) | VolumeSource::Scratch(_) => None,
            };
            volumes.push(SavedVolume { mount: volume.mount.clone(), name, archive });
        }
    }
    let template = order.template.clone();
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        namespace: template.namespace.clone(),
        name: template.job.pod(order.pod.index),
        pod: order.pod.clone(),
        epoch: order.epoch,
        run: order.run,
        at: order.saved.at,
        kind: order.saved.kind,
        node: Some(order.node.clone()),
        spec: order.spec,
        template,
        log_records: order.saved.log_records,
        needs: order.needs.clone(),
        versions: order.versions.clone(),
        containers,
        volumes,
    };
    Ok((manifest, parts))
}

/// What chunks that are to be sent can be said by: what stood in their places before, where the depot has it.
async fn bases(
    client: &mut Client<'_>,
    order: &Store,
    parts: &[Part],
    lacking: &BTreeSet<ChunkId>,
) -> Result<BTreeMap<ChunkId, Base>, TransferError> {
    let touched = parts.iter().filter(|part| part.saved.chunks().any(|(id, _)| lacking.contains(&id)));
    let touched = touched.map(|part| (part.path.as_path(), &part.saved));
    let mut found = Earlier::of(&order.cache, &order.pod).bases(&order.dir, touched);
    found.retain(|id, _| lacking.contains(id));
    let gone = ask(client, &found.values().map(|base| base.id).collect()).await?;
    found.retain(|_, base| !gone.contains(&base.id));
    Ok(found)
}

/// Those of `all` that the depot has not.
async fn ask(client: &mut Client<'_>, all: &BTreeSet<ChunkId>) -> Result<BTreeSet<ChunkId>, TransferError> {
    let all: Vec<ChunkId> = all.iter().copied().collect();
    let mut found = BTreeSet::new();
    for asked in all.chunks(CHUNKS_ASKED_MAX) {
        let bound = asked.len() * ChunkId::BYTES;
        let answer = client.ask(Method::POST, "/v1/chunks/lacking", write_ids(asked), bound).await?;
        found.extend(read_ids(&answer).map_err(|e| TransferError::Unfit(e.to_string()))?);
    }
    Ok(found)
}

/// Sends each of `wanted` once; returns the bytes sent, as they travelled.
async fn send(
    client: &mut Client<'_>,
    parts: &[Part],
    wanted: &BTreeSet<ChunkId>,
    bases: &BTreeMap<ChunkId, Base>,
) -> Result<u64, TransferError> {
    let mut left = wanted.clone();
    let (mut pack, mut sent) = (Vec::new(), 0_u64);
    // What differences in the pack are to become is bounded like the pack.
    let mut grown = 0;
    let total = sizes(parts, wanted);
    let mut done = 0_u64;
    for part in parts {
        let wrong = |path: &Path| TransferError::io(format!("cannot read {}", path.display()));
        let file = File::open(&part.path).map_err(wrong(&part.path))?;
        let mut offset = 0;
        for piece in &part.saved.pieces {
            if let Piece::Chunk { id, bytes } = piece
                && left.remove(id)
            {
                let differs = match bases.get(id) {
                    Some(base) => write_difference(&file, offset, (*id, *bytes), base, &mut pack),
                    None => Ok(false),
                };
                if differs.map_err(wrong(&part.path))? {
                    grown += *bytes as usize;
                } else {
                    chunks::write_frame(&file, offset, *id, *bytes, &mut pack).map_err(wrong(&part.path))?;
                }
                done += u64::from(*bytes);
                if pack.len() + grown + PACK_SLACK_BYTES > PACK_BYTES_MAX {
                    sent += post(client, &mut pack).await?;
                    grown = 0;
                    say(&Said::Progress { done, total });
                }
            }
            offset += piece.bytes();
        }
    }
    if !pack.is_empty() {
        sent += post(client, &mut pack).await?;
    }
    say(&Said::Progress { done, total });
    Ok(sent)
}

fn sizes(parts: &[Part], wanted: &BTreeSet<ChunkId>) -> u64 {
    let mut left = wanted.clone();
    let chunks = parts.iter().flat_map(|part| part.saved.chunks());
    chunks.filter(|(id, _)| left.remove(id)).map(|(_, bytes)| u64::from(bytes)).sum()
}

async fn post(client: &mut Client<'_>, pack: &mut Vec<u8>) -> Result<u64, TransferError> {
    let bytes = pack.len() as u64;
    client.ask(Method::POST, "/v1/chunks", std::mem::take(pack), 4096).await?;
    Ok(bytes)
}
