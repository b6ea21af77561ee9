//! Writes that happen once and in their order, whatever the network does: each has a number, and is compared with the
//! number of the one before.

use std::sync::atomic::{AtomicU64, Ordering};

use etcd_client::{Compare, CompareOp, Txn, TxnOp, TxnOpResponse};

use super::super::StoreError;
use super::{Members, PATIENCE};

/// Which write was the last: whose, and its number.
pub const WRITTEN: &str = "meta/written";

/// One writer's writes. They come one after another: whoever writes waits for it.
pub struct Writes {
    /// The revision that made the leader's key; 0 where nobody is to lead meanwhile.
    leader: i64,
    /// No other writer's.
    writer: String,
    count: AtomicU64,
}

impl Writes {
    pub fn of(leader: i64, writer: String) -> Self {
        Self { leader, writer, count: AtomicU64::new(0) }
    }

    pub fn leader(&self) -> i64 {
        self.leader
    }

    pub fn nth(&self, write: u64) -> String {
        format!("{}.{write}", self.writer)
    }
}

impl Members {
    /// The next of these writes, with its number; false: somebody else leads, or has written.
    pub async fn write(&self, writes: &Writes, mut operations: Vec<TxnOp>) -> Result<bool, StoreError> {
        let before = writes.count.load(Ordering::Relaxed);
        operations.push(self.put(WRITTEN, writes.nth(before + 1).as_bytes()));
        let written = self.guarded(writes, before, before + 1, operations).await?;
        writes.count.store(before + 1, Ordering::Relaxed);
        Ok(written)
    }

    /// Some of what the write before has announced: beside others, in any order, and not after the next.
    pub async fn write_some(&self, writes: &Writes, operations: Vec<TxnOp>) -> Result<bool, StoreError> {
        let now = writes.count.load(Ordering::Relaxed);
        self.guarded(writes, now, now, operations).await
    }

    /// Leads from the write `before` to `after`, or has done so: then the answer was lost, and this is said again.
    async fn guarded(
        &self,
        writes: &Writes,
        before: u64,
        after: u64,
        operations: Vec<TxnOp>,
    ) -> Result<bool, StoreError> {
        let (leader, written) = (self.key("leader"), self.key(WRITTEN));
        let txn = Txn::new()
            .when(vec![
                Compare::create_revision(leader.clone(), CompareOp::Equal, writes.leader),
                Compare::value(written.clone(), CompareOp::Equal, writes.nth(before)),
            ])
            .and_then(operations)
            .or_else(vec![TxnOp::get(leader, None), TxnOp::get(written, None)]);
        let answer = self.txn(txn, Some(PATIENCE)).await?;
        if answer.succeeded() {
            return Ok(true);
        }
        let mut found = answer.op_responses().into_iter().map(|response| match response {
            TxnOpResponse::Get(mut found) => found.take_kvs().into_iter().next(),
            _ => None,
        });
        let (leader, written) = (found.next().flatten(), found.next().flatten());
        let same = leader.map_or(0, |leader| leader.create_revision()) == writes.leader;
        Ok(same && written.is_some_and(|written| written.value() == writes.nth(after).as_bytes()))
    }
}
