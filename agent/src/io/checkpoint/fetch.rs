//! A checkpoint out of the depot: what this node has of it already is linked, the rest fetched; every byte is verified
//! before it gets the name by which a shim would use it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use berth_protocol::checkpoint::CheckpointKind;
use berth_protocol::chunk::{ChunkId, FRAME_HEADER_BYTES, Frame, write_ids};
use berth_protocol::ids::{Digest, PodId};
use berth_protocol::job::PodTemplate;
use berth_protocol::limits::{CHUNK_BYTES_MAX, CHUNKS_FETCHED_MAX, MANIFEST_BYTES_MAX};
use berth_protocol::manifest::{Manifest, Piece, SavedFile};
use hyper::Method;

use super::http::Client;
use super::store::{MANIFEST, WORKSPACE};
use super::{Fetch, Said, TransferError, chunks, say, verify};
use crate::shim::checkpoint::Parts;
use crate::task::{Saved, file};

/// Kept checkpoints in which chunks are looked for: each has a manifest to read.
const HELD_LOOKED_AT_MAX: usize = 64;

/// Of a process whose work nothing waits for.
const KEEP_NICE: libc::c_int = 10;

/// Where a chunk goes, or lies.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub path: PathBuf,
    pub offset: u64,
    pub bytes: u32,
}

pub async fn fetch(order: &Fetch) -> Result<(), TransferError> {
    let mut client = Client::new(&order.access, order.rate);
    let cached = order.cache.join(order.checkpoint.hex());
    if order.keep.is_some() {
        if order.dir.is_dir() {
            return Ok(());
        }
        // Whatever is for a pod that waits goes first.
        // SAFETY: no pointers.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, KEEP_NICE) };
    }
    let (manifest, bytes) = manifest(&mut client, &order.checkpoint, &cached).await?;
    is_of(&manifest, &order.template, &order.images)?;
    let half = match &order.keep {
        // Two that share it may be on their way here.
        Some(pod) => order.dir.with_extension(pod.to_string()),
        None => order.dir.with_extension("half"),
    };
    let wrong = |e| TransferError::io(format!("cannot write below {}", half.display()))(e);
    let files = places(&manifest, &order.template.volumes, &Parts::new(half.clone()))?;
    let mut wanted: BTreeMap<ChunkId, Vec<Place>> = BTreeMap::new();
    let kept = kept(&order.cache, &manifest.pod);
    for (path, saved) in &files {
        // What an earlier try or an earlier checkpoint of this node has left counts, where it is right.
        make_parent(path).map_err(wrong)?;
        if let Ok(name) = path.strip_prefix(&half) {
            if link(&cached.join(name), path, saved) {
                continue;
            }
            // Never written through another name of it.
            if fs::metadata(path).is_ok_and(|file| file.nlink() > 1) {
                fs::remove_file(path).map_err(wrong)?;
            }
            if order.keep.is_none() && !path.exists() {
                take_over(&kept, &manifest.pod, name, path, saved).map_err(wrong)?;
            }
        }
        for part in chunks::begin(path, saved).map_err(wrong)? {
            let Some(id) = part.chunk else { continue };
            let place = Place { path: path.clone(), offset: part.offset, bytes: part.bytes };
            wanted.entry(id).or_default().push(place);
        }
    }
    let total: u64 = wanted.values().filter_map(|places| Some(u64::from(places.first()?.bytes))).sum();
    let mut done = 0;
    for (id, part) in held(&kept, &wanted) {
        if let Some(content) = chunks::read_chunk(&part.path, part.offset, id, part.bytes) {
            done += content.len() as u64;
            put(&content, &wanted[&id]).map_err(wrong)?;
            wanted.remove(&id);
        }
    }
    say(&Said::Progress { done, total });
    let ids: Vec<ChunkId> = wanted.keys().copied().collect();
    let path = format!("/v1/checkpoints/{}/chunks", order.checkpoint.hex());
    let mut peer = order.access.peer.as_deref().map(|access| Client::new(access, order.rate));
    for asked in ids.chunks(CHUNKS_FETCHED_MAX / 4) {
        let brought = match &mut peer {
            Some(client) => bring(client, &path, asked, &wanted).await,
            None => bring(&mut client, &path, asked, &wanted).await,
        };
        done += match brought {
            // Whatever a node that should have them said instead: the depot has them.
            Err(_) if peer.take().is_some() => bring(&mut client, &path, asked, &wanted).await?,
            brought => brought?,
        };
        say(&Said::Progress { done, total });
    }
    if let Some(pod) = &order.keep {
        if order.dir.is_dir() {
            return fs::remove_dir_all(&half).map_err(wrong);
        }
        // Each chunk of it is verified when it is used.
        fs::write(half.join(MANIFEST), bytes).map_err(wrong)?;
        super::name(&half, pod).map_err(wrong)?;
        fs::rename(&half, &order.dir).map_err(wrong)?;
        super::keep_newest(&order.cache);
        return Ok(());
    }
    approve(&manifest, &half, &order.template)?;
    give(&half, &order.dir).map_err(wrong)
}

