//! The records in etcd, where several controllers reach them and one of them leads.
//!
//! Below `/berth/{cluster}/`: `entry/…` the records, `meta/…` what belongs to the store, `leader` the key that whoever
//! leads holds by a lease, `journal/…` a transaction larger than etcd takes at once. Every write is compared with the
//! revision at which the leader's key was made: a deposed leader writes nothing. And with the number of the write before it,
//! `meta/written`: one whose answer was lost, and which was said again, does nothing when it comes late.

mod reading;
mod writing;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use berth_protocol::chain::chain;
use berth_protocol::ids::{ClusterName, Term};
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, DeleteOptions, Error, GetOptions, KeyValue,
    PutOptions, TlsOptions, Txn, TxnOp, TxnResponse,
};
use futures_util::future::try_join_all;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::writing::{WRITTEN, Writes};
use super::choice::{EtcdChoice, EtcdTls};
use super::journal::{self, chunks};
use super::seal::{seal, unseal};
use super::{Contents, Identity, Op, StoreError, may_replace, no_random};
use crate::core::lead::{self, Tenure};
use crate::io::{clock, random};

const LEASE_S: i64 = (lead::LEASE.0 / 1_000) as i64;
const RENEW: Duration = Duration::from_millis(lead::RENEW.0);
/// How often a controller that stands by looks for the leader's key. A watch could stall unseen with its member.
const STANDBY_LOOK: Duration = Duration::from_millis(500);
/// One answer of a member.
const REQUEST: Duration = Duration::from_millis(1_500);
const CONNECT: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_millis(100);
/// Members elect a leader of their own within that.
const PATIENCE: Duration = Duration::from_millis(lead::PATIENCE.0);
/// Within etcd's default bounds for one transaction: 128 operations, 1.5 MiB.
const OPS_PER_TXN_MAX: usize = 120;
const BYTES_PER_TXN_MAX: usize = 1 << 20;
/// Transactions under way at once, where their order does not matter.
const TXNS_AT_ONCE: usize = 8;
/// etcd keeps every revision until told otherwise.
const COMPACT: Duration = Duration::from_secs(300);
/// gRPC's own numbers of what passes: cancelled, unknown, deadline exceeded, unavailable.
const PASSING_CODES: [i32; 4] = [1, 2, 4, 14];
/// "Resource exhausted" passes as well: a member says it that closes a connection since a slow line let keep-alives come
/// too close, or that has too many requests. Not so where its disk's quota is used up.
const EXHAUSTED: i32 = 8;
const NO_ROOM: &str = "database space exceeded";
const OUT_OF_RANGE: i32 = 11;

pub struct Etcd {
    etcd: Members,
    identity: Identity,
    lead: Option<Lead>,
}

/// A connection to the members, and where this cluster's keys are.
#[derive(Clone)]
struct Members {
    client: Client,
    names: String,
    prefix: String,
}

