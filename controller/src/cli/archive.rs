//! `berth checkpoint export|import`: a checkpoint as one file. Its first container lies where podman's archives have it, and
//! checkpointctl looks for it (`config.dump`, `spec.dump`, `checkpoint/`, `rootfs-diff.tar`); what else belongs to it is below
//! `berth/`, the manifest first, so that an import verifies every byte as it comes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use berth_protocol::chunk::{ChunkId, Encoding, FRAME_HEADER_BYTES, Frame, read_ids, write_ids};
use berth_protocol::ids::Digest;
use berth_protocol::limits::{
    CHUNK_BYTES_MAX, CHUNKS_ASKED_MAX, JOB_FILE_BYTES_MAX, MANIFEST_BYTES_MAX, PACK_BYTES_MAX,
};
use berth_protocol::manifest::{Manifest, Piece, SavedFile};
use berth_protocol::message::query::CheckpointDetail;
use serde_json::{Value, json};

use super::checkpoint::find;
use super::config::Settings;
use super::connect::Session;
use super::depot::Depot;
use super::saved_words::{Export, Import};
use super::{print_value, render};
use crate::cli::command::Format;

const MANIFEST: &str = "berth/manifest.json";
const JOB: &str = "berth/job.json";
const WORKSPACE: &str = "berth/workspace.tar.gz";
const ROOTFS_DIFF: &str = "rootfs-diff.tar";
/// Chunks asked for at once.
const AHEAD: usize = 16;
const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// A file below an overlay that its container has removed is this device in the layer above.
const WHITEOUT: (u32, u32) = (0, 0);

/// Where each file of a checkpoint lies in the archive.
fn places(manifest: &Manifest) -> BTreeMap<String, &SavedFile> {
    let mut places = BTreeMap::new();
    for (index, container) in manifest.containers.iter().enumerate() {
        let own = format!("berth/containers/{}", container.name);
        let standard = if index == 0 { String::new() } else { format!("{own}/") };
        for file in &container.dump {
            let name = &file.name;
            let at = match name.ends_with(".img") {
                true => format!("{standard}checkpoint/{name}"),
                false => format!("{own}/{name}"),
            };
            places.insert(at, file);
        }
        places.extend(container.layer.iter().map(|layer| (format!("{standard}{ROOTFS_DIFF}"), layer)));
        places.extend(container.config.iter().map(|config| (format!("{own}/{}", config.name), config)));
    }
    let volumes = manifest.volumes.iter().map(|volume| &volume.archive);
    places.extend(volumes.map(|archive| (format!("berth/volumes/{}", archive.name), archive)));
    places
}

fn checkpoint_path(id: &Digest, more: &str) -> String {
    format!("v1/checkpoints/{}{more}", id.hex())
}

/// A file of a checkpoint, out of the depot as it is read.
struct Content<'a> {
    depot: &'a Depot,
    id: Digest,
    pieces: VecDeque<Piece>,
    ready: VecDeque<Vec<u8>>,
    /// Of the first of them.
    read: usize,
    /// Of a run of zeros.
    zeros: u64,
}

impl<'a> Content<'a> {
    fn new(depot: &'a Depot, id: Digest, file: &SavedFile) -> Self {
        let pieces = file.pieces.iter().copied().collect();
        Self { depot, id, pieces, ready: VecDeque::new(), read: 0, zeros: 0 }
    }

    fn fetch(&mut self) -> io::Result<()> {
        let mut ids = Vec::new();
        while let (Some(Piece::Chunk { id, .. }), true) = (self.pieces.front(), ids.len() < AHEAD) {
            ids.push(*id);
            self.pieces.pop_front();
        }
        if ids.is_empty() {
            return Ok(());
        }
        let bound = ids.len() * (CHUNK_BYTES_MAX + FRAME_HEADER_BYTES);
        let path = checkpoint_path(&self.id, "/chunks");
        let (status, answer) = self.depot.post(&path, &write_ids(&ids), bound).map_err(io::Error::other)?;
        if status != 200 {
            return Err(io::Error::other(format!("the depot answers {status} to a question for chunks")));
        }
        let mut rest = &answer[..];
        for id in ids {
            let (frame, length) = Frame::read(rest).map_err(io::Error::other)?;
            rest = &rest[length..];
            self.ready.push_back(decode(&frame).filter(|_| frame.id == id).ok_or_else(|| {
                io::Error::other(format!("the depot's chunk {id} is not what its name says"))
            })?);
        }
        Ok(())
    }
}

