//! Owns the talk with one registry: where it is asked for an image, with which credentials, and how a download
//! goes on after its connection was cut.

use std::fs::File;
use std::io::{Seek, Write};
use std::time::Duration;

use berth_protocol::chain::chain;
use berth_protocol::image::{is_host, is_loopback};
use futures_util::StreamExt;
use oci_client::Reference;
use oci_client::client::{BlobResponse, Client, ClientConfig, ClientProtocol};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::secrets::RegistryAuth;

use super::auth::AuthFile;
use super::digest::Digester;
use super::error::clip;
use super::manifest::DOCUMENT_BYTES_MAX;
use super::{Digest, ImageError, RegistryConfig, RegistryName};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Silence after which a connection counts as cut.
const SILENCE_MAX: Duration = Duration::from_secs(30);
const DOCUMENT_TIME_MAX: Duration = Duration::from_secs(120);
/// Attempts in a row that got (next to) nothing; the pauses between them double.
const FRUITLESS_ATTEMPTS_MAX: u32 = 5;
const FRUITFUL_BYTES_MIN: u64 = 64 << 10;
const RETRY_PAUSE_FIRST: Duration = Duration::from_millis(250);
const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// One address at which an image may be had.
pub(super) struct Endpoint {
    /// What messages call it: `host` or `http://host`.
    pub name: String,
    /// The next endpoint is the same registry by an unsafer way: only for when this one cannot be reached.
    pub next_is_plain: bool,
    image: String,
    client: Client,
    reference: Reference,
    auth: RegistryAuth,
}

/// The addresses to try for `image`, in order: its mirrors, then its registry; in https, then, where allowed, http.
pub(super) fn endpoints(image: &RegistryName, config: &RegistryConfig) -> Result<Vec<Endpoint>, ImageError> {
    let failed = |why: String| ImageError::Failed { image: image.to_string(), why };
    let auth = match &config.auth_file {
        Some(path) => {
            AuthFile::read(path).map_err(|error| failed(format!("auth file {}: {error}", path.display())))?
        }
        None => AuthFile::default(),
    };
    let mut endpoints = Vec::new();
    for mirror in config.mirrors.get(&image.registry).into_iter().flatten() {
        let (plain, address) = match mirror.split_once("://") {
            Some(("https", address)) => (false, address),
            Some(("http", address)) => (true, address),
            _ => {
                return Err(failed(format!(
                    "mirror \"{mirror}\" of {} is not an http(s) URL",
                    image.registry
                )));
            }
        };
        let address = address.trim_end_matches('/');
        let (host, prefix) = address.split_once('/').unwrap_or((address, ""));
        if !is_host(host) {
            return Err(failed(format!("mirror \"{mirror}\" of {} has no valid host", image.registry)));
        }
        let repository = if prefix.is_empty() {
            image.repository.clone()
        } else {
            format!("{prefix}/{}", image.repository)
        };
        endpoints.push(Endpoint::new(image, host, &repository, plain, &auth)?);
    }
    endpoints.push(Endpoint::new(image, &image.registry, &image.repository, false, &auth)?);
    if is_loopback(&image.registry) || config.insecure.contains(&image.registry) {
        if let Some(safe) = endpoints.last_mut() {
            safe.next_is_plain = true;
        }
        endpoints.push(Endpoint::new(image, &image.registry, &image.repository, true, &auth)?);
    }
    Ok(endpoints)
}

