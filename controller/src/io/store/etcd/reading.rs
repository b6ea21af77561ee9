//! What is read of the records: all at the start, entries of the audit log in pages.

use std::collections::BTreeMap;

use etcd_client::{Client, DeleteOptions, GetOptions, KeyValue, SortOrder, SortTarget};

use super::super::journal;
use super::super::seal::unseal;
use super::super::{AUDIT, Contents, Entries, Op, StoreError};
use super::{Etcd, Members, PATIENCE, too_large};

/// Records in one page.
const PAGE_RECORDS: i64 = 1_000;

impl Etcd {
    pub async fn list(&self) -> Result<Entries, StoreError> {
        // `0` comes after `/`.
        let (audit, behind) = (format!("entry/{AUDIT}"), "entry/audit0");
        Ok(self.etcd.entries(&[("entry/", &audit), (behind, "entry0")]).await?.into_iter().collect())
    }

    pub async fn audit(&self, before: &str, limit: usize) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let (from, end) =
            (self.etcd.key(&format!("entry/{AUDIT}")), self.etcd.key(&format!("entry/{before}")));
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let latest_first = GetOptions::new()
            .with_range(end)
            .with_limit(limit)
            .with_sort(SortTarget::Key, SortOrder::Descend);
        let call =
            async |client: Client| client.kv_client().get(from.clone(), Some(latest_first.clone())).await;
        let mut page = self.etcd.insist("read from", Some(PATIENCE), call).await?;
        let prefix = self.etcd.key("entry/");
        let entry = |record: KeyValue| {
            let name = std::str::from_utf8(record.key()).ok()?.strip_prefix(&prefix)?.to_owned();
            let value = unseal(&name, record.value()).unwrap_or_default();
            Some((name, value))
        };
        Ok(page.take_kvs().into_iter().filter_map(entry).collect())
    }

    pub async fn trim_audit(&self, before: &str) -> Result<(), StoreError> {
        let (from, end) =
            (self.etcd.key(&format!("entry/{AUDIT}")), self.etcd.key(&format!("entry/{before}")));
        let call = async |client: Client| {
            client.kv_client().delete(from.clone(), Some(DeleteOptions::new().with_range(end.clone()))).await
        };
        self.etcd.insist("write to", Some(PATIENCE), call).await.map(drop)
    }

    pub async fn contents(&self) -> Result<Contents, StoreError> {
        let term = self.etcd.term().await?.0;
        Ok(Contents {
            identity: self.identity.clone(),
            term,
            entries: self.etcd.entries(&[("entry/", "entry0")]).await?.into_iter().collect(),
        })
    }
}

impl Members {
    /// All records in these ranges, as of one revision.
    async fn entries(
        &self,
        ranges: &[(&str, &str)],
    ) -> Result<BTreeMap<String, Option<Vec<u8>>>, StoreError> {
        let prefix = self.key("entry/");
        let mut entries = BTreeMap::new();
        let mut ranges = ranges.iter().map(|(from, end)| (self.key(from), self.key(end)));
        let Some((mut from, mut end)) = ranges.next() else { return Ok(entries) };
        let (mut revision, mut limit) = (0, PAGE_RECORDS);
        loop {
            let options = GetOptions::new().with_range(end.clone()).with_limit(limit).with_revision(revision);
            let call =
                async |client: Client| client.kv_client().get(from.clone(), Some(options.clone())).await;
            let mut page = match self.insist("read from", Some(PATIENCE), call).await {
                Err(StoreError::Etcd { source, .. }) if too_large(&source) && limit > 1 => {
                    limit /= 2;
                    continue;
                }
                page => page?,
            };
            revision = page
                .header()
                .map_or(revision, |header| if revision == 0 { header.revision() } else { revision });
            let more = page.more();
            for record in page.take_kvs() {
                let Ok(key) = std::str::from_utf8(record.key()) else { continue };
                let name = key.strip_prefix(&prefix).unwrap_or(key);
                entries.insert(name.to_owned(), unseal(name, record.value()));
                from = format!("{key}\0");
            }
            if !more {
                match ranges.next() {
                    Some(next) => (from, end) = next,
                    None => break,
                }
            }
        }
        for op in self.journal(revision).await? {
            match op {
                Op::Put { key, value } => drop(entries.insert(key.clone(), unseal(&key, &value))),
                Op::Delete { key } => drop(entries.remove(&key)),
            }
        }
        Ok(entries)
    }

    /// A transaction that was written down whole and may not be carried out yet, as of a revision (0: now).
    pub(super) async fn journal(&self, revision: i64) -> Result<Vec<Op>, StoreError> {
        let at = || GetOptions::new().with_revision(revision);
        let Some(end) = self.get("journal/end", at(), Some(PATIENCE)).await? else { return Ok(Vec::new()) };
        let count: usize = end.value_str().ok().and_then(|count| count.parse().ok()).unwrap_or_default();
        let mut bytes = Vec::new();
        for n in 0..count {
            let part = self.get(&format!("journal/{n:06}"), at(), Some(PATIENCE)).await?;
            bytes.extend_from_slice(part.as_ref().map(KeyValue::value).unwrap_or_default());
        }
        journal::decode(&bytes).ok_or_else(|| self.damaged("its journal is unreadable"))
    }
}
