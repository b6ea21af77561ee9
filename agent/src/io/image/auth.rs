//! Owns the reading of docker's credential file (`~/.docker/config.json`, podman's `auth.json`); it contacts nobody.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use oci_client::secrets::RegistryAuth;
use serde::Deserialize;

const AUTH_FILE_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, Default, Deserialize)]
pub(super) struct AuthFile {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Debug, Default, Deserialize)]
struct Entry {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    /// Base64 of `username:password`.
    #[serde(default)]
    auth: String,
    #[serde(default, rename = "registrytoken")]
    registry_token: String,
}

impl AuthFile {
    /// Reads a credential file. Errors never repeat what is in it.
    pub fn read(path: &Path) -> io::Result<AuthFile> {
        if fs::metadata(path)?.len() > AUTH_FILE_BYTES_MAX {
            return Err(io::Error::other("it is larger than 1 MiB"));
        }
        let file = serde_json::from_slice(&fs::read(path)?);
        file.map_err(|error| io::Error::other(format!("no credential file: line {}", error.line())))
    }

    /// The credentials for a repository: of the entry that names the longest part of `host/repository`.
    pub fn credentials(&self, host: &str, repository: &str) -> RegistryAuth {
        let full = format!("{host}/{repository}");
        let covers = |key: &str| {
            let key = normal(key);
            full.strip_prefix(key)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
                .then_some(key.len())
        };
        let best = self
            .auths
            .iter()
            .filter_map(|(key, entry)| Some((covers(key)?, entry)))
            .max_by_key(|(len, _)| *len);
        best.and_then(|(_, entry)| entry.credentials()).unwrap_or(RegistryAuth::Anonymous)
    }
}

/// `https://index.docker.io/v1/` is how docker writes `docker.io`.
fn normal(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let key = key.trim_end_matches('/');
    let key = key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key);
    if matches!(key, "index.docker.io" | "registry-1.docker.io") { "docker.io" } else { key }
}

impl Entry {
    fn credentials(&self) -> Option<RegistryAuth> {
        if !self.registry_token.is_empty() {
            return Some(RegistryAuth::Bearer(self.registry_token.clone()));
        }
        if !self.username.is_empty() {
            return Some(RegistryAuth::Basic(self.username.clone(), self.password.clone()));
        }
        let decoded = String::from_utf8(base64(&self.auth)?).ok()?;
        let (username, password) = decoded.split_once(':')?;
        // docker pads with zero bytes in old files.
        Some(RegistryAuth::Basic(username.to_owned(), password.trim_end_matches('\0').to_owned()))
    }
}

/// Standard base64 (RFC 4648), padded or not.
pub(super) fn base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut count) = (0_u32, 0);
    for digit in text.trim_end_matches('=').bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_entry_wins() {
        let file: AuthFile = serde_json::from_str(
            r#"{"auths":{"https://index.docker.io/v1/":{"auth":"dXNlcjpwYTpzcw=="},
                "r.example:5000":{"username":"a","password":"b"},"r.example:5000/team":{"auth":"YzpkAAA="},
                "t.example":{"registrytoken":"tok"},"bad.example":{"auth":"!"},"empty.example":{}},
                "credsStore":"desktop"}"#,
        )
        .unwrap();
        let basic = |name: &str, password: &str| RegistryAuth::Basic(name.into(), password.into());
        assert_eq!(file.credentials("docker.io", "library/python"), basic("user", "pa:ss"));
        assert_eq!(file.credentials("r.example:5000", "x"), basic("a", "b"));
        assert_eq!(file.credentials("r.example:5000", "team/x"), basic("c", "d"));
        assert_eq!(file.credentials("r.example:5000", "teams/x"), basic("a", "b"));
        assert_eq!(file.credentials("t.example", "x"), RegistryAuth::Bearer("tok".into()));
        for host in ["bad.example", "empty.example", "r.example", "r.example:50001"] {
            assert_eq!(file.credentials(host, "x"), RegistryAuth::Anonymous, "{host}");
        }
    }
}