fn decode(frame: &Frame) -> Option<Vec<u8>> {
    let content = match frame.encoding {
        Encoding::Raw => frame.bytes.to_vec(),
        Encoding::Zstd => zstd::bulk::decompress(frame.bytes, frame.content_bytes as usize).ok()?,
        Encoding::Xor => return None,
    };
    (ChunkId::of(&content) == frame.id).then_some(content)
}

impl Read for Content<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.zeros > 0 {
                let length = buffer.len().min(usize::try_from(self.zeros).unwrap_or(usize::MAX));
                buffer[..length].fill(0);
                self.zeros -= length as u64;
                return Ok(length);
            }
            if let Some(first) = self.ready.front() {
                let left = &first[self.read..];
                let length = left.len().min(buffer.len());
                buffer[..length].copy_from_slice(&left[..length]);
                self.read += length;
                if self.read == first.len() {
                    (self.read, _) = (0, self.ready.pop_front());
                }
                return Ok(length);
            }
            match self.pieces.front() {
                None => return Ok(0),
                Some(Piece::Zeros(length)) => {
                    self.zeros = *length;
                    self.pieces.pop_front();
                }
                Some(Piece::Chunk { .. }) => self.fetch()?,
            }
        }
    }
}

fn append(tar: &mut tar::Builder<impl Write>, path: &str, bytes: u64, content: impl Read) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes);
    header.set_mode(0o600);
    header.set_mtime(0);
    tar.append_data(&mut header, path, content)
}

/// What podman keeps of a container, as far as there is something to say.
fn config_dump(manifest: &Manifest, id: &Digest) -> Value {
    let image = manifest.template.containers.first().map(|container| container.image.as_str());
    json!({
        "id": id.hex(),
        "name": manifest.name,
        "rootfsImageName": image,
        "rootfsImageRef": manifest.containers.first().and_then(|container| container.image),
        "runtime": "runc",
        "createdTime": manifest.at.to_string(),
        "checkpointedTime": manifest.at.to_string(),
    })
}

/// The first container's OCI configuration, with the note by which checkpointctl knows whose form it is.
fn spec_dump(depot: &Depot, id: &Digest, manifest: &Manifest) -> anyhow::Result<Value> {
    let first = manifest.containers.first();
    let config = first.and_then(|first| first.config.as_ref()).filter(|file| file.bytes <= CONFIG_BYTES_MAX);
    let mut spec = match config {
        Some(file) => serde_json::from_reader(Content::new(depot, *id, file))?,
        None => json!({"ociVersion": "1.0.2", "hostname": manifest.name}),
    };
    spec["annotations"]["io.container.manager"] = json!("libpod");
    spec["annotations"]["org.criu.checkpoint.container.name"] = json!(manifest.name);
    spec["annotations"]["org.criu.checkpoint.engine.name"] = json!("berth");
    Ok(spec)
}

/// What a container has removed of its image, which podman wants as a list.
fn deleted_files(layer: impl Read) -> io::Result<Vec<String>> {
    let mut deleted = Vec::new();
    for entry in tar::Archive::new(layer).entries()? {
        let entry = entry?;
        let header = entry.header();
        let device = (header.device_major()?.unwrap_or(1), header.device_minor()?.unwrap_or(1));
        if header.entry_type().is_character_special() && device == WHITEOUT {
            let path = entry.path()?.to_string_lossy().into_owned();
            deleted.push(path.trim_start_matches('.').to_owned());
        }
    }
    Ok(deleted)
}

