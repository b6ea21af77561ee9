//! Quantities with their unit in the type: CPU, bytes, durations, points in time.
//!
//! On the wire between programs they are plain integers in the unit named; in a job file they are what people
//! write (`500m`, `4Gi`, `1h30m`), and `Display` writes that form back.

use std::fmt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::limits::{CPU_MILLI_MAX, DURATION_MS_MAX, MEMORY_BYTES_MAX};

/// For fields that are left out of a message where they say nothing.
pub(crate) fn is_zero<T: Default + PartialEq>(n: &T) -> bool {
    *n == T::default()
}

/// Why a text is not a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    #[error("`{0}` is not a number of cores: write 2, 0.5 or 500m")]
    NotCpu(String),
    #[error("`{0}` is not a size: write a whole number and a unit, such as 500Mi, 4Gi or 8GB")]
    NotBytes(String),
    #[error("`{0}` is not a duration: write 30s, 10m, 1h30m or 500ms")]
    NotDuration(String),
    #[error("`{0}` is not a time of RFC 3339")]
    NotTimestamp(String),
    #[error("`{value}` is more than {max}")]
    TooLarge { value: String, max: String },
}

fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            pub const ZERO: Self = Self(0);

            #[must_use]
            pub fn checked_add(self, other: Self) -> Option<Self> {
                self.0.checked_add(other.0).map(Self)
            }

            #[must_use]
            pub fn checked_sub(self, other: Self) -> Option<Self> {
                self.0.checked_sub(other.0).map(Self)
            }

            #[must_use]
            pub fn saturating_add(self, other: Self) -> Self {
                Self(self.0.saturating_add(other.0))
            }

            #[must_use]
            pub fn saturating_sub(self, other: Self) -> Self {
                Self(self.0.saturating_sub(other.0))
            }
        }
    };
}

unit!(
    /// Thousandths of a core.
    MilliCpu(u64)
);
unit!(
    /// Bytes of memory or disk.
    Bytes(u64)
);
unit!(
    /// A span of time in milliseconds.
    Millis(u64)
);
unit!(
    /// A point in civil time: milliseconds since 1970-01-01 UTC. For people and records; never for leases.
    Timestamp(u64)
);
unit!(
    /// A point on a machine's CLOCK_BOOTTIME, in milliseconds: counts through suspend, never jumps. For leases.
    BootMs(u64)
);

impl MilliCpu {
    /// Cores as people write them: `2`, `0.5` (at most three digits), `500m`.
    pub fn parse(text: &str) -> Result<Self, UnitError> {
        let bad = || UnitError::NotCpu(shorten(text));
        let digits = |s: &str| -> Result<u64, UnitError> {
            if s.is_empty() || s.len() > 12 || !s.bytes().all(|b| b.is_ascii_digit()) {
                return Err(bad());
            }
            s.parse().map_err(|_| bad())
        };
        let milli = if let Some(milli) = text.strip_suffix('m') {
            digits(milli)?
        } else {
            let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
            if fraction.len() > 3 {
                return Err(bad());
            }
            let scale = [100, 10, 1][fraction.len().saturating_sub(1)];
            digits(whole)? * 1000 + digits(fraction)? * scale
        };
        if milli > CPU_MILLI_MAX {
            return Err(UnitError::TooLarge { value: shorten(text), max: Self(CPU_MILLI_MAX).to_string() });
        }
        Ok(Self(milli))
    }
}

impl fmt::Display for MilliCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            milli if milli % 1000 == 0 => (milli / 1000).to_string(),
            milli => format!("{milli}m"),
        };
        f.pad(&text)
    }
}

const BYTE_UNITS: [(&str, u64); 12] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("kB", 1_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
];

impl Bytes {
    pub const KIB: u64 = 1 << 10;
    pub const MIB: u64 = 1 << 20;
    pub const GIB: u64 = 1 << 30;

