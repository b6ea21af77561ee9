//! Values of secrets on their way to a pod: over TLS, then in memory alone. They are never printed.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::hex;
use crate::ids::SecretName;

/// By name; as text hexadecimal digits, for they are any bytes.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretValues(BTreeMap<SecretName, Value>);

#[derive(Clone, PartialEq, Eq)]
struct Value(Vec<u8>);

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&hex::encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        hex::decode_all(&text).map(Value).ok_or_else(|| de::Error::custom("not hexadecimal digits"))
    }
}

impl SecretValues {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn insert(&mut self, name: SecretName, value: Vec<u8>) {
        self.0.insert(name, Value(value));
    }

    pub fn get(&self, name: &SecretName) -> Option<&[u8]> {
        self.0.get(name).map(|value| &value.0[..])
    }
}

impl fmt::Debug for SecretValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_there_and_back_and_never_in_print() {
        let mut values = SecretValues::default();
        let name = SecretName::parse("key").unwrap();
        values.insert(name.clone(), b"\x00hunter2\xff\n".to_vec());
        let text = serde_json::to_string(&values).unwrap();
        assert_eq!(serde_json::from_str::<SecretValues>(&text).unwrap(), values);
        assert_eq!(values.get(&name), Some(&b"\x00hunter2\xff\n"[..]));
        assert!(format!("{values:?}").contains("key") && !format!("{values:?}").contains("hunter2"));
        for bad in [r#"{"key":"0"}"#, r#"{"key":"zz"}"#, r#"{"key":7}"#, r#"{"K":"00"}"#] {
            assert!(serde_json::from_str::<SecretValues>(bad).is_err(), "{bad}");
        }
    }
}