impl Endpoint {
    fn new(
        image: &RegistryName,
        host: &str,
        repository: &str,
        plain: bool,
        auth: &AuthFile,
    ) -> Result<Endpoint, ImageError> {
        let (host, repository) = (host.to_owned(), repository.to_owned());
        let config = ClientConfig {
            protocol: if plain { ClientProtocol::Http } else { ClientProtocol::Https },
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(SILENCE_MAX),
            user_agent: concat!("berth-agent/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        // An error says that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::try_from(config).map_err(|error| ImageError::Failed {
            image: image.to_string(),
            why: format!("no http client: {}", clip(&chain(&error))),
        })?;
        Ok(Endpoint {
            name: if plain { format!("http://{host}") } else { host.clone() },
            next_is_plain: false,
            image: image.to_string(),
            client,
            auth: auth.credentials(&host, &repository),
            reference: match (&image.digest, &image.tag) {
                (Some(digest), _) => Reference::with_digest(host, repository, digest.to_string()),
                (None, tag) => Reference::with_tag(host, repository, tag.clone().unwrap_or_default()),
            },
        })
    }

    /// A manifest or index: the one with `digest`, or what the image's name means now.
    pub async fn document(&self, digest: Option<&Digest>) -> Result<Vec<u8>, ImageError> {
        let reference = match digest {
            Some(digest) => self.reference.clone_with_digest(digest.to_string()),
            None => self.reference.clone(),
        };
        self.read(&reference).await
    }

