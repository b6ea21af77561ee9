//! What a checkpoint is made of: a document, addressed by the digest of its bytes, that names everything needed to
//! start the pod again, and each byte of that by chunks.
//!
//! `Manifest::parse` alone makes one from bytes: what it returns is within its bounds, and its files' names cannot
//! leave the directory that they are written into.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::checkpoint::{CheckpointKind, Needs};
use crate::chunk::{ChunkError, ChunkId};
use crate::ids::{ContainerName, Digest, Epoch, Namespace, NodeId, PodId, PodName, Run, VolumeName};
use crate::job::PodTemplate;
use crate::limits::{
    CHUNK_BYTES_MAX, CONTAINERS_PER_POD_MAX, HUMAN_MESSAGE_BYTES_MAX, IMAGE_FILES_MAX, IMAGE_NAME_BYTES_MAX,
    JOB_LIST_MAX, MANIFEST_BYTES_MAX, MEMORY_BYTES_MAX,
};
use crate::units::Timestamp;

/// The form that this program writes and reads.
pub const MANIFEST_VERSION: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("the manifest is {bytes} bytes long, at most {MANIFEST_BYTES_MAX} are allowed")]
    TooLarge { bytes: usize },
    #[error("the manifest's digest is {found}, not {expected}")]
    Digest { expected: Digest, found: Digest },
    #[error("the manifest cannot be read: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error("the manifest is of version {0}, this program reads version {MANIFEST_VERSION}")]
    Version(u32),
    #[error("the manifest has more {what} than {max}")]
    TooMany { what: &'static str, max: usize },
    #[error("`{0}` is no name for a file of a checkpoint")]
    Name(String),
    #[error("`{0}` is there twice")]
    Twice(String),
    #[error("the pieces of `{name}` are {found} bytes, not {expected}")]
    Length { name: String, expected: u64, found: u64 },
    #[error("what the checkpoint needs is out of bounds")]
    Needs,
}

/// A saved pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Manifest {
    pub version: u32,
    pub namespace: Namespace,
    pub name: PodName,
    pub pod: PodId,
    pub epoch: Epoch,
    pub run: Run,
    pub at: Timestamp,
    pub kind: CheckpointKind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// Of the template as the controller sent it.
    pub spec: Digest,
    pub template: PodTemplate,
    /// Records of the epoch's log when its processes stood.
    pub log_records: u64,
    pub needs: Needs,
    /// Of the programs that had a hand in it, for people: `agent`, `criu`, `kernel`, `gpuDriver`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub versions: BTreeMap<String, String>,
    pub containers: Vec<SavedContainer>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<SavedVolume>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SavedContainer {
    pub name: ContainerName,
    /// What it was made from: restoring pulls this very image, wherever its tag points by then. None: the node's own
    /// root file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Digest>,
    /// The files of CRIU's directory; none of a cooperative checkpoint.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dump: Vec<SavedFile>,
    /// The OCI configuration it ran with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<SavedFile>,
    /// What it wrote on top of its image: a tar archive with extended attributes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<SavedFile>,
    /// What restoring must know of the place it was taken in, such as the numbers of namespaces and pipes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub notes: BTreeMap<String, String>,
}

/// A named volume, or a scratch one by its mount: a tar archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SavedVolume {
    pub mount: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<VolumeName>,
    pub archive: SavedFile,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SavedFile {
    /// Letters, digits, `.`, `-` and `_`; not beginning with a dot.
    pub name: String,
    pub bytes: u64,
    /// From its first byte to its last.
    pub pieces: Vec<Piece>,
}

/// A part of a file; written `{64 hex digits} {bytes}`, or `- {bytes}` where it is all zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Piece {
    Zeros(u64),
    Chunk {
        id: ChunkId,
        /// At most `CHUNK_BYTES_MAX`.
        bytes: u32,
    },
}

/// Why a text is not a piece.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PieceError {
    #[error("`{0}` is not a piece: expected a digest or `-`, and a number of bytes")]
    Form(String),
    #[error(transparent)]
    Id(#[from] ChunkError),
}

impl Piece {
    pub fn bytes(&self) -> u64 {
        match self {
            Piece::Zeros(bytes) => *bytes,
            Piece::Chunk { bytes, .. } => u64::from(*bytes),
        }
    }
}

impl TryFrom<String> for Piece {
    type Error = PieceError;

    fn try_from(text: String) -> Result<Self, PieceError> {
        let bad = || PieceError::Form(text.chars().take(80).collect());
        let (id, bytes) = text.split_once(' ').ok_or_else(bad)?;
        if bytes.starts_with(['0', '+']) {
            return Err(bad());
        }
        if id == "-" {
            let bytes = bytes.parse().ok().filter(|bytes| *bytes <= MEMORY_BYTES_MAX);
            return bytes.map(Piece::Zeros).ok_or_else(bad);
        }
        let bytes = bytes.parse().ok().filter(|bytes| *bytes as usize <= CHUNK_BYTES_MAX).ok_or_else(bad)?;
        Ok(Piece::Chunk { id: ChunkId::parse(id)?, bytes })
    }
}