struct Lead {
    term: Term,
    lease: i64,
    writes: Writes,
    /// Closed once nothing renews the lease.
    tenure: watch::Receiver<Tenure>,
    keeper: JoinHandle<()>,
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Etcd {
    /// Waits until a member answers; makes the store where there is none.
    pub async fn open(choice: &EtcdChoice, cluster: &ClusterName) -> Result<Self, StoreError> {
        let etcd = Members::connect(choice, cluster).await?;
        let identity = etcd.identity().await?;
        if let Some(to) = etcd.meta("moved").await? {
            let to = String::from_utf8_lossy(&to.unwrap_or_default()).into_owned();
            return Err(StoreError::Moved { place: etcd.names.clone(), to });
        }
        Ok(Self { etcd, identity, lead: None })
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub async fn txn(&self, term: Term, ops: Vec<Op>) -> Result<(), StoreError> {
        let lead = self.lead(term)?;
        let ops: Vec<Op> = ops.into_iter().map(sealed).collect();
        let parts = chunks(ops.clone(), OPS_PER_TXN_MAX, BYTES_PER_TXN_MAX);
        if parts.len() <= 1 {
            return self.write(lead, self.etcd.operations(parts.concat())).await;
        }
        // Whole in the journal first: a leader that dies on the way is completed by the next.
        let bytes = journal::encode(&ops);
        let count = bytes.len().div_ceil(BYTES_PER_TXN_MAX);
        for (n, part) in bytes.chunks(BYTES_PER_TXN_MAX).enumerate() {
            let name = format!("journal/{n:06}");
            let mut write = vec![self.etcd.put(&name, part)];
            if n + 1 == count {
                write.push(self.etcd.put("journal/end", count.to_string().as_bytes()));
            }
            self.write(lead, write).await?;
        }
        self.carry_out(lead, parts).await
    }

    /// What the journal holds; then the journal goes.
    async fn carry_out(&self, lead: &Lead, parts: Vec<Vec<Op>>) -> Result<(), StoreError> {
        let mut parts = parts.into_iter().map(|part| self.etcd.operations(part)).peekable();
        while parts.peek().is_some() {
            let some = parts.by_ref().take(TXNS_AT_ONCE);
            let written = try_join_all(some.map(|part| self.etcd.write_some(&lead.writes, part))).await?;
            if written.contains(&false) {
                return Err(StoreError::Deposed(lead.term));
            }
        }
        let all = Some(DeleteOptions::new().with_prefix());
        self.write(lead, vec![TxnOp::delete(self.etcd.key("journal/"), all)]).await
    }

    pub async fn campaign(&mut self) -> Result<Term, StoreError> {
        self.lead = None;
        let mut told = false;
        let lead = loop {
            let leader = self.etcd.get("leader", GetOptions::new(), None).await?;
            if leader.is_none()
                && let Some(lead) = self.etcd.try_to_lead().await?
            {
                break lead;
            }
            if !std::mem::replace(&mut told, true) {
                tracing::info!("standing by: another controller leads");
            }
            tokio::time::sleep(STANDBY_LOOK).await;
        };
        let unfinished = self.etcd.journal(0).await?;
        self.carry_out(&lead, chunks(unfinished, OPS_PER_TXN_MAX, BYTES_PER_TXN_MAX)).await?;
        Ok(self.lead.insert(lead).term)
    }

    pub async fn leads(&self) -> Result<(), StoreError> {
        let Some(lead) = &self.lead else { return Ok(()) };
        let mut tenure = lead.tenure.clone();
        let holds = tenure.wait_for(|tenure| tenure.holds(clock::boottime()));
        match tokio::time::timeout(PATIENCE, holds).await {
            Ok(held) => held.map(drop).map_err(|_| StoreError::Deposed(lead.term)),
            Err(_) => Err(StoreError::Unrenewed(PATIENCE)),
        }
    }

    pub async fn deposed(&self) -> StoreError {
        let Some(lead) = &self.lead else { return std::future::pending().await };
        let _ = lead.tenure.clone().wait_for(|_| false).await;
        StoreError::Deposed(lead.term)
    }

    pub async fn resign(&self) {
        if let Some(lead) = &self.lead {
            lead.keeper.abort();
            // Where it fails the lease runs out by itself.
            let _ = tokio::time::timeout(CONNECT, self.etcd.client.clone().lease_revoke(lead.lease)).await;
        }
    }

    pub async fn retire(&self, term: Term, to: &str) -> Result<(), StoreError> {
        let lead = self.lead(term)?;
        self.write(lead, vec![self.etcd.put("meta/moved", &seal("moved", to.as_bytes()))]).await
    }

    fn lead(&self, term: Term) -> Result<&Lead, StoreError> {
        self.lead.as_ref().filter(|lead| lead.term == term).ok_or(StoreError::Deposed(term))
    }

    async fn write(&self, lead: &Lead, operations: Vec<TxnOp>) -> Result<(), StoreError> {
        let written = self.etcd.write(&lead.writes, operations).await?;
        written.then_some(()).ok_or(StoreError::Deposed(lead.term))
    }
}

/// Puts `contents` in the place of a store that `may_replace` them.
pub async fn fill(choice: &EtcdChoice, cluster: &ClusterName, contents: &Contents) -> Result<(), StoreError> {
    let etcd = Members::connect(choice, cluster).await?;
    let used = || StoreError::Used { place: etcd.names.clone() };
    let identity = etcd.identity().await?;
    let (term, _) = etcd.term().await?;
    if !may_replace(&identity, term, etcd.meta("moved").await?.is_some(), contents) {
        return Err(used());
    }
    let writer = random::hex::<8>().map_err(no_random)?;
    let writes = Writes::of(0, writer);
    let nobody = Compare::create_revision(etcd.key("leader"), CompareOp::Equal, writes.leader());
    let begun = Txn::new().when(vec![nobody]).and_then(vec![etcd.put(WRITTEN, writes.nth(0).as_bytes())]);
    etcd.txn(begun, Some(PATIENCE)).await?;
    let commit = async |operations| etcd.write(&writes, operations).await?.then_some(()).ok_or_else(used);
    let all = || Some(DeleteOptions::new().with_prefix());
    commit(vec![TxnOp::delete(etcd.key("entry/"), all()), TxnOp::delete(etcd.key("journal/"), all())])
        .await?;
    let whole = contents.entries.iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
    let puts = whole.map(|(key, value)| sealed(Op::Put { key: key.clone(), value: value.clone() })).collect();
    for part in chunks(puts, OPS_PER_TXN_MAX, BYTES_PER_TXN_MAX) {
        commit(etcd.operations(part)).await?;
    }
    let identity = serde_json::to_vec(&contents.identity).unwrap_or_default();
    commit(vec![
        etcd.put("meta/identity", &seal("identity", &identity)),
        etcd.put("meta/term", &seal("term", contents.term.0.to_string().as_bytes())),
        TxnOp::delete(etcd.key("meta/moved"), None),
    ])
    .await
}

fn tls_options(tls: &EtcdTls) -> Result<TlsOptions, StoreError> {
    let read = |path: &Path| {
        fs::read(path)
            .map_err(|source| StoreError::Certificate { path: path.to_owned(), source: Arc::new(source) })
    };
    let options = TlsOptions::new().ca_certificate(Certificate::from_pem(read(&tls.ca)?));
    Ok(options.identity(etcd_client::Identity::from_pem(read(&tls.cert)?, read(&tls.key)?)))
}

fn sealed(op: Op) -> Op {
    match op {
        Op::Put { key, value } => Op::Put { value: seal(&key, &value), key },
        delete @ Op::Delete { .. } => delete,
    }
}

impl Members {
    async fn connect(choice: &EtcdChoice, cluster: &ClusterName) -> Result<Self, StoreError> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT)
            .with_timeout(REQUEST)
            .with_keep_alive(CONNECT, CONNECT)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        let mut members = choice.members.clone();
        if let Some(tls) = &choice.tls {
            options = options.with_tls(tls_options(tls)?);
            members.iter_mut().for_each(|member| *member = format!("https://{member}"));
        }
        let names = choice.members.join(",");
        let failed = |source| failure("use", &names, source);
        let client = Client::connect(members, Some(options)).await.map_err(failed)?;
        Ok(Self { client, names, prefix: format!("/berth/{cluster}/") })
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn put(&self, name: &str, value: &[u8]) -> TxnOp {
        TxnOp::put(self.key(name), value, None)
    }

    fn operations(&self, ops: Vec<Op>) -> Vec<TxnOp> {
        let operation = |op| match op {
            Op::Put { key, value } => TxnOp::put(self.key(&format!("entry/{key}")), value, None),
            Op::Delete { key } => TxnOp::delete(self.key(&format!("entry/{key}")), None),
        };
        ops.into_iter().map(operation).collect()
    }

    /// Asks again as long as it may help: for ever without `patience`.
    async fn insist<T>(
        &self,
        action: &'static str,
        patience: Option<Duration>,
        call: impl AsyncFn(Client) -> Result<T, Error>,
    ) -> Result<T, StoreError> {
        let begun = Instant::now();
        let mut warned = begun;
        loop {
            let error = match call(self.client.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let passes = match &error {
                Error::GRpcStatus(status) => passes(status.code() as i32, status.message()),
                Error::IoError(_) | Error::TransportError(_) => true,
                _ => false,
            };
            if !passes || patience.is_some_and(|patience| begun.elapsed() > patience) {
                return Err(failure(action, &self.names, error));
            }
            if warned.elapsed() > PATIENCE {
                warned = Instant::now();
                tracing::warn!(
                    "cannot {action} etcd at {} for {:?} now: {}",
                    self.names,
                    begun.elapsed(),
                    chain(&error)
                );
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn get(
        &self,
        name: &str,
        options: GetOptions,
        patience: Option<Duration>,
    ) -> Result<Option<KeyValue>, StoreError> {
        let key = self.key(name);
        let call = async |client: Client| client.kv_client().get(key.clone(), Some(options.clone())).await;
        Ok(self.insist("read from", patience, call).await?.take_kvs().into_iter().next())
    }

    async fn txn(&self, txn: Txn, patience: Option<Duration>) -> Result<TxnResponse, StoreError> {
        let call = async |client: Client| client.kv_client().txn(txn.clone()).await;
        self.insist("write to", patience, call).await
    }

    /// Of the store; none: it is not there; none within: it is damaged.
    async fn meta(&self, name: &str) -> Result<Option<Option<Vec<u8>>>, StoreError> {
        let stored = self.get(&format!("meta/{name}"), GetOptions::new(), None).await?;
        Ok(stored.map(|stored| unseal(name, stored.value())))
    }

    /// Makes the store where there is none.
    async fn identity(&self) -> Result<Identity, StoreError> {
        loop {
            if let Some(stored) = self.meta("identity").await? {
                let identity = stored.and_then(|value| serde_json::from_slice(&value).ok());
                return identity.ok_or_else(|| self.damaged("its identity is unreadable"));
            }
            let identity = serde_json::to_vec(&Identity::new()?).unwrap_or_default();
            let fresh = vec![Compare::create_revision(self.key("meta/identity"), CompareOp::Equal, 0)];
            // Another controller may be faster: then its store it is.
            let made = vec![
                self.put("meta/identity", &seal("identity", &identity)),
                self.put("meta/term", &seal("term", b"0")),
            ];
            self.txn(Txn::new().when(fresh).and_then(made), None).await?;
        }
    }

    /// And the revision that wrote it.
    async fn term(&self) -> Result<(Term, i64), StoreError> {
        let stored = self.get("meta/term", GetOptions::new(), None).await?;
        let read = stored.and_then(|stored| {
            let value = unseal("term", stored.value())?;
            let term = std::str::from_utf8(&value).ok()?.parse().ok()?;
            Some((Term(term), stored.mod_revision()))
        });
        // Begun anew it would give agents orders that they have heard before.
        read.ok_or_else(|| self.damaged("its term is unreadable"))
    }

    fn damaged(&self, finding: &str) -> StoreError {
        StoreError::Damaged { place: self.names.clone(), finding: finding.to_owned() }
    }

    /// None: another was faster.
    async fn try_to_lead(&self) -> Result<Option<Lead>, StoreError> {
        let sent = clock::boottime();
        let grant = async |mut client: Client| client.lease_grant(LEASE_S, None).await;
        let lease = self.insist("lease from", None, grant).await?.id();
        let (last, written) = self.term().await?;
        let term = last.next();
        let compares = vec![
            Compare::create_revision(self.key("leader"), CompareOp::Equal, 0),
            Compare::mod_revision(self.key("meta/term"), CompareOp::Equal, written),
        ];
        let held = Some(PutOptions::new().with_lease(lease));
        let writer = format!("term {}", term.0);
        let operations = vec![
            TxnOp::put(self.key("leader"), term.0.to_string(), held),
            self.put("meta/term", &seal("term", term.0.to_string().as_bytes())),
            self.put(WRITTEN, format!("{writer}.0").as_bytes()),
        ];
        self.txn(Txn::new().when(compares).and_then(operations), None).await?;
        // Asked, for an answer may be of a second try, and lost the first's.
        let leader = match self.get("leader", GetOptions::new(), None).await? {
            Some(leader) if leader.lease() == lease => leader.create_revision(),
            _ => {
                let _ = self.client.clone().lease_revoke(lease).await;
                return Ok(None);
            }
        };
        let (tell, tenure) = watch::channel(Tenure::renewed(sent));
        let keeper = tokio::spawn(self.clone().keep(lease, tell));
        let writes = Writes::of(leader, writer);
        Ok(Some(Lead { term, lease, writes, tenure, keeper }))
    }

    /// Renews the lease until it is gone, and forgets what etcd keeps of the past.
    async fn keep(mut self, lease: i64, tenure: watch::Sender<Tenure>) {
        let mut past: Option<i64> = None;
        let mut compacted = Instant::now();
        loop {
            let sent = clock::boottime();
            // A stream for each: one that is kept could stall unseen with its member.
            let renewed = tokio::time::timeout(REQUEST, self.client.lease_keep_alive(lease)).await;
            if !renewed.is_ok_and(|renewed| renewed.is_ok()) {
                let left = self.client.lease_time_to_live(lease, None).await;
                if left.is_ok_and(|left| left.ttl() <= 0) {
                    return;
                }
                // At once: another member may answer, and a dead one is asked as often as the others.
                tokio::time::sleep(RETRY).await;
                continue;
            }
            tenure.send_replace(Tenure::renewed(sent));
            if compacted.elapsed() > COMPACT {
                compacted = Instant::now();
                if let Some(revision) = past.take() {
                    // Where it fails the next one does more.
                    let _ = self.client.compact(revision, None).await;
                }
                let now = self.client.get(self.key("leader"), None).await;
                past = now.ok().and_then(|answer| Some(answer.header()?.revision()));
            }
            let next = Duration::from_millis(clock::boottime().since(sent).0);
            tokio::time::sleep(RENEW.saturating_sub(next)).await;
        }
    }
}

fn passes(code: i32, message: &str) -> bool {
    PASSING_CODES.contains(&code) || (code == EXHAUSTED && !message.contains(NO_ROOM))
}

fn too_large(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.code() as i32 == OUT_OF_RANGE)
}

fn failure(action: &'static str, members: &str, source: Error) -> StoreError {
    StoreError::Etcd { action, members: members.to_owned(), source: Arc::new(source) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_member_says_may_pass() {
        for (code, message, expected) in [
            (14, "tcp connect error", true),
            (8, "h2 protocol error: http2 error", true),
            (8, "etcdserver: too many requests", true),
            (8, "etcdserver: mvcc: database space exceeded", false),
            (OUT_OF_RANGE, "too many operations", false),
        ] {
            assert_eq!(passes(code, message), expected, "{message}");
        }
    }
}
