//! Where the broker is: `mqtts://[user:password@]host[:port][,host[:port]…]`, several where any member of a cluster will
//! do; `mqtt://` without TLS.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// MQTT's own.
const PORT: u16 = 1883;
const TLS_PORT: u16 = 8883;
const HOSTS_MAX: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerUrlError {
    #[error("`{0}` is not a broker's URL: write mqtt://HOST[:PORT]")]
    NoUrl(String),
    #[error("`{0}` is not spoken here: write mqtt://HOST[:PORT]")]
    Scheme(String),
    #[error("`{0}` is not a port: write a number up to 65535")]
    Port(String),
    #[error("`{0}` names no host: write mqtt://HOST[:PORT]")]
    Host(String),
    #[error("{0} brokers are named, at most {HOSTS_MAX} are allowed")]
    TooMany(usize),
}

#[derive(Clone, PartialEq, Eq)]
pub struct BrokerUrl {
    /// At least one.
    hosts: Vec<(String, u16)>,
    login: Option<(String, String)>,
    tls: bool,
}

impl BrokerUrl {
    /// Without TLS.
    pub fn new(address: SocketAddr) -> Self {
        Self { hosts: vec![(address.ip().to_string(), address.port())], login: None, tls: false }
    }

    pub fn parse(text: &str) -> Result<Self, BrokerUrlError> {
        let (rest, tls) = match text.split_once("://") {
            Some(("mqtt" | "tcp", rest)) => (rest, false),
            Some(("mqtts" | "ssl", rest)) => (rest, true),
            Some((scheme, _)) => return Err(BrokerUrlError::Scheme(shorten(scheme))),
            None => return Err(BrokerUrlError::NoUrl(shorten(text))),
        };
        let rest = rest.trim_end_matches('/');
        let (login, addresses) = match rest.rsplit_once('@') {
            Some((login, addresses)) => (Some(login.split_once(':').unwrap_or((login, ""))), addresses),
            None => (None, rest),
        };
        let hosts: Vec<_> =
            addresses.split(',').map(|address| host(address, text, tls)).collect::<Result<_, _>>()?;
        if hosts.len() > HOSTS_MAX {
            return Err(BrokerUrlError::TooMany(hosts.len()));
        }
        Ok(Self { hosts, login: login.map(|(user, word)| (user.into(), word.into())), tls })
    }

    pub fn is_tls(&self) -> bool {
        self.tls
    }

    pub fn hosts(&self) -> &[(String, u16)] {
        &self.hosts
    }

    /// Whom to try after so many attempts.
    pub fn host(&self, attempt: usize) -> &(String, u16) {
        &self.hosts[attempt % self.hosts.len()]
    }

    /// How a client of that name calls itself after so many attempts: to a cluster, otherwise each time. What its members
    /// undo of a connection that one of them had they undo late, and by the client's id.
    pub fn client_id(&self, name: &str, attempt: usize) -> String {
        if attempt == 0 || self.hosts.len() == 1 { name.to_owned() } else { format!("{name}.{attempt}") }
    }

    /// Name and password.
    pub fn login(&self) -> Option<&(String, String)> {
        self.login.as_ref()
    }
}

fn host(address: &str, text: &str, tls: bool) -> Result<(String, u16), BrokerUrlError> {
    // The colon that begins a port lies behind an IPv6 address' bracket.
    let (host, port) = match address.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => {
            (host, port.parse().map_err(|_| BrokerUrlError::Port(shorten(port)))?)
        }
        _ => (address, if tls { TLS_PORT } else { PORT }),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let fits = match inner {
        Some(inner) => inner.parse::<Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.chars().all(plain),
    };
    if fits { Ok((inner.unwrap_or(host).to_owned(), port)) } else { Err(BrokerUrlError::Host(shorten(text))) }
}

fn shorten(text: &str) -> String {
    text.chars().take(200).collect()
}

impl Default for BrokerUrl {
    /// On loopback.
    fn default() -> Self {
        Self { hosts: vec![("127.0.0.1".to_owned(), PORT)], login: None, tls: false }
    }
}

impl FromStr for BrokerUrl {
    type Err = BrokerUrlError;

    fn from_str(text: &str) -> Result<Self, BrokerUrlError> {
        Self::parse(text)
    }
}

impl fmt::Display for BrokerUrl {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls { "mqtts://" } else { "mqtt://" })?;
        for (n, (host, port)) in self.hosts.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            match host.contains(':') {
                true => write!(f, "{comma}[{host}]:{port}")?,
                false => write!(f, "{comma}{host}:{port}")?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let bad = |words: &str| Err(words.to_owned());
        for (text, want) in [
            ("mqtt://h", Ok("mqtt://h:1883".to_owned())),
            ("mqtt://h:7/", Ok("mqtt://h:7".to_owned())),
            ("tcp://10.0.0.1:1", Ok("mqtt://10.0.0.1:1".to_owned())),
            ("mqtt://user:a@b@h", Ok("mqtt://h:1883".to_owned())),
            ("mqtt://[::1]", Ok("mqtt://[::1]:1883".to_owned())),
            ("mqtt://a:1,b,[::1]:9", Ok("mqtt://a:1,b:1883,[::1]:9".to_owned())),
            ("", bad("`` is not a broker's URL: write mqtt://HOST[:PORT]")),
            ("h:1883", bad("`h:1883` is not a broker's URL: write mqtt://HOST[:PORT]")),
            ("http://h", bad("`http` is not spoken here: write mqtt://HOST[:PORT]")),
            ("mqtts://user:word@h", Ok("mqtts://h:8883".to_owned())),
            ("mqtt://", bad("`mqtt://` names no host: write mqtt://HOST[:PORT]")),
            ("mqtt://a,", bad("`mqtt://a,` names no host: write mqtt://HOST[:PORT]")),
            ("mqtt://:1", bad("`mqtt://:1` names no host: write mqtt://HOST[:PORT]")),
            ("mqtt://[x]:1", bad("`mqtt://[x]:1` names no host: write mqtt://HOST[:PORT]")),
            ("mqtt://a b", bad("`mqtt://a b` names no host: write mqtt://HOST[:PORT]")),
            ("mqtt://h:x", bad("`x` is not a port: write a number up to 65535")),
            ("mqtt://h:70000", bad("`70000` is not a port: write a number up to 65535")),
        ] {
            let got = BrokerUrl::parse(text).map(|url| url.to_string()).map_err(|error| error.to_string());
            assert_eq!(got, want, "{text}");
        }
        let many = format!("mqtt://{}", ["h"; HOSTS_MAX + 1].join(","));
        assert_eq!(BrokerUrl::parse(&many), Err(BrokerUrlError::TooMany(HOSTS_MAX + 1)));
        let login = BrokerUrl::parse("mqtt://user:a@b@h").unwrap().login().cloned();
        assert_eq!(login, Some(("user".into(), "a@b".into())));
    }

    #[test]
    fn one_after_the_other() {
        let url = BrokerUrl::parse("mqtt://a:1,b:2").unwrap();
        let tried: Vec<u16> = (0..5).map(|attempt| url.host(attempt).1).collect();
        assert_eq!(tried, [1, 2, 1, 2, 1]);
        let ids = [0, 1, 2].map(|attempt| url.client_id("n", attempt));
        assert_eq!(ids, ["n", "n.1", "n.2"]);
        assert_eq!(BrokerUrl::default().client_id("n", 7), "n");
    }
}
