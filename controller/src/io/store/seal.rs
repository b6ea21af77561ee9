//! Finds what a disk or a memory has changed: each stored value carries a checksum of itself and of its key.

use berth_protocol::rule::{Rule, kept};

/// Bytes of the checksum, ahead of the value: 2^-64 of all changes go unseen.
const SUM_BYTES: usize = 8;

fn sum(key: &str, value: &[u8]) -> [u8; SUM_BYTES] {
    let mut hasher = blake3::Hasher::new();
    // The key's length keeps key and value apart.
    hasher.update(&(key.len() as u64).to_le_bytes()).update(key.as_bytes()).update(value);
    let mut sum = [0; SUM_BYTES];
    hasher.finalize_xof().fill(&mut sum);
    sum
}

/// The value as it is stored.
pub fn seal(key: &str, value: &[u8]) -> Vec<u8> {
    [&sum(key, value)[..], value].concat()
}

/// The value that was stored under that key; none: these are not its bytes.
pub fn unseal(key: &str, stored: &[u8]) -> Option<Vec<u8>> {
    let (claimed, value) = stored.split_at_checked(SUM_BYTES)?;
    (claimed == sum(key, value) || !kept(Rule::StoreSums)).then(|| value.to_vec())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn one_bit_is_enough(key in ".{0,20}", value in prop::collection::vec(any::<u8>(), 0..200), at: prop::sample::Index, bit in 0..8u8) {
            let mut stored = seal(&key, &value);
            prop_assert_eq!(unseal(&key, &stored), Some(value));
            prop_assert_eq!(unseal(&format!("{key}/"), &stored), None, "under another key");
            let at = at.index(stored.len());
            stored[at] ^= 1 << bit;
            prop_assert_eq!(unseal(&key, &stored), None);
            stored.truncate(at);
            prop_assert_eq!(unseal(&key, &stored), None);
        }
    }
}