/// What a restore goes by, whatever the digests say.
pub(super) fn approve(manifest: &Manifest, half: &Path, template: &PodTemplate) -> Result<(), TransferError> {
    let parts = Parts::new(half.to_owned());
    is_as_said(manifest, &parts)?;
    for container in &template.containers {
        if parts.images(&container.name).is_dir() || manifest.kind == CheckpointKind::Criu {
            verify::verify(&parts.images(&container.name), container)?;
        }
    }
    Ok(())
}

/// Gives a whole checkpoint the name by which a shim uses it.
pub(super) fn give(half: &Path, dir: &Path) -> io::Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    fs::rename(half, dir)
}

/// Fetches chunks to all their places; returns how many bytes they are.
async fn bring(
    client: &mut Client<'_>,
    path: &str,
    asked: &[ChunkId],
    wanted: &BTreeMap<ChunkId, Vec<Place>>,
) -> Result<u64, TransferError> {
    let bound = asked.len() * (CHUNK_BYTES_MAX + FRAME_HEADER_BYTES);
    let answer = client.ask(Method::POST, path, write_ids(asked), bound).await?;
    let (mut rest, mut done) = (&answer[..], 0);
    for id in asked {
        let content = Frame::read(rest).ok().and_then(|(frame, length)| {
            rest = &rest[length..];
            chunks::read_frame(&frame).filter(|_| frame.id == *id)
        });
        let broken = || TransferError::Unfit(format!("the depot's chunk {id} is not what its name says"));
        let content = content.ok_or_else(broken)?;
        done += content.len() as u64;
        put(&content, &wanted[id]).map_err(TransferError::io("cannot write a chunk"))?;
    }
    Ok(done)
}

/// The manifest, and the bytes that its digest is of.
async fn manifest(
    client: &mut Client<'_>,
    id: &Digest,
    cached: &Path,
) -> Result<(Manifest, Vec<u8>), TransferError> {
    if let Ok(bytes) = fs::read(cached.join(MANIFEST))
        && let Ok(manifest) = Manifest::parse(id, &bytes)
    {
        return Ok((manifest, bytes));
    }
    let path = format!("/v1/checkpoints/{}", id.hex());
    let bytes = client.ask(Method::GET, &path, Vec::new(), MANIFEST_BYTES_MAX).await?;
    match Manifest::parse(id, &bytes) {
        Ok(manifest) => Ok((manifest, bytes.into())),
        Err(error) => Err(TransferError::Unfit(format!("the checkpoint is refused: {error}"))),
    }
}

/// A checkpoint that this node keeps, with the files that its manifest names.
pub(super) struct Kept {
    pub(super) dir: PathBuf,
    manifest: Manifest,
}

impl Kept {
    pub(super) fn read(dir: PathBuf) -> Option<Self> {
        let id = Digest::parse(&format!("sha256:{}", dir.file_name()?.to_str()?)).ok()?;
        let manifest = Manifest::parse(&id, &fs::read(dir.join(MANIFEST)).ok()?).ok()?;
        Some(Self { dir, manifest })
    }

    /// The pod's last one.
    pub(super) fn of(cache: &Path, pod: &PodId) -> Option<Self> {
        let dirs = fs::read_dir(cache).into_iter().flatten().flatten().map(|dir| dir.path());
        dirs.filter(|dir| super::named(dir).as_ref() == Some(pod)).find_map(Self::read)
    }

    pub(super) fn files(&self) -> Vec<(PathBuf, &SavedFile)> {
        let parts = Parts::new(self.dir.clone());
        places(&self.manifest, &self.manifest.template.volumes, &parts).unwrap_or_default()
    }
}

/// All that this node keeps, the pod's own first: they have most of what it needs.
fn kept(cache: &Path, pod: &PodId) -> Vec<Kept> {
    let mut dirs: Vec<PathBuf> =
        fs::read_dir(cache).into_iter().flatten().flatten().map(|dir| dir.path()).collect();
    dirs.sort_by_cached_key(|dir| super::named(dir).as_ref() != Some(pod));
    dirs.into_iter().take(HELD_LOOKED_AT_MAX).filter_map(Kept::read).collect()
}

/// Where this node has chunks that are wanted: most of a pod's memory is as it was in its checkpoint before. What is
/// found is still to be held against its name.
pub(super) fn held<T>(kept: &[Kept], wanted: &BTreeMap<ChunkId, T>) -> BTreeMap<ChunkId, Place> {
    let mut found = BTreeMap::new();
    if wanted.is_empty() {
        return found;
    }
    for (path, saved) in kept.iter().flat_map(Kept::files) {
        let mut offset = 0;
        for piece in &saved.pieces {
            if let Piece::Chunk { id, bytes } = piece
                && wanted.contains_key(id)
            {
                found.entry(*id).or_insert_with(|| Place { path: path.clone(), offset, bytes: *bytes });
            }
            offset += piece.bytes();
        }
    }
    found
}

