//! Everything that is read from outside, as functions of any bytes: none may panic, or break what it promises. libFuzzer
//! drives them (`tests/fuzz`), and so does a test of every run, with the seeds and what is drawn from them.

mod cores;
mod disk;
mod job_file;
mod wire;

pub use cores::{agent, controller, store};
pub use disk::{config, criu, image, ledger, log, policy, shim};
pub use job_file::job_file;
pub use wire::wire;

/// A target: what it is called, and what it does with bytes.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: [Target; 12] = [
    ("job_file", job_file),
    ("wire", wire),
    ("agent", agent),
    ("controller", controller),
    ("store", store),
    ("ledger", ledger),
    ("shim", shim),
    ("log", log),
    ("image", image),
    ("criu", criu),
    ("config", config),
    ("policy", policy),
];

/// What comes of seeds: bits flipped, parts left out, doubled, taken from another, numbers that are at an edge.
pub fn mutate(rng: &mut fastrand::Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    const EDGES: [&[u8]; 8] =
        [b"0", b"-1", b"18446744073709551615", b"4294967296", b"null", b"[]", b"{}", b"\"\\u0000\""];
    let any = |rng: &mut fastrand::Rng| seeds[rng.usize(..seeds.len())].clone();
    let mut bytes = any(rng);
    for _ in 0..rng.usize(1..6) {
        let at = rng.usize(..=bytes.len());
        let end = rng.usize(at..=bytes.len().min(at + 64));
        match rng.u8(0..8) {
            0 | 1 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << rng.u8(0..8);
                }
            }
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            5 => {
                let other = any(rng);
                let from = rng.usize(..=other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            6 => {
                // The number, or the word, that stands there.
                let word = |byte: &u8| byte.is_ascii_alphanumeric();
                let begin = bytes[..at].iter().rposition(|byte| !word(byte)).map_or(0, |found| found + 1);
                let end =
                    bytes[at..].iter().position(|byte| !word(byte)).map_or(bytes.len(), |found| at + found);
                bytes.splice(begin..end, EDGES[rng.usize(..EDGES.len())].iter().copied());
            }
            _ => bytes
                .splice(at..at, std::iter::repeat_with(|| rng.u8(..)).take(3).collect::<Vec<u8>>())
                .for_each(drop),
        }
    }
    bytes
}