    /// Sizes as people write them: `500Mi`, `1.5Gi`, `8GB`, or a bare number of bytes.
    pub fn parse(text: &str) -> Result<Self, UnitError> {
        let bad = || UnitError::NotBytes(shorten(text));
        let (number, unit) = BYTE_UNITS
            .iter()
            .find_map(|(suffix, unit)| text.strip_suffix(suffix).map(|number| (number, *unit)))
            .unwrap_or((text.strip_suffix('B').unwrap_or(text), 1));
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let plain = |s: &str| s.len() <= 18 && s.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || !plain(whole) || !plain(fraction) || fraction.len() > 3 {
            return Err(bad());
        }
        if number.contains('.') && (fraction.is_empty() || unit == 1) {
            return Err(bad());
        }
        let whole: u128 = whole.parse().map_err(|_| bad())?;
        let thousandths: u128 = format!("{fraction:0<3}").parse().map_err(|_| bad())?;
        let bytes = whole * u128::from(unit) + thousandths * u128::from(unit) / 1000;
        match u64::try_from(bytes) {
            Ok(bytes) if bytes <= MEMORY_BYTES_MAX => Ok(Self(bytes)),
            _ => {
                let max = Self(MEMORY_BYTES_MAX).to_string();
                Err(UnitError::TooLarge { value: shorten(text), max })
            }
        }
    }
}

impl fmt::Display for Bytes {
    /// Exact: the largest binary unit that divides it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = [("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)]
            .into_iter()
            .find(|(_, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift))
            .map_or_else(|| self.0.to_string(), |(suffix, shift)| format!("{}{suffix}", self.0 >> shift));
        f.pad(&text)
    }
}

impl Millis {
    pub const fn from_secs(secs: u64) -> Self {
        Self(secs * 1000)
    }

    pub const fn duration(self) -> Duration {
        Duration::from_millis(self.0)
    }

    /// Durations as people write them: `30s`, `10m`, `1h30m`, `500ms`, `2d`.
    pub fn parse(text: &str) -> Result<Self, UnitError> {
        let bad = || UnitError::NotDuration(shorten(text));
        let compact = !text.is_empty() && text.len() <= 32 && !text.contains(char::is_whitespace);
        let known = text.bytes().all(|b| b.is_ascii_digit() || b"smhd".contains(&b));
        if !compact || !known {
            return Err(bad());
        }
        let duration = humantime::parse_duration(text).map_err(|_| bad())?;
        match u64::try_from(duration.as_millis()) {
            Ok(ms) if ms <= DURATION_MS_MAX => Ok(Self(ms)),
            _ => Err(UnitError::TooLarge { value: shorten(text), max: Self(DURATION_MS_MAX).to_string() }),
        }
    }
}

impl fmt::Display for Millis {
    /// Exact, without spaces: `1h30m`, `1d`, `1500ms` as `1s500ms`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.pad("0s");
        }
        let mut text = String::new();
        let mut rest = self.0;
        for (unit, ms) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)] {
            if rest >= ms {
                text.push_str(&format!("{}{unit}", rest / ms));
                rest %= ms;
            }
        }
        f.pad(&text)
    }
}

impl Timestamp {
    pub fn from_system(time: SystemTime) -> Self {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    #[must_use]
    pub fn plus(self, span: Millis) -> Self {
        Self(self.0.saturating_add(span.0))
    }

    /// The span from `earlier` to here; zero where the clock went back.
    pub fn since(self, earlier: Self) -> Millis {
        Millis(self.0.saturating_sub(earlier.0))
    }

    pub fn parse(text: &str) -> Result<Self, UnitError> {
        humantime::parse_rfc3339(text)
            .map(Self::from_system)
            .map_err(|_| UnitError::NotTimestamp(shorten(text)))
    }
}

/// The last millisecond of the year 9999, the end of RFC 3339.
const TIMESTAMP_MS_MAX: u64 = 253_402_300_799_999;

impl fmt::Display for Timestamp {
    /// RFC 3339 in UTC with milliseconds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(self.0.min(TIMESTAMP_MS_MAX));
        f.pad(&humantime::format_rfc3339_millis(time).to_string())
    }
}

