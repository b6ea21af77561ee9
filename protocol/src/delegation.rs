//! Who may sign for the controller: a key that the cluster's root has named. Members know the root's key, which is kept away
//! from every machine of the cluster, so that the key in daily use can be replaced and a stolen one is good for nothing.
//!
//! A delegation is Ed25519 by the root over `berth delegation 1`, the cluster, the key's 32 bytes, serial, issued and
//! expires (milliseconds since 1970) as 8 bytes each, little-endian; each part behind its length in 8 bytes. It travels
//! in the envelope of what the key has signed: whoever hears a new key for the first time has in hand why to obey it.

use serde::{Deserialize, Serialize};

use crate::ids::ClusterName;
use crate::sign::{Key, PublicKey, Signature, framed};
use crate::units::{Millis, Timestamp};

/// What a root signs here, it signs for nothing else.
const DELEGATION: &[u8] = b"berth delegation 1";

/// How long a delegation is good, where nothing else is said: what has to be done by hand should not have to be done often.
pub const LIFE: Millis = Millis(365 * 86_400_000);
/// From then on its end is spoken of.
pub const WARNED_BEFORE: Millis = Millis(60 * 86_400_000);

/// The root's word that a key signs for the controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Delegation {
    pub key: PublicKey,
    /// Only grows: of two the higher counts.
    pub serial: u64,
    pub issued: Timestamp,
    pub expires: Timestamp,
    sig: Signature,
}

fn statement(
    cluster: &ClusterName,
    key: &PublicKey,
    serial: u64,
    issued: Timestamp,
    expires: Timestamp,
) -> Vec<u8> {
    let [serial, issued, expires] = [serial, issued.0, expires.0].map(u64::to_le_bytes);
    framed(&[DELEGATION, cluster.as_str().as_bytes(), key.bytes(), &serial, &issued, &expires])
}

impl Delegation {
    /// By the root, for a key that signs after the one of serial `after`. Serials are seconds since 1970, so that they grow
    /// also where a backup has forgotten the last ones.
    pub fn new(
        root: &Key,
        cluster: &ClusterName,
        key: PublicKey,
        after: Option<u64>,
        issued: Timestamp,
        life: Millis,
    ) -> Self {
        let serial = (issued.0 / 1000).max(after.map_or(0, |after| after.saturating_add(1)));
        let expires = issued.plus(life);
        let sig = root.sign(&statement(cluster, &key, serial, issued, expires));
        Self { key, serial, issued, expires, sig }
    }

    /// Has this root said so, for this cluster?
    pub fn is_by(&self, root: &PublicKey, cluster: &ClusterName) -> bool {
        let Self { key, serial, issued, expires, sig } = self;
        root.has_signed_text(&statement(cluster, key, *serial, *issued, *expires), sig)
    }

    /// What people are to be told of its end, if that is near or past.
    pub fn ending(&self, now: Timestamp) -> Option<String> {
        const HOW: &str = "an admin with the root's file rotates it: `berth keys rotate --root FILE`";
        let until = self.expires;
        if until <= now {
            return Some(format!(
                "the controller's key has expired at {until}: what runs goes on, nodes begin nothing new; {HOW}"
            ));
        }
        (until <= now.plus(WARNED_BEFORE)).then(|| {
            format!("the controller's key expires at {until}, and then nodes begin nothing new; {HOW}")
        })
    }
}

/// Why a key is not obeyed, though what it has signed is signed well.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Distrust {
    #[error(
        "the message is signed by key {by}, and this node belongs to the controller of key {own}; if that was set up \
         anew, stop the agent and remove its data directory"
    )]
    Stranger { by: String, own: String },
    #[error("the message is signed by key {by}, which the cluster's root has not named")]
    Undelegated { by: String },
    #[error(
        "the message is signed by the controller's key of serial {serial}, which another has replaced, of serial {latest}: \
         stolen, or the store was restored from a backup of before; then rotate once more (`berth keys rotate`)"
    )]
    Replaced { serial: u64, latest: u64 },
    #[error(
        "the controller's key has expired at {at}: what runs goes on, and nothing new begins until an admin rotates it (`berth \
         keys rotate`), or this machine's clock is set right"
    )]
    Expired { at: Timestamp },
}

impl Distrust {
    /// A word for counters.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Stranger { .. } => "other-controller",
            Self::Undelegated { .. } => "undelegated-key",
            Self::Replaced { .. } => "replaced-key",
            Self::Expired { .. } => "expired-key",
        }
    }
}

/// Whose orders one member obeys: those of the key that the root has named last, as far as it has heard; before it has heard
/// of any, those of the root itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trust {
    cluster: ClusterName,
    root: PublicKey,
    latest: Option<Delegation>,
}

