//! What the embedded broker says of a request on its way to the controller: whose certificate the connection has that it
//! came on, and where that comes from. So whoever has a certificate needs no signature besides, with any MQTT client.
//!
//! It stands before the payload, behind a secret of this process: nothing that comes from outside can look like it.

use std::net::IpAddr;

use berth_protocol::hex;
use berth_protocol::sign::PublicKey;

/// Knows its own words.
#[derive(Debug, Clone)]
pub struct Voucher {
    secret: String,
}

impl Voucher {
    pub fn new(secret: String) -> Self {
        Self { secret }
    }

    pub fn vouch(&self, key: &PublicKey, from: IpAddr, payload: &[u8]) -> Vec<u8> {
        let mut vouched = format!("{} {} {from}\n", self.secret, hex::encode(key.bytes())).into_bytes();
        vouched.extend_from_slice(payload);
        vouched
    }

    /// None: nobody has vouched for it.
    pub fn read<'a>(&self, vouched: &'a [u8]) -> Option<(PublicKey, IpAddr, &'a [u8])> {
        let line = vouched.iter().position(|byte| *byte == b'\n')?;
        let (words, payload) = (std::str::from_utf8(&vouched[..line]).ok()?, &vouched[line + 1..]);
        let mut words = words.strip_prefix(&self.secret)?.strip_prefix(' ')?.split(' ');
        let (key, from) = (PublicKey::from_bytes(hex::decode(words.next()?)?), words.next()?.parse().ok()?);
        words.next().is_none().then_some((key, from, payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_process_vouches() {
        let (own, key) = (Voucher::new("5ec4e7".to_owned()), PublicKey::from_bytes([7; 32]));
        let from = IpAddr::from([127, 0, 0, 1]);
        let vouched = own.vouch(&key, from, b"kind: Job\nname: j\n");
        assert_eq!(own.read(&vouched), Some((key, from, &b"kind: Job\nname: j\n"[..])));
        assert_eq!(Voucher::new("other".to_owned()).read(&vouched), None);
        let other = Voucher::new("guess".to_owned()).vouch(&key, from, b"{}");
        for forged in [&b""[..], b"\n", b"kind: Job\n", b"5ec4e7\n{}", b"5ec4e7 07 127.0.0.1\n{}", &other] {
            assert_eq!(own.read(forged), None);
        }
    }
}