fn write(out: impl Write, depot: &Depot, id: &Digest, found: &CheckpointDetail) -> anyhow::Result<()> {
    let mut manifest_bytes = Vec::new();
    depot
        .get(&checkpoint_path(id, ""))?
        .take(MANIFEST_BYTES_MAX as u64 + 1)
        .read_to_end(&mut manifest_bytes)?;
    let manifest = Manifest::parse(id, &manifest_bytes)?;
    let mut tar = tar::Builder::new(out);
    let small = |tar: &mut tar::Builder<_>, path: &str, bytes: &[u8]| {
        append(tar, path, bytes.len() as u64, bytes).with_context(|| format!("cannot write {path}"))
    };
    small(&mut tar, MANIFEST, &manifest_bytes)?;
    small(&mut tar, JOB, &serde_json::to_vec(&found.spec)?)?;
    small(&mut tar, "config.dump", &serde_json::to_vec(&config_dump(&manifest, id))?)?;
    small(&mut tar, "spec.dump", &serde_json::to_vec(&spec_dump(depot, id, &manifest)?)?)?;
    if let Some(layer) = manifest.containers.first().and_then(|first| first.layer.as_ref()) {
        let deleted = deleted_files(Content::new(depot, *id, layer))?;
        small(&mut tar, "deleted.files", &serde_json::to_vec(&deleted)?)?;
    }
    if let Some(workspace) = &manifest.template.workspace {
        let mut bytes = Vec::new();
        depot.get(&format!("v1/blobs/{}", workspace.digest.hex()))?.read_to_end(&mut bytes)?;
        small(&mut tar, WORKSPACE, &bytes)?;
    }
    for (path, file) in places(&manifest) {
        append(&mut tar, &path, file.bytes, Content::new(depot, *id, file))
            .with_context(|| format!("cannot write {path}"))?;
    }
    tar.into_inner()?.flush()?;
    Ok(())
}

pub async fn export(settings: &Settings, args: Export) -> anyhow::Result<u8> {
    let mut session = Session::open(settings, Vec::new()).await?;
    let found = find(&mut session, settings, &args.checkpoint).await?;
    session.close().await;
    let access = found.depot.clone().context("the controller gives no access to its depot")?;
    let (depot, id) = (Depot::new(access, settings)?, found.row.id);
    if args.file == Path::new("-") {
        write(BufWriter::new(io::stdout().lock()), &depot, &id, &found)?;
        return Ok(0);
    }
    // Never half of one under the name that was asked for.
    let mut half = args.file.clone().into_os_string();
    half.push(".half");
    let made = File::create(&half)
        .with_context(|| format!("cannot make {}", Path::new(&half).display()))
        .and_then(|file| write(BufWriter::new(file), &depot, &id, &found))
        .and_then(|()| Ok(std::fs::rename(&half, &args.file)?));
    if made.is_err() {
        let _ = std::fs::remove_file(&half);
    }
    made?;
    eprintln!("checkpoint {} is in {}", render::short(&id), args.file.display());
    Ok(0)
}

/// Chunks on their way into the depot.
struct Sending<'a> {
    depot: &'a Depot,
    lacking: BTreeSet<ChunkId>,
    pack: Vec<u8>,
}

impl Sending<'_> {
    fn chunk(&mut self, id: ChunkId, content: &[u8]) -> anyhow::Result<()> {
        if !self.lacking.remove(&id) {
            return Ok(());
        }
        if self.pack.len() + content.len() + FRAME_HEADER_BYTES > PACK_BYTES_MAX {
            self.flush()?;
        }
        // A chunk has at most 1 MiB.
        let content_bytes = u32::try_from(content.len())?;
        Frame { id, encoding: Encoding::Raw, content_bytes, bytes: content }.write(&mut self.pack);
        Ok(())
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        if self.pack.is_empty() {
            return Ok(());
        }
        let (status, answer) = self.depot.post("v1/chunks", &self.pack, 4096)?;
        ensure!(status == 201, "the depot refuses chunks: {status} {}", String::from_utf8_lossy(&answer));
        self.pack.clear();
        Ok(())
    }

    /// Takes a file of the archive, which must be what the manifest says, byte for byte.
    fn file(&mut self, file: &SavedFile, mut content: impl Read) -> anyhow::Result<()> {
        let mut buffer = vec![0; CHUNK_BYTES_MAX];
        for piece in &file.pieces {
            let mut left = piece.bytes();
            while left > 0 {
                let part = &mut buffer[..usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_BYTES_MAX)];
                content.read_exact(part).context("it is cut off")?;
                left -= part.len() as u64;
                match piece {
                    Piece::Zeros(_) => ensure!(part.iter().all(|byte| *byte == 0), "it was altered"),
                    Piece::Chunk { id, .. } => {
                        ensure!(ChunkId::of(part) == *id, "it was altered");
                        self.chunk(*id, part)?;
                    }
                }
            }
        }
        ensure!(content.read(&mut [0])? == 0, "it is too long");
        Ok(())
    }
}

