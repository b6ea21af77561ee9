//! Seals secrets, and the controller's signing key, for the store with a key that is drawn from its own secret: no tool that shows records, no log and no
//! dump shows a value. Whoever has the whole store has the key as well.

use berth_protocol::hex;
use berth_protocol::ids::{Namespace, SecretName};
use berth_protocol::sign::SEED_BYTES;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use sha2::{Digest as _, Sha256};

use super::random;

/// What the key is for that is drawn from the store's secret.
const PURPOSE: &str = "berth secrets 1";

pub struct Vault {
    key: LessSafeKey,
}

/// Where the seed of the key that signs orders is kept: no secret's name has a space.
const SIGNING_KEY: &str = "signing key";

/// A value is that of its name alone.
fn place(namespace: &Namespace, name: &SecretName) -> String {
    format!("{namespace}/{name}")
}

impl Vault {
    pub fn of(secret: &[u8; 32]) -> Self {
        let key = Sha256::new().chain_update(PURPOSE).chain_update(secret).finalize();
        match UnboundKey::new(&CHACHA20_POLY1305, &key) {
            Ok(key) => Self { key: LessSafeKey::new(key) },
            // RFC 8439: any 32 bytes are a key, and only their number is checked.
            Err(_) => unreachable!("SHA-256 gives 32 bytes"),
        }
    }

    /// As text: hexadecimal digits of nonce, ciphertext and tag.
    pub fn seal(&self, namespace: &Namespace, name: &SecretName, value: &[u8]) -> std::io::Result<String> {
        self.seal_at(&place(namespace, name), value)
    }

    /// The seed of the key that signs orders.
    pub fn seal_seed(&self, seed: &[u8; SEED_BYTES]) -> std::io::Result<String> {
        self.seal_at(SIGNING_KEY, seed)
    }

    fn seal_at(&self, place: &str, value: &[u8]) -> std::io::Result<String> {
        let nonce: [u8; NONCE_LEN] = random::bytes()?;
        let (place, mut bytes) = (Aad::from(place), value.to_vec());
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), place, &mut bytes)
            .map_err(std::io::Error::other)?;
        Ok(hex::encode(&nonce) + &hex::encode(&bytes))
    }

    /// None: it was not sealed with this key, for this name.
    pub fn open(&self, namespace: &Namespace, name: &SecretName, sealed: &str) -> Option<Vec<u8>> {
        self.open_at(&place(namespace, name), sealed)
    }

    /// Likewise, of a seed.
    pub fn open_seed(&self, sealed: &str) -> Option<[u8; SEED_BYTES]> {
        self.open_at(SIGNING_KEY, sealed)?.try_into().ok()
    }

    fn open_at(&self, place: &str, sealed: &str) -> Option<Vec<u8>> {
        let bytes = hex::decode_all(sealed)?;
        let (nonce, sealed) = bytes.split_first_chunk::<NONCE_LEN>()?;
        let mut bytes = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let value = self.key.open_in_place(nonce, Aad::from(place), &mut bytes).ok()?;
        Some(value.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_read_with_its_key_under_its_name() {
        let (lab, name) = (Namespace::parse("lab").unwrap(), SecretName::parse("wandb").unwrap());
        let vault = Vault::of(&[1; 32]);
        let sealed = vault.seal(&lab, &name, b"\x00key\n").unwrap();
        assert_eq!(vault.open(&lab, &name, &sealed).as_deref(), Some(&b"\x00key\n"[..]));
        assert!(!sealed.contains("6b6579"), "the value itself");
        assert_ne!(vault.seal(&lab, &name, b"\x00key\n").unwrap(), sealed, "equal values cannot be told");
        assert_eq!(Vault::of(&[2; 32]).open(&lab, &name, &sealed), None);
        assert_eq!(vault.open(&Namespace::parse("other").unwrap(), &name, &sealed), None);
        assert_eq!(vault.open(&lab, &SecretName::parse("other").unwrap(), &sealed), None);
        let other = if sealed.ends_with('0') { "1" } else { "0" };
        for bad in ["", "00", "zz", &sealed[2..], &format!("{}{other}", &sealed[..sealed.len() - 1])] {
            assert_eq!(vault.open(&lab, &name, bad), None);
        }
        let seed = vault.seal_seed(&[7; SEED_BYTES]).unwrap();
        assert_eq!(vault.open_seed(&seed), Some([7; SEED_BYTES]));
        assert_eq!((vault.open(&lab, &name, &seed), vault.open_seed(&sealed)), (None, None));
    }
}