/// Makes the file `name` of the pod's earlier checkpoint that of this one, where most of it is in its place already: what
/// differs is then written over. A GiB that is renamed leaves no GiB to write back, behind which everything else waits.
fn take_over(kept: &[Kept], pod: &PodId, name: &Path, path: &Path, saved: &SavedFile) -> io::Result<()> {
    let most =
        |(_, earlier): &(PathBuf, &SavedFile)| chunks::bytes_in_place(earlier, saved) > saved.bytes / 2;
    for kept in kept.iter().filter(|kept| kept.manifest.pod == *pod) {
        let from = kept.dir.join(name);
        let Some((from, _)) = kept.files().into_iter().find(|(file, _)| *file == from).filter(most) else {
            continue;
        };
        // Another name of it may be in use.
        if !fs::metadata(&from).is_ok_and(|file| file.nlink() == 1) {
            continue;
        }
        // It is no checkpoint any more.
        match fs::remove_file(kept.dir.join(MANIFEST)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => return fs::rename(from, path),
        }
    }
    Ok(())
}

fn put(content: &[u8], places: &[Place]) -> io::Result<()> {
    places.iter().try_for_each(|place| {
        File::options().write(true).open(&place.path)?.write_all_at(content, place.offset)
    })
}

/// The checkpoint must be of the very pod that is to come: nothing in it says what may be mounted or who may run.
pub(super) fn is_of(
    manifest: &Manifest,
    ours: &PodTemplate,
    images: &[Option<Digest>],
) -> Result<(), TransferError> {
    let theirs = &manifest.template;
    if [&manifest.namespace, &theirs.namespace].iter().any(|namespace| **namespace != ours.namespace) {
        return Err(TransferError::Unfit("the checkpoint is refused: it is of another namespace".into()));
    }
    let names = manifest.containers.iter().map(|container| &container.name);
    let same = theirs.containers == ours.containers
        && theirs.volumes == ours.volumes
        && theirs.network == ours.network
        && theirs.workspace == ours.workspace
        && names.eq(ours.containers.iter().map(|container| &container.name));
    let images = manifest.containers.iter().map(|container| container.image).zip(images);
    if let Some((theirs, ours)) = images.filter_map(|(a, b)| Some((a?, (*b)?))).find(|(a, b)| a != b) {
        let why =
            format!("the checkpoint is refused: it is of image {theirs}, and here the tag means {ours}");
        return Err(TransferError::Unfit(why));
    }
    if same {
        return Ok(());
    }
    Err(TransferError::Unfit(
        "the checkpoint is refused: it is of another job than this, or of an older form of it".into(),
    ))
}

/// What its shim said of it is what a restore goes by.
fn is_as_said(manifest: &Manifest, parts: &Parts) -> Result<(), TransferError> {
    let saved: Option<Saved> =
        fs::read(parts.saved()).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let same = saved.is_some_and(|saved| {
        saved.kind == manifest.kind && saved.at == manifest.at && saved.log_records == manifest.log_records
    });
    match same {
        true => Ok(()),
        false => Err(TransferError::Unfit(
            "the checkpoint is refused: what its supervisor said of it is missing, or of another one".into(),
        )),
    }
}

/// Every file of the manifest, and where it goes.
pub(super) fn places<'a>(
    manifest: &'a Manifest,
    volumes: &[berth_protocol::job::Volume],
    parts: &Parts,
) -> Result<Vec<(PathBuf, &'a SavedFile)>, TransferError> {
    let mut all = Vec::new();
    for container in &manifest.containers {
        for file in &container.dump {
            let path = match file.name.as_str() {
                WORKSPACE => parts.workspace(&container.name),
                file::SAVED => parts.saved(),
                file::KEPT => parts.kept(),
                name => parts.images(&container.name).join(name),
            };
            all.push((path, file));
        }
        all.extend(container.config.iter().map(|config| (parts.config(&container.name), config)));
        all.extend(container.layer.iter().map(|layer| (parts.upper(&container.name), layer)));
    }
    for volume in &manifest.volumes {
        let index = volumes.iter().position(|own| own.mount == volume.mount);
        let index = index.ok_or_else(|| TransferError::Unfit(format!("no volume is at {}", volume.mount)))?;
        all.push((parts.volume(index), &volume.archive));
    }
    Ok(all)
}

/// Links `earlier` to `path` if it is what it should be.
pub(super) fn link(earlier: &Path, path: &Path, saved: &SavedFile) -> bool {
    let linked = || -> io::Result<()> {
        let _ = fs::remove_file(path);
        fs::hard_link(earlier, path)
    };
    chunks::is_same(earlier, saved) && linked().is_ok()
}

pub(super) fn make_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => fs::DirBuilder::new().recursive(true).mode(0o700).create(parent),
        None => Ok(()),
    }
}