impl From<Piece> for String {
    fn from(piece: Piece) -> String {
        piece.to_string()
    }
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Piece::Zeros(bytes) => write!(f, "- {bytes}"),
            Piece::Chunk { id, bytes } => write!(f, "{id} {bytes}"),
        }
    }
}

impl SavedFile {
    fn check(&self) -> Result<(), ManifestError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let named = !self.name.is_empty()
            && self.name.len() <= IMAGE_NAME_BYTES_MAX
            && !self.name.starts_with('.')
            && self.name.bytes().all(plain);
        if !named {
            return Err(ManifestError::Name(self.name.chars().take(80).collect()));
        }
        let found = self.pieces.iter().fold(0_u64, |sum, piece| sum.saturating_add(piece.bytes()));
        if found == self.bytes {
            Ok(())
        } else {
            Err(ManifestError::Length { name: self.name.clone(), expected: self.bytes, found })
        }
    }

    /// The chunks that it is made of, in their order.
    pub fn chunks(&self) -> impl Iterator<Item = (ChunkId, u32)> + '_ {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Chunk { id, bytes } => Some((*id, *bytes)),
            Piece::Zeros(_) => None,
        })
    }
}

impl SavedContainer {
    pub fn files(&self) -> impl Iterator<Item = &SavedFile> {
        self.dump.iter().chain(&self.config).chain(&self.layer)
    }
}

impl Manifest {
    /// Reads the bytes whose digest is `id`.
    ///
    /// # Errors
    /// They are others', no manifest, or one out of bounds.
    pub fn parse(id: &Digest, bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLarge { bytes: bytes.len() });
        }
        let found = Digest::of(bytes);
        if found != *id {
            return Err(ManifestError::Digest { expected: *id, found });
        }
        let manifest: Self = serde_json::from_slice(bytes)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Its bytes and their digest: its name.
    ///
    /// # Errors
    /// It is out of bounds.
    pub fn render(&self) -> Result<(Digest, Vec<u8>), ManifestError> {
        self.check()?;
        let bytes = serde_json::to_vec(self)?;
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLarge { bytes: bytes.len() });
        }
        Ok((Digest::of(&bytes), bytes))
    }

    fn check(&self) -> Result<(), ManifestError> {
        if self.version != MANIFEST_VERSION {
            return Err(ManifestError::Version(self.version));
        }
        if !self.needs.is_bounded() {
            return Err(ManifestError::Needs);
        }
        at_most("containers", self.containers.len(), CONTAINERS_PER_POD_MAX)?;
        at_most("volumes", self.volumes.len(), JOB_LIST_MAX)?;
        check_notes(&self.versions)?;
        let mut names = BTreeSet::new();
        for container in &self.containers {
            at_most("files", container.dump.len(), IMAGE_FILES_MAX)?;
            check_notes(&container.notes)?;
            container.files().try_for_each(SavedFile::check)?;
            if !names.insert(&container.name) {
                return Err(ManifestError::Twice(container.name.to_string()));
            }
            let mut files = BTreeSet::new();
            if let Some(twice) = container.dump.iter().find(|file| !files.insert(&file.name)) {
                return Err(ManifestError::Twice(twice.name.clone()));
            }
        }
        let mut mounts = BTreeSet::new();
        for volume in &self.volumes {
            volume.archive.check()?;
            if !mounts.insert(&volume.mount) {
                return Err(ManifestError::Twice(volume.mount.chars().take(80).collect()));
            }
        }
        Ok(())
    }

    pub fn files(&self) -> impl Iterator<Item = &SavedFile> {
        let volumes = self.volumes.iter().map(|volume| &volume.archive);
        self.containers.iter().flat_map(SavedContainer::files).chain(volumes)
    }

    /// Every chunk named, as often as it is.
    pub fn chunks(&self) -> impl Iterator<Item = (ChunkId, u32)> + '_ {
        self.files().flat_map(SavedFile::chunks)
    }

    /// Of all that it names, without zeros.
    pub fn bytes(&self) -> u64 {
        self.chunks().map(|(_, bytes)| u64::from(bytes)).sum()
    }
}

fn at_most(what: &'static str, found: usize, max: usize) -> Result<(), ManifestError> {
    if found > max { Err(ManifestError::TooMany { what, max }) } else { Ok(()) }
}

