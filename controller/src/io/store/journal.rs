//! Transactions larger than what a store takes at once: written down whole first, then carried out in parts.

use super::Op;

/// Operations as bytes: for each its key's length, its key, its value's length or `u32::MAX` for none, its value.
pub fn encode(ops: &[Op]) -> Vec<u8> {
    fn part(bytes: &mut Vec<u8>, part: &[u8]) {
        // Keys and values are far shorter than 4 GiB: packets are at most 96 KiB.
        bytes.extend((part.len() as u32).to_le_bytes());
        bytes.extend(part);
    }
    let mut bytes = Vec::new();
    for op in ops {
        match op {
            Op::Put { key, value } => {
                part(&mut bytes, key.as_bytes());
                part(&mut bytes, value);
            }
            Op::Delete { key } => {
                part(&mut bytes, key.as_bytes());
                bytes.extend(u32::MAX.to_le_bytes());
            }
        }
    }
    bytes
}

/// None: they are not such bytes.
pub fn decode(mut bytes: &[u8]) -> Option<Vec<Op>> {
    fn length(bytes: &mut &[u8]) -> Option<u32> {
        let (head, rest) = bytes.split_first_chunk()?;
        *bytes = rest;
        Some(u32::from_le_bytes(*head))
    }
    fn take<'a>(bytes: &mut &'a [u8], length: u32) -> Option<&'a [u8]> {
        let (head, rest) = bytes.split_at_checked(length as usize)?;
        *bytes = rest;
        Some(head)
    }
    let mut ops = Vec::new();
    while !bytes.is_empty() {
        let key = length(&mut bytes)?;
        let key = std::str::from_utf8(take(&mut bytes, key)?).ok()?.to_owned();
        ops.push(match length(&mut bytes)? {
            u32::MAX => Op::Delete { key },
            length => Op::Put { key, value: take(&mut bytes, length)?.to_vec() },
        });
    }
    Some(ops)
}

/// The operations in runs of at most `count`, whose keys and values take at most `bytes` together; one that takes more
/// is alone.
pub fn chunks(ops: Vec<Op>, count: usize, bytes: usize) -> Vec<Vec<Op>> {
    let size = |op: &Op| match op {
        Op::Put { key, value } => key.len() + value.len(),
        Op::Delete { key } => key.len(),
    };
    let mut chunks: Vec<Vec<Op>> = Vec::new();
    let mut filled = 0;
    for op in ops {
        match chunks.last_mut() {
            Some(chunk) if chunk.len() < count && filled + size(&op) <= bytes => {
                filled += size(&op);
                chunk.push(op);
            }
            _ => {
                filled = size(&op);
                chunks.push(vec![op]);
            }
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (".{0,9}", prop::collection::vec(any::<u8>(), 0..50))
                .prop_map(|(key, value)| Op::Put { key, value }),
            ".{0,9}".prop_map(|key| Op::Delete { key }),
        ]
    }

    proptest! {
        #[test]
        fn what_was_written_down_is_read(ops in prop::collection::vec(op(), 0..20), cut: prop::sample::Index) {
            let bytes = encode(&ops);
            prop_assert_eq!(decode(&bytes), Some(ops.clone()));
            let part = decode(&bytes[..cut.index(bytes.len() + 1)]);
            prop_assert!(part.is_none_or(|part| ops.starts_with(&part)), "never something else");
        }

        #[test]
        fn nothing_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            if let Some(ops) = decode(&bytes) {
                prop_assert_eq!(encode(&ops), bytes);
            }
        }

        #[test]
        fn chunks_hold_everything_within_their_bounds(ops in prop::collection::vec(op(), 0..60)) {
            let chunks = chunks(ops.clone(), 7, 100);
            prop_assert!(chunks.iter().all(|chunk| chunk.len() <= 7 && (chunk.len() == 1 || encode(chunk).len() <= 100 + 8 * 7)));
            prop_assert_eq!(chunks.concat(), ops);
        }
    }
}