    /// The manifest or index with another tag, beside the image; none where there is none.
    pub async fn beside(&self, tag: String) -> Result<Option<Vec<u8>>, ImageError> {
        let own = &self.reference;
        let reference = Reference::with_tag(own.registry().to_owned(), own.repository().to_owned(), tag);
        match self.read(&reference).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(ImageError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn read(&self, reference: &Reference) -> Result<Vec<u8>, ImageError> {
        let pull = self.client.pull_manifest_raw(reference, &self.auth, &ACCEPTED);
        let answer = tokio::time::timeout(DOCUMENT_TIME_MAX, pull).await;
        let (bytes, _) = answer
            .map_err(|_| self.unreachable("its manifest took too long"))?
            .map_err(|error| self.error(&error))?;
        if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
            return Err(ImageError::malformed(&self.image, "its manifest is larger than 4 MiB"));
        }
        Ok(bytes.to_vec())
    }

    /// Downloads a blob of `size` bytes into `file` and verifies its digest. `moved` hears of each piece, as a
    /// number of bytes that is negative where a download has to begin anew.
    pub async fn blob(
        &self,
        digest: &Digest,
        size: u64,
        file: &mut File,
        mut moved: impl FnMut(i64),
    ) -> Result<(), ImageError> {
        self.client.store_auth_if_needed(self.reference.resolve_registry(), &self.auth).await;
        let mut download = Download { size, have: 0, digester: Digester::default() };
        let (mut fruitless, mut resumed, mut anew) = (0, false, false);
        loop {
            let before = download.have;
            let result = self.attempt(digest, &mut download, file, &mut moved).await;
            if result.is_ok() && download.have == size {
                let actual = std::mem::take(&mut download.digester).finish();
                if actual == *digest {
                    return Ok(());
                }
                // A registry that gets ranges wrong deserves one chance without.
                if resumed && !anew {
                    (anew, resumed) = (true, false);
                    self.restart(&mut download, file, &mut moved)?;
                    continue;
                }
                return Err(ImageError::DigestMismatch {
                    what: format!("a blob of {} from {}", self.image, self.name),
                    expected: digest.to_string(),
                    actual: actual.to_string(),
                });
            }
            let error = match result {
                Ok(()) => self.unreachable("the connection was cut"),
                Err(error @ ImageError::Unreachable { .. }) => error,
                Err(error) => return Err(error),
            };
            fruitless =
                if download.have >= before.saturating_add(FRUITFUL_BYTES_MIN) { 0 } else { fruitless + 1 };
            if fruitless >= FRUITLESS_ATTEMPTS_MAX {
                return Err(error);
            }
            resumed |= download.have > 0;
            tokio::time::sleep(RETRY_PAUSE_FIRST * (1 << fruitless)).await;
        }
    }

    /// One connection's worth of a blob.
    async fn attempt(
        &self,
        digest: &Digest,
        download: &mut Download,
        file: &mut File,
        moved: &mut impl FnMut(i64),
    ) -> Result<(), ImageError> {
        let digest = digest.to_string();
        let answer =
            self.client.pull_blob_stream_partial(&self.reference, digest.as_str(), download.have, None).await;
        let mut stream = match answer.map_err(|error| self.error(&error))? {
            BlobResponse::Partial(stream) => stream,
            BlobResponse::Full(stream) => {
                if download.have > 0 {
                    self.restart(download, file, moved)?;
                }
                stream
            }
        };
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|error| self.unreachable(clip(&chain(&error))))?;
            if piece.len() as u64 > download.size - download.have {
                return Err(ImageError::malformed(&self.image, "a blob is longer than its manifest says"));
            }
            // Straight to the page cache: this process has nothing else to do meanwhile.
            file.write_all(&piece).map_err(|error| self.disk(&error))?;
            download.digester.update(&piece);
            download.have += piece.len() as u64;
            moved(piece.len() as i64);
        }
        Ok(())
    }

    fn restart(
        &self,
        download: &mut Download,
        file: &mut File,
        moved: &mut impl FnMut(i64),
    ) -> Result<(), ImageError> {
        file.rewind().and_then(|()| file.set_len(0)).map_err(|error| self.disk(&error))?;
        moved(-(download.have as i64));
        *download = Download { size: download.size, have: 0, digester: Digester::default() };
        Ok(())
    }

    fn disk(&self, error: &std::io::Error) -> ImageError {
        ImageError::disk(&self.image, std::path::Path::new("the image store"), error)
    }

    fn unreachable(&self, why: impl Into<String>) -> ImageError {
        ImageError::Unreachable { image: self.image.clone(), registry: self.name.clone(), why: why.into() }
    }

    fn error(&self, error: &OciDistributionError) -> ImageError {
        let not_found = |why: &str| ImageError::NotFound {
            image: self.image.clone(),
            why: format!("{} says: {}", self.name, clip(why)),
        };
        let unauthorized = |why: String| ImageError::Unauthorized {
            image: self.image.clone(),
            registry: self.name.clone(),
            why,
        };
        let credentials = match self.auth {
            RegistryAuth::Anonymous => "no credentials were sent",
            _ => "the credentials were not accepted",
        };
        match error {
            OciDistributionError::UnauthorizedError { .. }
            | OciDistributionError::AuthenticationFailure(_) => unauthorized(credentials.to_owned()),
            OciDistributionError::ServerError { code: 404, message, .. } => not_found(message),
            OciDistributionError::ServerError { code: 401 | 403, .. } => unauthorized(credentials.to_owned()),
            OciDistributionError::ServerError { code, message, .. } => {
                self.unreachable(format!("it answers {code} {}", clip(message)))
            }
            OciDistributionError::RegistryError { envelope, .. } => {
                let text = clip(&envelope.to_string());
                match envelope.errors.first().map(|error| &error.code) {
                    Some(
                        OciErrorCode::ManifestUnknown
                        | OciErrorCode::NameUnknown
                        | OciErrorCode::NameInvalid
                        | OciErrorCode::NotFound
                        | OciErrorCode::BlobUnknown
                        | OciErrorCode::ManifestBlobUnknown,
                    ) => not_found(&text),
                    Some(OciErrorCode::Unauthorized | OciErrorCode::Denied) => {
                        unauthorized(format!("{credentials}: {text}"))
                    }
                    _ => self.unreachable(text),
                }
            }
            OciDistributionError::DigestError(oci_client::errors::DigestError::VerificationError {
                expected,
                actual,
            }) => ImageError::DigestMismatch {
                what: format!("the manifest of {} from {}", self.image, self.name),
                expected: clip(expected),
                actual: clip(actual),
            },
            error => self.unreachable(clip(&chain(error))),
        }
    }
}

/// How much of a blob is there.
struct Download {
    size: u64,
    have: u64,
    digester: Digester,
}