fn lacking(depot: &Depot, manifest: &Manifest) -> anyhow::Result<BTreeSet<ChunkId>> {
    let all: BTreeSet<ChunkId> = manifest.chunks().map(|(id, _)| id).collect();
    let all: Vec<ChunkId> = all.into_iter().collect();
    let mut lacking = BTreeSet::new();
    for asked in all.chunks(CHUNKS_ASKED_MAX) {
        let bound = asked.len() * ChunkId::BYTES;
        let (status, answer) = depot.post("v1/chunks/lacking", &write_ids(asked), bound)?;
        ensure!(status == 200, "the depot answers {status} to a question for what it lacks");
        lacking.extend(read_ids(&answer)?);
    }
    Ok(lacking)
}

fn read(archive: impl Read, depot: &Depot, settings: &Settings) -> anyhow::Result<(Digest, Manifest)> {
    let mut archive = tar::Archive::new(archive);
    let mut entries = archive.entries()?;
    let mut whole = |path: &str, max: usize| -> anyhow::Result<Vec<u8>> {
        let entry = entries.next().context("the archive is empty")??;
        ensure!(
            *entry.path()? == *Path::new(path),
            "this is no checkpoint that berth has exported: it does not begin with {path}"
        );
        let mut bytes = Vec::new();
        entry.take(max as u64 + 1).read_to_end(&mut bytes)?;
        ensure!(bytes.len() <= max, "{path} is larger than {max} bytes");
        Ok(bytes)
    };
    let manifest_bytes = whole(MANIFEST, MANIFEST_BYTES_MAX)?;
    let job = whole(JOB, JOB_FILE_BYTES_MAX)?;
    let id = Digest::of(&manifest_bytes);
    let manifest = Manifest::parse(&id, &manifest_bytes)?;
    if manifest.namespace != settings.namespace {
        bail!("the checkpoint is of namespace {0}: import it with `-n {0}`", manifest.namespace);
    }
    let mut places = places(&manifest);
    let mut sending = Sending { depot, lacking: lacking(depot, &manifest)?, pack: Vec::new() };
    for entry in entries {
        let entry = entry?;
        let path = entry.path()?.to_string_lossy().into_owned();
        if let Some(workspace) = manifest.template.workspace.as_ref().filter(|_| path == WORKSPACE) {
            let bytes = entry.size();
            depot.put(&workspace.digest, bytes, entry).context("the job's files")?;
        } else if let Some(file) = places.remove(&path) {
            sending.file(file, entry).with_context(|| format!("{path} in the archive"))?;
        }
    }
    if let Some(path) = places.keys().next() {
        bail!("the archive is not whole: {path} is missing");
    }
    sending.flush()?;
    let bound = ChunkId::BYTES * CHUNKS_ASKED_MAX;
    let (status, answer) = depot.put_bytes(&checkpoint_path(&id, ""), &manifest_bytes, bound)?;
    ensure!(matches!(status, 200 | 201), "the depot refuses the checkpoint: {status} {}", words(&answer));
    let (status, answer) = depot.post(&checkpoint_path(&id, "/import"), &job, 4096)?;
    ensure!(status == 201, "the controller refuses the checkpoint: {status} {}", words(&answer));
    Ok((id, manifest))
}

fn words(answer: &[u8]) -> String {
    String::from_utf8_lossy(&answer[..answer.len().min(300)]).into_owned()
}

pub async fn import(settings: &Settings, args: Import) -> anyhow::Result<u8> {
    let mut session = Session::open(settings, Vec::new()).await?;
    let depot = Depot::of(&mut session, &settings.namespace).await?;
    session.close().await;
    let (id, manifest) = if args.file == Path::new("-") {
        read(io::stdin().lock(), &depot, settings)?
    } else {
        let file = File::open(&args.file).with_context(|| format!("cannot open {}", args.file.display()))?;
        read(BufReader::new(file), &depot, settings)?
    };
    match settings.format {
        Format::Table | Format::Wide => {
            let (short, pod) = (render::short(&id), &manifest.name);
            writeln!(io::stdout(), "checkpoint {short} of pod {pod} is in the depot")?;
        }
        Format::Name => writeln!(io::stdout(), "{}", id.hex())?,
        format => print_value(format, &json!({"checkpoint": id, "pod": manifest.name}))?,
    }
    Ok(0)
}
