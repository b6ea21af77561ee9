//! Where the records are: what a user writes for it.

use std::fmt;
use std::path::{Path, PathBuf};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum StoreChoice {
    /// In the data directory.
    #[default]
    Embedded,
    Etcd(EtcdChoice),
}

/// Members of one etcd cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdChoice {
    /// `HOST:PORT` of each.
    pub members: Vec<String>,
    /// None: in plain.
    pub tls: Option<EtcdTls>,
}

/// Files in PEM: who signed the members' certificates, and what they are shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdTls {
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no store: write `embedded`, etcd://HOST:PORT with commas between several members, or with certificates \
     etcds://HOST:PORT?ca=/FILE&cert=/FILE&key=/FILE"
)]
pub struct StoreChoiceError(String);

impl StoreChoice {
    /// Of `embedded`, `etcd://HOST:PORT[,HOST:PORT…]`, or `etcds://HOST:PORT[,HOST:PORT…]?ca=FILE&cert=FILE&key=FILE`.
    pub fn parse(text: &str) -> Result<Self, StoreChoiceError> {
        if text == "embedded" {
            return Ok(Self::Embedded);
        }
        let etcd = if let Some(rest) = text.strip_prefix("etcds://") {
            rest.split_once('?').and_then(|(members, files)| {
                Some(EtcdChoice { members: parse_members(members)?, tls: Some(EtcdTls::parse(files)?) })
            })
        } else {
            let members = text.strip_prefix("etcd://").and_then(parse_members);
            members.map(|members| EtcdChoice { members, tls: None })
        };
        etcd.map(Self::Etcd).ok_or_else(|| StoreChoiceError(text.to_owned()))
    }
}

fn parse_members(text: &str) -> Option<Vec<String>> {
    let members: Vec<String> = text.split(',').map(str::to_owned).collect();
    let is_member = |member: &String| {
        member.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty()
                && !host.contains(['/', '@', '?'])
                && port.parse::<u16>().is_ok_and(|port| port > 0)
        })
    };
    members.iter().all(is_member).then_some(members)
}

impl EtcdTls {
    fn parse(text: &str) -> Option<Self> {
        let (mut ca, mut cert, mut key) = (None, None, None);
        for setting in text.split('&') {
            let (name, path) = setting.split_once('=')?;
            let place = match name {
                "ca" => &mut ca,
                "cert" => &mut cert,
                "key" => &mut key,
                _ => return None,
            };
            if !Path::new(path).is_absolute() || place.replace(PathBuf::from(path)).is_some() {
                return None;
            }
        }
        Some(Self { ca: ca?, cert: cert?, key: key? })
    }
}

impl fmt::Display for StoreChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str("embedded"),
            Self::Etcd(EtcdChoice { members, tls: None }) => write!(f, "etcd://{}", members.join(",")),
            Self::Etcd(EtcdChoice { members, tls: Some(EtcdTls { ca, cert, key }) }) => {
                let (ca, cert, key) = (ca.display(), cert.display(), key.display());
                write!(f, "etcds://{}?ca={ca}&cert={cert}&key={key}", members.join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices() {
        assert_eq!(StoreChoice::parse("embedded"), Ok(StoreChoice::Embedded));
        let three = "etcd://10.0.0.1:2379,b:2379,[::1]:2379";
        let files = "ca=/e/ca.pem&cert=/e/berth.pem&key=/e/berth.key";
        let with_tls = format!("etcds://10.0.0.1:2379,b:2379,[::1]:2379?{files}");
        for (text, has_tls) in [(three, false), (&with_tls, true)] {
            let parsed = StoreChoice::parse(text).unwrap();
            assert_eq!(parsed.to_string(), text);
            let StoreChoice::Etcd(etcd) = parsed else { panic!("{text}") };
            assert_eq!((etcd.members.len(), etcd.tls.is_some()), (3, has_tls));
        }
        for bad in [
            "",
            "etcd://",
            "etcd://a",
            "etcd://a:0",
            "etcd://a:1,",
            "etcd://a:1/x",
            "http://a:1",
            "etcd://u@a:1",
            "etcds://a:1",
            "etcds://a:1?ca=/a&cert=/b",
            "etcds://a:1?ca=/a&cert=/b&key=c",
            "etcds://a:1?ca=/a&cert=/b&key=/c&key=/d",
            "etcds://a:1?ca=/a&cert=/b&key=/c&user=x",
            &format!("etcd://a:1?{files}"),
        ] {
            assert!(StoreChoice::parse(bad).is_err(), "{bad}");
        }
    }
}