/// Serde form of times in what users read: RFC 3339 (`#[serde(with = "rfc3339")]`).
pub mod rfc3339 {
    use serde::{Deserialize, Deserializer, Serializer, de};

    use super::Timestamp;

    pub fn serialize<S: Serializer>(time: &Timestamp, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(time)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Timestamp, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(from)?;
        Timestamp::parse(&text).map_err(de::Error::custom)
    }

    /// The same for a time that may be absent (`rfc3339::option`, with `default`).
    pub mod option {
        use serde::{Deserialize, Deserializer, Serializer, de};

        use super::Timestamp;

        pub fn serialize<S: Serializer>(time: &Option<Timestamp>, to: S) -> Result<S::Ok, S::Error> {
            match time {
                Some(time) => to.collect_str(time),
                None => to.serialize_none(),
            }
        }

        pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Timestamp>, D::Error> {
            let text = Option::<String>::deserialize(from)?;
            text.map(|text| Timestamp::parse(&text)).transpose().map_err(de::Error::custom)
        }
    }
}

impl BootMs {
    #[must_use]
    pub fn plus(self, span: Millis) -> Self {
        Self(self.0.saturating_add(span.0))
    }

    pub fn since(self, earlier: Self) -> Millis {
        Millis(self.0.saturating_sub(earlier.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cpu() {
        for (text, milli) in [("2", 2000), ("0.5", 500), ("500m", 500), ("0.25", 250), ("1.125", 1125)] {
            assert_eq!(MilliCpu::parse(text), Ok(MilliCpu(milli)), "{text}");
        }
        for bad in ["", "m", ".", "0.", ".5", "-1", "1.2345", "1e3", "2 ", "9999999999"] {
            assert!(MilliCpu::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn bytes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("500Mi", 500 << 20),
            ("8GB", 8_000_000_000),
            ("1.5Gi", 3 << 29),
            ("10k", 10_000),
            ("7B", 7),
        ] {
            assert_eq!(Bytes::parse(text), Ok(Bytes(bytes)), "{text}");
        }
        for bad in ["", "Gi", "-1", "1.5", "1.", "4 Gi", "4gi", "1e9", "99999999999999999999Ti", "5000Ti"] {
            assert!(Bytes::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations() {
        for (text, ms) in
            [("30s", 30_000), ("10m", 600_000), ("1h30m", 5_400_000), ("500ms", 500), ("2d", 172_800_000)]
        {
            assert_eq!(Millis::parse(text), Ok(Millis(ms)), "{text}");
        }
        for bad in ["", "30", "1 h", "s", "-1s", "1y", "99999999d"] {
            assert!(Millis::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_rfc3339_with_milliseconds() {
        assert_eq!(Timestamp(1_700_000_000_123).to_string(), "2023-11-14T22:13:20.123Z");
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_back(
            cpu in 0..=CPU_MILLI_MAX,
            bytes in 0..=MEMORY_BYTES_MAX,
            ms in 0..=DURATION_MS_MAX,
            at in 0..=TIMESTAMP_MS_MAX,
        ) {
            prop_assert_eq!(MilliCpu::parse(&MilliCpu(cpu).to_string()), Ok(MilliCpu(cpu)));
            prop_assert_eq!(Bytes::parse(&Bytes(bytes).to_string()), Ok(Bytes(bytes)));
            prop_assert_eq!(Millis::parse(&Millis(ms).to_string()), Ok(Millis(ms)));
            prop_assert_eq!(Timestamp::parse(&Timestamp(at).to_string()), Ok(Timestamp(at)));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,40}") {
            let _ = (MilliCpu::parse(&text), Bytes::parse(&text), Millis::parse(&text), Timestamp::parse(&text));
        }
    }
}