impl Trust {
    pub fn new(cluster: ClusterName, root: PublicKey) -> Self {
        Self { cluster, root, latest: None }
    }

    /// None has been heard of yet.
    pub fn latest(&self) -> Option<&Delegation> {
        self.latest.as_ref()
    }

    /// A delegation that was heard at another time. It never makes an earlier one count again.
    pub fn learn(&mut self, delegation: Delegation) {
        if delegation.is_by(&self.root, &self.cluster) && self.is_later(&delegation) {
            self.latest = Some(delegation);
        }
    }

    fn is_later(&self, delegation: &Delegation) -> bool {
        self.latest.as_ref().is_none_or(|latest| latest.serial < delegation.serial)
    }

    /// May this key, which shows this beside what it has signed, speak for the controller? Some: by a delegation that is
    /// later than all before, and is to be learnt first.
    ///
    /// # Errors
    /// It may not, and why.
    pub fn judge(&self, by: &PublicKey, shown: Option<Delegation>) -> Result<Option<Delegation>, Distrust> {
        let Some(shown) = shown.filter(|shown| self.latest.as_ref() != Some(shown)) else {
            let own = self.latest.as_ref().map_or(&self.root, |latest| &latest.key);
            let stranger = || Distrust::Stranger { by: by.short(), own: own.short() };
            return if own == by { Ok(None) } else { Err(stranger()) };
        };
        if shown.key != *by || !shown.is_by(&self.root, &self.cluster) {
            return Err(Distrust::Undelegated { by: by.short() });
        }
        match &self.latest {
            Some(latest) if !self.is_later(&shown) => {
                Err(Distrust::Replaced { serial: shown.serial, latest: latest.serial })
            }
            _ => Ok(Some(shown)),
        }
    }