fn check_notes(notes: &BTreeMap<String, String>) -> Result<(), ManifestError> {
    at_most("notes", notes.len(), JOB_LIST_MAX)?;
    let long = notes
        .iter()
        .any(|(key, value)| key.len() > IMAGE_NAME_BYTES_MAX || value.len() > HUMAN_MESSAGE_BYTES_MAX);
    if long {
        Err(ManifestError::TooMany { what: "bytes in a note", max: HUMAN_MESSAGE_BYTES_MAX })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{JobName, JobUid};
    use crate::job;
    use proptest::prelude::*;

    fn template() -> PodTemplate {
        job::parse(b"image: docker.io/library/busybox\nname: counter\ncommand: [sh]\n", None)
            .unwrap()
            .spec
            .pod
    }

    fn manifest(files: Vec<SavedFile>) -> Manifest {
        let name = JobName::parse("counter").unwrap();
        Manifest {
            version: MANIFEST_VERSION,
            namespace: Namespace::default_namespace(),
            name: name.pod(0),
            pod: JobUid::parse("abc").unwrap().pod(0),
            epoch: Epoch(3),
            run: Run(1),
            at: Timestamp(1_700_000_000_000),
            kind: CheckpointKind::Criu,
            node: NodeId::parse("n1").ok(),
            spec: Digest::of(b"spec"),
            template: template(),
            log_records: 17,
            needs: Needs { arch: "x86_64".to_owned(), ..Needs::default() },
            versions: [("criu".to_owned(), "4.1.1".to_owned())].into(),
            containers: vec![SavedContainer {
                name: ContainerName::parse("main").unwrap(),
                image: Some(Digest::of(b"image")),
                dump: files,
                config: None,
                layer: None,
                notes: BTreeMap::new(),
            }],
            volumes: Vec::new(),
        }
    }

    fn file(name: &str, pieces: Vec<Piece>) -> SavedFile {
        let bytes = pieces.iter().map(Piece::bytes).sum();
        SavedFile { name: name.to_owned(), bytes, pieces }
    }

    fn pieces() -> impl Strategy<Value = Vec<Piece>> {
        let chunk = (any::<[u8; 32]>(), 1..=CHUNK_BYTES_MAX as u32)
            .prop_map(|(id, bytes)| Piece::Chunk { id: ChunkId::from_bytes(id), bytes });
        proptest::collection::vec(prop_oneof![chunk, (1..1_u64 << 40).prop_map(Piece::Zeros)], 0..20)
    }

    proptest! {
        #[test]
        fn it_goes_to_bytes_and_back(all in proptest::collection::vec(pieces(), 0..5)) {
            let files = all.into_iter().enumerate().map(|(n, pieces)| file(&format!("pages-{n}.img"), pieces));
            let manifest = manifest(files.collect());
            let (id, bytes) = manifest.render().unwrap();
            prop_assert_eq!(Manifest::parse(&id, &bytes).unwrap(), manifest);
        }

        #[test]
        fn an_altered_one_is_refused(at: prop::sample::Index, bit in 0..8_u8) {
            let (id, mut bytes) = manifest(vec![file("a.img", vec![Piece::Zeros(7)])]).render().unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            let error = Manifest::parse(&id, &bytes).unwrap_err();
            let seen = matches!(error, ManifestError::Digest { .. });
            prop_assert!(seen, "{}", error);
            // Nor does one that says its own digest panic.
            let _ = Manifest::parse(&Digest::of(&bytes), &bytes);
        }

        #[test]
        fn whatever_reads_as_a_piece_is_written_the_same(text in "(-|[0-9a-f]{64})? ?[0-9+-]{0,9}") {
            if let Ok(piece) = Piece::try_from(text.clone()) {
                prop_assert_eq!(piece.to_string(), text);
            }
        }
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        let zeros = |bytes| vec![Piece::Zeros(bytes)];
        for name in ["", "..", ".hidden", "a/b", "/etc/passwd", "a b", "a\0", &"x".repeat(129)] {
            let error = manifest(vec![file(name, zeros(1))]).render().unwrap_err();
            assert!(matches!(error, ManifestError::Name(_)), "{name}: {error}");
        }
        let twice = manifest(vec![file("a", zeros(1)), file("a", zeros(2))]).render();
        assert!(matches!(twice, Err(ManifestError::Twice(_))));
        let short = SavedFile { bytes: 5, ..file("a", zeros(4)) };
        assert!(matches!(manifest(vec![short]).render(), Err(ManifestError::Length { .. })));
        let mut later = manifest(Vec::new());
        later.version = 2;
        assert!(matches!(later.render(), Err(ManifestError::Version(2))));
        let mut unfit = manifest(Vec::new());
        unfit.needs.arch = "x".repeat(1000);
        assert!(matches!(unfit.render(), Err(ManifestError::Needs)));
        for text in
            ["- 0", "- 01", "- -1", "-", "- 9999999999999999", "0a 5", &format!("{} 1048577", "a".repeat(64))]
        {
            assert!(Piece::try_from(text.to_owned()).is_err(), "{text}");
        }
    }
}
