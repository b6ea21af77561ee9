//! The words that open a depot's door, or a node's that serves chunks: what they allow and until when, signed with a
//! secret. The depot's is the controller's own; a node draws its own and tells the controller, which makes tokens with
//! it for other nodes. Only this module makes and reads them.
//!
//! A token is `{scope}~{expires}~{mac}`: scope as `node.NAME`, `ns.NAME`, `view.NAME`, `save.NAMESPACE.POD.EPOCH` or `load.DIGITS`, expiry in milliseconds since 1970, and
//! HMAC-SHA-256 (RFC 2104) over the two in hexadecimal. It is fit for an HTTP header.

use crate::hex;
use crate::ids::{Digest, Epoch, Namespace, NodeId, PodId};
use crate::units::Timestamp;
use sha2::{Digest as _, Sha256};

/// What a token allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// An agent: brings logs and outputs, fetches workspaces.
    Node(NodeId),
    /// A user: brings workspaces, fetches logs and outputs, brings and fetches checkpoints.
    Namespace(Namespace),
    /// A user: fetches what `Namespace` may.
    View(Namespace),
    /// Whoever transfers one pod's checkpoint: chunks of its namespace, and manifests of this epoch.
    Save { namespace: Namespace, pod: PodId, epoch: Epoch },
    /// Whoever fetches one checkpoint.
    Load { checkpoint: Digest },
}

/// Why a token opens nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("the token is not one of this controller's")]
    Malformed,
    #[error("the token's signature is not this controller's: ask for a new one")]
    Forged,
    #[error("the token has expired at {expires}: ask for a new one")]
    Expired { expires: Timestamp },
}

/// SHA-256's block, the length that HMAC pads its key to.
const BLOCK_BYTES: usize = 64;

fn hmac(secret: &[u8; 32], text: &[u8]) -> [u8; 32] {
    let mut key = [0; BLOCK_BYTES];
    key[..secret.len()].copy_from_slice(secret);
    let inner = Sha256::new().chain_update(key.map(|b| b ^ 0x36)).chain_update(text).finalize();
    Sha256::new().chain_update(key.map(|b| b ^ 0x5c)).chain_update(inner).finalize().into()
}

/// In time that depends on the lengths alone.
fn equal(a: &[u8], b: &[u8]) -> bool {
    let difference = a.iter().zip(b).fold(0, |sum, (a, b)| sum | (a ^ b));
    a.len() == b.len() && std::hint::black_box(difference) == 0
}

/// Makes a token for `scope`, good until `expires`.
pub fn mint(secret: &[u8; 32], scope: &Scope, expires: Timestamp) -> String {
    let claim = match scope {
        Scope::Node(node) => format!("node.{node}~{}", expires.0),
        Scope::Namespace(namespace) => format!("ns.{namespace}~{}", expires.0),
        Scope::View(namespace) => format!("view.{namespace}~{}", expires.0),
        Scope::Save { namespace, pod, epoch } => format!("save.{namespace}.{pod}.{epoch}~{}", expires.0),
        Scope::Load { checkpoint } => format!("load.{}~{}", checkpoint.hex(), expires.0),
    };
    let mac = hex::encode(&hmac(secret, claim.as_bytes()));
    format!("{claim}~{mac}")
}

/// Reads a token that somebody showed.
pub fn verify(secret: &[u8; 32], token: &str, now: Timestamp) -> Result<Scope, TokenError> {
    let (claim, mac) = token.rsplit_once('~').ok_or(TokenError::Malformed)?;
    let (scope, expires) = claim.split_once('~').ok_or(TokenError::Malformed)?;
    let (kind, name) = scope.split_once('.').ok_or(TokenError::Malformed)?;
    let expires = Timestamp(expires.parse().map_err(|_| TokenError::Malformed)?);
    let scope = match kind {
        "node" => NodeId::parse(name).map(Scope::Node),
        "ns" => Namespace::parse(name).map(Scope::Namespace),
        "view" => Namespace::parse(name).map(Scope::View),
        "load" => Digest::parse(&format!("sha256:{name}")).map(|checkpoint| Scope::Load { checkpoint }),
        "save" => {
            let [namespace, pod, epoch] = name.split('.').collect::<Vec<_>>()[..] else {
                return Err(TokenError::Malformed);
            };
            let epoch = Epoch(epoch.parse().map_err(|_| TokenError::Malformed)?);
            let namespace = Namespace::parse(namespace).map_err(|_| TokenError::Malformed)?;
            PodId::parse(pod).map(|pod| Scope::Save { namespace, pod, epoch })
        }
        _ => return Err(TokenError::Malformed),
    };
    let scope = scope.map_err(|_| TokenError::Malformed)?;
    if !equal(hex::encode(&hmac(secret, claim.as_bytes())).as_bytes(), mac.as_bytes()) {
        return Err(TokenError::Forged);
    }
    if now >= expires {
        return Err(TokenError::Expired { expires });
    }
    Ok(scope)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node() -> Scope {
        Scope::Node(NodeId::parse("n1").unwrap())
    }

    #[test]
    fn hmac_matches_an_independent_implementation() {
        // python3: hmac.new(bytes(range(32)), b"node.n1~1000", "sha256").hexdigest()
        let secret = std::array::from_fn(|i| u8::try_from(i).unwrap());
        assert_eq!(
            hex::encode(&hmac(&secret, b"node.n1~1000")),
            "ec93aeb2ff1a2fbadc33b57f884b5cdaf09f24456a8f0c1eaaf6e455a734dc5f"
        );
    }

    #[test]
    fn tokens_open_until_they_expire_and_for_one_secret() {
        let token = mint(&[7; 32], &node(), Timestamp(1000));
        assert_eq!(verify(&[7; 32], &token, Timestamp(999)), Ok(node()));
        assert_eq!(
            verify(&[7; 32], &token, Timestamp(1000)),
            Err(TokenError::Expired { expires: Timestamp(1000) })
        );
        assert_eq!(verify(&[8; 32], &token, Timestamp(999)), Err(TokenError::Forged));
        let other = token.replace("node.n1", "ns.n1");
        assert_eq!(verify(&[7; 32], &other, Timestamp(999)), Err(TokenError::Forged));
        let longer = token.replace("~1000~", "~9000~");
        assert_eq!(verify(&[7; 32], &longer, Timestamp(999)), Err(TokenError::Forged));
    }

    #[test]
    fn every_scope_is_read_as_it_was_written() {
        let pod = PodId::parse("abc-3").unwrap();
        let scopes = [
            node(),
            Scope::Namespace(Namespace::default_namespace()),
            Scope::Save { namespace: Namespace::default_namespace(), pod, epoch: Epoch(7) },
            Scope::Load { checkpoint: Digest::of(b"x") },
        ];
        for scope in scopes {
            let token = mint(&[7; 32], &scope, Timestamp(1000));
            assert_eq!(verify(&[7; 32], &token, Timestamp(1)), Ok(scope));
        }
    }

    proptest! {
        #[test]
        fn no_text_opens_the_door(text in "(node\\.n1~[0-9]{1,4}~)?[0-9a-f~.]{0,80}") {
            prop_assert!(verify(&[7; 32], &text, Timestamp(0)).is_err());
        }
    }
}