    /// A key that has expired is heard as far as what runs may run on, and orders nothing: a team that forgot it loses no
    /// work, and one that was stolen, whose replacement the broker withholds, is of no use for ever.
    ///
    /// # Errors
    /// It has.
    pub fn may_order(&self, now: Timestamp) -> Result<(), Distrust> {
        match &self.latest {
            Some(latest) if latest.expires <= now => Err(Distrust::Expired { at: latest.expires }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Timestamp = Timestamp(1_800_000_000_000);

    fn cluster(name: &str) -> ClusterName {
        ClusterName::parse(name).unwrap()
    }

    fn key(n: u8) -> Key {
        Key::from_seed(&[n; 32])
    }

    /// By the root `root`, for the key `n`.
    fn delegated(root: u8, of: &str, n: u8, serial: u64) -> Delegation {
        Delegation::new(&key(root), &cluster(of), key(n).public(), Some(serial - 1), Timestamp(5), LIFE)
    }

    fn member() -> Trust {
        Trust::new(cluster("lab"), key(1).public())
    }

    /// As a member does it: learnt, then obeyed.
    fn obeys(trust: &mut Trust, n: u8, shown: Option<Delegation>) -> Result<(), &'static str> {
        let later = trust.judge(&key(n).public(), shown).map_err(|why| why.kind())?;
        later.into_iter().for_each(|later| trust.learn(later));
        Ok(())
    }

    #[test]
    fn the_root_speaks_until_it_has_named_another() {
        let mut trust = member();
        assert_eq!(obeys(&mut trust, 1, None), Ok(()));
        assert_eq!(obeys(&mut trust, 2, None), Err("other-controller"));
        assert_eq!(obeys(&mut trust, 2, Some(delegated(1, "lab", 2, 10))), Ok(()));
        assert_eq!(obeys(&mut trust, 1, None), Err("other-controller"));
        // What is known need not be shown.
        assert_eq!(obeys(&mut trust, 2, None), Ok(()));
    }

    #[test]
    fn what_was_replaced_stays_so() {
        let mut trust = member();
        let (first, second) = (delegated(1, "lab", 2, 10), delegated(1, "lab", 3, 11));
        assert_eq!(obeys(&mut trust, 2, Some(first.clone())), Ok(()));
        assert_eq!(obeys(&mut trust, 3, Some(second.clone())), Ok(()));
        assert_eq!(obeys(&mut trust, 2, Some(first.clone())), Err("replaced-key"));
        assert_eq!(obeys(&mut trust, 2, None), Err("other-controller"));
        // Another one of the same serial is no later one.
        assert_eq!(obeys(&mut trust, 4, Some(delegated(1, "lab", 4, 11))), Err("replaced-key"));
        trust.learn(first);
        assert_eq!(trust.latest(), Some(&second));
        assert_eq!(obeys(&mut trust, 3, Some(second)), Ok(()));
    }

    #[test]
    fn nobody_but_the_root_names_a_key() {
        let mut trust = member();
        assert_eq!(obeys(&mut trust, 2, Some(delegated(9, "lab", 2, 10))), Err("undelegated-key"));
        assert_eq!(obeys(&mut trust, 2, Some(delegated(1, "other", 2, 10))), Err("undelegated-key"));
        // Of another key than the one that has signed: whoever copies it has no use of it.
        assert_eq!(obeys(&mut trust, 3, Some(delegated(1, "lab", 2, 10))), Err("undelegated-key"));
        let real = delegated(1, "lab", 2, 10);
        let later = Timestamp(NOW.0 + 1);
        let changes: [fn(&mut Delegation, Timestamp); 4] = [
            |changed, _| changed.key = key(3).public(),
            |changed, _| changed.serial += 1,
            |changed, later| changed.issued = later,
            |changed, later| changed.expires = later,
        ];
        for change in changes {
            let mut changed = real.clone();
            change(&mut changed, later);
            let by = if changed.key == real.key { 2 } else { 3 };
            assert_eq!(obeys(&mut trust, by, Some(changed.clone())), Err("undelegated-key"), "{changed:?}");
            trust.learn(changed);
            assert_eq!(trust.latest(), None);
        }
    }

    #[test]
    fn one_that_has_expired_orders_nothing_and_is_replaced_all_the_same() {
        let mut trust = member();
        assert_eq!(obeys(&mut trust, 2, Some(delegated(1, "lab", 2, 10))), Ok(()));
        let end = Timestamp(5).plus(LIFE);
        assert_eq!(trust.may_order(Timestamp(end.0 - 1)), Ok(()));
        assert_eq!(trust.may_order(end), Err(Distrust::Expired { at: end }));
        assert_eq!(obeys(&mut trust, 2, None), Ok(()));
        let next =
            Delegation::new(&key(1), &cluster("lab"), key(3).public(), Some(10), end, Millis(3_600_000));
        assert_eq!(obeys(&mut trust, 3, Some(next)), Ok(()));
        assert_eq!(trust.may_order(end), Ok(()));
        // A root that signs itself, as in clusters set up before there were delegations, has no end.
        assert_eq!(member().may_order(Timestamp(u64::MAX)), Ok(()));
    }

    #[test]
    fn its_end_is_spoken_of_in_time() {
        let delegation = delegated(1, "lab", 2, 10);
        let end = delegation.expires;
        let before = |span: Millis| Timestamp(end.0 - span.0);
        assert_eq!(delegation.ending(before(Millis(WARNED_BEFORE.0 + 1))), None);
        assert!(delegation.ending(before(WARNED_BEFORE)).is_some_and(|text| text.contains("expires at")));
        assert!(delegation.ending(end).is_some_and(|text| text.contains("has expired at")));
    }

    #[test]
    fn serials_grow_whatever_the_clock_says_and_after_a_backup_too() {
        let made = |after, at| {
            Delegation::new(&key(1), &cluster("lab"), key(2).public(), after, Timestamp(at), LIFE).serial
        };
        assert_eq!(made(None, 7_000), 7);
        assert_eq!(made(Some(3), 7_000), 7);
        assert_eq!(made(Some(90), 7_000), 91);
        assert_eq!(made(Some(u64::MAX), 7_000), u64::MAX, "and so it is refused");
    }

    proptest! {
        /// Whatever order a broker delivers them in, again and again.
        #[test]
        fn a_member_never_goes_back(order in prop::collection::vec((1_u64..6, 1..3_u8), 1..30)) {
            let mut trust = member();
            let mut highest = 0;
            for (serial, root) in order {
                // The key of each serial is another one.
                let n = u8::try_from(serial).unwrap() + 10;
                let obeyed = obeys(&mut trust, n, Some(delegated(root, "lab", n, serial))).is_ok();
                prop_assert_eq!(obeyed, root == 1 && serial >= highest);
                if obeyed {
                    highest = serial;
                }
                prop_assert_eq!(trust.latest().map_or(0, |latest| latest.serial), highest);
            }
        }

        #[test]
        fn one_changed_byte_is_enough(at: prop::sample::Index, bit in 0..8_u8) {
            let real = delegated(1, "lab", 2, 10);
            let mut text = serde_json::to_vec(&real).unwrap();
            let at = at.index(text.len());
            text[at] ^= 1 << bit;
            if let Ok(read) = serde_json::from_slice::<Delegation>(&text) {
                prop_assert!(read == real || !read.is_by(&key(1).public(), &cluster("lab")), "{read:?}");
            }
        }
    }
}
