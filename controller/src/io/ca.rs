//! The cluster's own certificate authority. Its key is drawn from the store's secret: all controllers of one store are the
//! same authority, and a backup holds it.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use berth_protocol::ids::ClusterName;
use berth_protocol::sign::{Key, PublicKey};
use berth_protocol::tls::{Credentials, Party};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ED25519, PublicKeyData, SanType, SerialNumber, SignatureAlgorithm,
    date_time_ymd,
};
use rustls::pki_types::PrivatePkcs8KeyDer;

use super::random;

/// What the keys are for that are drawn from the store's secret.
const CA: &str = "berth cluster ca 1";
const TLS: &str = "berth controller tls 1";
/// Clocks of machines differ.
const SLACK: Duration = Duration::from_secs(60 * 60);
/// Of the controller's own, made anew at each start, and of another broker's.
const OWN: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Of members', who renew it at two thirds.
pub const MEMBERS: Duration = Duration::from_secs(30 * 86_400);
const SERIAL_BYTES: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("`{0}` is neither a host's name nor an address")]
    Host(String),
    #[error("cannot draw a serial number")]
    Random(#[from] std::io::Error),
}

pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    certificate: rcgen::Certificate,
    key: PublicKey,
    /// Of the controller's own certificate.
    own: Key,
}

/// A key that a certificate is for.
struct Certified([u8; 32]);

impl PublicKeyData for Certified {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ED25519
    }
}

fn named(name: String) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

impl Ca {
    /// That of the store with this secret: the same bytes every time.
    pub fn of(secret: &[u8; 32], cluster: &ClusterName) -> Result<Self, CaError> {
        let key = Key::derived(secret, CA);
        let pair = KeyPair::try_from(&PrivatePkcs8KeyDer::from(&key.pkcs8()[..]))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named(format!("berth cluster {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        params.serial_number = Some(SerialNumber::from(1_u64));
        // Not by the clock: whoever has seen it once knows it again.
        params.not_before = date_time_ymd(2026, 1, 1);
        params.not_after = date_time_ymd(2126, 1, 1);
        let certificate = params.self_signed(&pair)?;
        let own = Key::derived(secret, TLS);
        Ok(Self { issuer: Issuer::new(params, pair), certificate, key: key.public(), own })
    }

    /// By which those who join know it.
    pub fn key(&self) -> PublicKey {
        self.key
    }

    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// What the controller shows to whoever reaches it by one of these names.
    pub fn own(&self, hosts: &[String]) -> Result<Credentials, CaError> {
        let certificate = self.certify(&Party::Controller, &self.own.public(), hosts, OWN)?;
        Ok(Credentials::new(self.certificate.der().clone(), certificate.der().clone(), &self.own))
    }

    /// For a broker that members reach by one of these names, PEM.
    pub fn broker(&self, key: &PublicKey, hosts: &[String]) -> Result<String, CaError> {
        Ok(self.certify(&Party::Broker, key, hosts, OWN)?.pem())
    }

    /// For one of the cluster's, PEM.
    pub fn member(&self, party: &Party, key: &PublicKey) -> Result<String, CaError> {
        Ok(self.certify(party, key, &[], MEMBERS)?.pem())
    }

    fn certify(
        &self,
        party: &Party,
        key: &PublicKey,
        hosts: &[String],
        validity: Duration,
    ) -> Result<rcgen::Certificate, CaError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = named(party.to_string());
        params.subject_alt_names.push(SanType::DnsName(Ia5String::try_from(party.dns_name())?));
        for host in hosts {
            params.subject_alt_names.push(match host.trim_matches(['[', ']']).parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => {
                    let name = Ia5String::try_from(host.as_str());
                    SanType::DnsName(name.map_err(|_| CaError::Host(host.clone()))?)
                }
            });
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match party {
            Party::User(_) => vec![ExtendedKeyUsagePurpose::ClientAuth],
            Party::Broker => vec![ExtendedKeyUsagePurpose::ServerAuth],
            // Nodes serve each other chunks.
            Party::Node(_) | Party::Controller => {
                vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth]
            }
        };
        params.serial_number = Some(SerialNumber::from(random::bytes::<SERIAL_BYTES>()?.to_vec()));
        let now = SystemTime::now();
        params.not_before = (now - SLACK).into();
        params.not_after = (now + validity).into();
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(&Certified(*key.bytes()), &self.issuer)?)
    }
}

/// A key as files for other programs have it, such as mosquitto_sub and curl.
pub fn key_pem(key: &Key) -> Result<String, CaError> {
    Ok(KeyPair::try_from(&PrivatePkcs8KeyDer::from(&key.pkcs8()[..]))?.serialize_pem())
}

#[cfg(test)]
mod tests {
    use berth_protocol::tls::{Peer, is_of_ca};
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject as _;

    use super::*;

    #[test]
    fn a_stores_authority_is_always_the_same_and_says_who_its_members_are() {
        let cluster = ClusterName::parse("lab").unwrap();
        let ca = Ca::of(&[1; 32], &cluster).unwrap();
        assert_eq!(Ca::of(&[1; 32], &cluster).unwrap().pem(), ca.pem());
        let der = |pem: String| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        assert!(is_of_ca(&der(ca.pem()), &ca.key()));
        assert!(!is_of_ca(&der(Ca::of(&[2; 32], &cluster).unwrap().pem()), &ca.key()));
        let (party, key) = ("user:alice".parse::<Party>().unwrap(), Key::from_seed(&[3; 32]).public());
        let certificate = der(ca.member(&party, &key).unwrap());
        assert_eq!(Peer::of(&certificate), Some(Peer { party, key }));
        assert!(!is_of_ca(&certificate, &ca.key()));
        assert!(
            ca.own(&["10.0.0.1".into(), "[::1]".into(), "ctl.example.org".into()]).unwrap().client().is_ok()
        );
        assert!(matches!(ca.own(&["bad\u{e9}".into()]), Err(CaError::Host(_))));
    }
}
