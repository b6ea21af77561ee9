//! What must be true of an item's bytes, looked at while they come.

use berth_protocol::ids::Digest;
use berth_protocol::log::{RecordError, read_record};
use sha2::Digest as _;

use super::{DepotError, Item};

/// What must be true of an item's bytes.
pub enum Check {
    Digest(sha2::Sha256),
    /// Bytes of the record that has not come to its end, and where it began.
    Records {
        rest: Vec<u8>,
        at: u64,
    },
}

impl Check {
    pub fn of(item: &Item) -> Self {
        match item {
            Item::Blob(_) => Check::Digest(sha2::Sha256::new()),
            Item::Log { .. } => Check::Records { rest: Vec::new(), at: 0 },
        }
    }

    pub fn update(&mut self, data: &[u8]) -> Result<(), DepotError> {
        match self {
            Check::Digest(hash) => hash.update(data),
            Check::Records { rest, at } => {
                rest.extend_from_slice(data);
                let mut read = 0;
                loop {
                    match read_record(&rest[read..]) {
                        Ok((_, bytes)) => read += bytes,
                        Err(RecordError::Torn) => break,
                        Err(source) => return Err(DepotError::NotALog { at: *at + read as u64, source }),
                    }
                }
                rest.drain(..read);
                *at += read as u64;
            }
        }
        Ok(())
    }

    pub fn finish(self, item: &Item) -> Result<(), DepotError> {
        match (self, item) {
            (Check::Digest(hash), Item::Blob(expected)) => {
                let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
                let found = Digest::parse(&format!("sha256:{hex}"));
                match found {
                    Ok(found) if found != *expected => Err(DepotError::Digest { expected: *expected, found }),
                    _ => Ok(()),
                }
            }
            (Check::Records { rest, at }, _) if !rest.is_empty() => {
                Err(DepotError::NotALog { at, source: RecordError::Torn })
            }
            _ => Ok(()),
        }
    }
}
