//! TLS between berth's programs, by rustls: version 1.3, certificates of the cluster's own CA at both ends. Who an end is, a
//! DNS name of its certificate says; the certificate's key is the one that signs the end's messages.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};
use serde::{Deserialize, Serialize};
use webpki::EndEntityCert;

use crate::ids::{IdError, NodeId, UserName};
use crate::sign::{Key, PublicKey};

/// `.internal` is nobody's in the public DNS, for good. Nothing resolves these names.
const ZONE: &str = "berth.internal";
const CONTROLLER: &str = "controller.berth.internal";
const BROKER: &str = "broker.berth.internal";

/// Who a certificate is for. As text, and as a certificate's common name, which brokers take for a user's name:
/// `berth:controller`, `berth:broker`, a node's name alone, `user:NAME`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Party {
    Controller,
    /// One that is not the controller's own.
    Broker,
    Node(NodeId),
    User(UserName),
}

impl Party {
    /// By which its certificate says who it is.
    pub fn dns_name(&self) -> String {
        match self {
            Self::Controller => CONTROLLER.to_owned(),
            Self::Broker => BROKER.to_owned(),
            Self::Node(node) => format!("{node}.node.{ZONE}"),
            Self::User(user) => format!("{user}.user.{ZONE}"),
        }
    }

    fn from_dns_name(name: &str) -> Option<Self> {
        match name {
            CONTROLLER => return Some(Self::Controller),
            BROKER => return Some(Self::Broker),
            _ => {}
        }
        let (name, kind) = name.strip_suffix(ZONE)?.strip_suffix('.')?.split_once('.')?;
        match kind {
            "node" => NodeId::parse(name).ok().map(Self::Node),
            "user" => UserName::parse(name).ok().map(Self::User),
            _ => None,
        }
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Controller => f.write_str("berth:controller"),
            Self::Broker => f.write_str("berth:broker"),
            Self::Node(node) => f.write_str(node.as_str()),
            Self::User(user) => write!(f, "user:{user}"),
        }
    }
}

impl FromStr for Party {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        match text.strip_prefix("user:") {
            _ if text == "berth:controller" => Ok(Self::Controller),
            _ if text == "berth:broker" => Ok(Self::Broker),
            Some(user) => UserName::parse(user).map(Self::User),
            None => NodeId::parse(text).map(Self::Node),
        }
    }
}

impl TryFrom<String> for Party {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<Party> for String {
    fn from(party: Party) -> String {
        party.to_string()
    }
}

/// The other end of a connection, as its certificate says. The certificate is the cluster's: rustls has seen to that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub party: Party,
    pub key: PublicKey,
}

impl Peer {
    /// Whose certificate it is; none: nobody's of berth's.
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let certificate = EndEntityCert::try_from(certificate).ok()?;
        let key = PublicKey::from_spki(&certificate.subject_public_key_info())?;
        let party = certificate.valid_dns_names().find_map(Party::from_dns_name)?;
        Some(Self { party, key })
    }
}

/// What an end shows, and by what it knows the other.
#[derive(Debug)]
pub struct Credentials {
    ca: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

/// Who may connect to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clients {
    /// Those with a certificate of the cluster's.
    Known,
    /// Others too: what they may do is another question.
    Any,
}

impl Credentials {
    pub fn new(ca: CertificateDer<'static>, certificate: CertificateDer<'static>, key: &Key) -> Self {
        Self { ca, certificate, key: key.pkcs8().to_vec().into() }
    }

    /// # Errors
    /// The certificates are none, or not this key's.
    pub fn client(&self) -> Result<Arc<ClientConfig>, Error> {
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots(&self.ca)?)
            .with_client_auth_cert(vec![self.certificate.clone()], self.key.clone_key().into())?;
        Ok(Arc::new(config))
    }

    /// # Errors
    /// As `client`.
    pub fn server(&self, clients: Clients) -> Result<Arc<ServerConfig>, Error> {
        let verifier = WebPkiClientVerifier::builder_with_provider(roots(&self.ca)?.into(), provider());
        let verifier = match clients {
            Clients::Known => verifier,
            Clients::Any => verifier.allow_unauthenticated(),
        };
        let verifier = verifier.build().map_err(|error| Error::General(error.to_string()))?;
        let config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            // With the CA's, by which one that joins knows it.
            .with_single_cert(vec![self.certificate.clone(), self.ca.clone()], self.key.clone_key().into())?;
        Ok(Arc::new(config))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(ca: &CertificateDer<'static>) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone())?;
    Ok(roots)
}

/// For a client that shows nothing, towards servers of this CA.
///
/// # Errors
/// It is no certificate.
pub fn trusting(ca: &CertificateDer<'static>) -> Result<Arc<ClientConfig>, Error> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots(ca)?)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Is this the certificate of the CA with that key?
pub fn is_of_ca(certificate: &CertificateDer<'_>, ca: &PublicKey) -> bool {
    let anchor = webpki::anchor_from_trusted_cert(certificate);
    // A trust anchor has what is within the SubjectPublicKeyInfo's outermost sequence.
    anchor.is_ok_and(|anchor| anchor.subject_public_key_info.as_ref() == &ca.spki()[2..])
}

/// For one that has no certificates yet and knows the CA by its key alone.
///
/// # Errors
/// None that depends on `ca`.
pub fn joining(ca: PublicKey) -> Result<Arc<ClientConfig>, Error> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { ca, provider: provider() }))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Takes a chain whose last certificate is that of the CA with this key, and checks it as any other.
#[derive(Debug)]
struct Pinned {
    ca: PublicKey,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let ca = intermediates.iter().find(|certificate| is_of_ca(certificate, &self.ca));
        let ca = ca.ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let roots = roots(&ca.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(roots.into(), self.provider.clone())
            .build()
            .map_err(|error| Error::General(error.to_string()))?
            .verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parties_have_one_name_each() {
        let all = [
            (Party::Controller, "berth:controller", "controller.berth.internal"),
            (Party::Broker, "berth:broker", "broker.berth.internal"),
            (
                Party::Node(NodeId::parse("controller").unwrap()),
                "controller",
                "controller.node.berth.internal",
            ),
            (Party::User(UserName::parse("al-1").unwrap()), "user:al-1", "al-1.user.berth.internal"),
        ];
        for (party, name, dns) in all {
            assert_eq!(party.to_string(), name);
            assert_eq!(name.parse::<Party>().unwrap(), party);
            assert_eq!(party.dns_name(), dns);
            assert_eq!(Party::from_dns_name(dns), Some(party));
        }
        for bad in ["a1.berth.internal", "a.b.node.berth.internal", "#.node.berth.internal", "a1.node.evil"] {
            assert_eq!(Party::from_dns_name(bad), None, "{bad}");
        }
        for bad in ["user:", "user:#", "a+", "berth:other", ""] {
            assert!(bad.parse::<Party>().is_err(), "{bad}");
        }
    }
}
