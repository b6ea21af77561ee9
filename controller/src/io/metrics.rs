//! Counts what `io` refuses, and writes `/metrics`: those counts and the core's in Prometheus' text form.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::http::Report;

/// The same reason is logged at most this often.
const LOG_PERIOD: Duration = Duration::from_secs(60);

/// What `io` turned away, by reason: `acl`, `oversized`, `token`, …
#[derive(Debug, Default)]
pub struct Refusals {
    by_reason: Mutex<BTreeMap<&'static str, Refusal>>,
}

#[derive(Debug, Default)]
struct Refusal {
    count: u64,
    logged: Option<Instant>,
}

impl Refusals {
    /// Counts one, and says so once a minute a reason.
    pub fn refuse(&self, reason: &'static str, what: fmt::Arguments<'_>) {
        let mut by_reason = self.by_reason.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let refusal = by_reason.entry(reason).or_default();
        refusal.count += 1;
        if refusal.logged.is_none_or(|at| at.elapsed() >= LOG_PERIOD) {
            refusal.logged = Some(Instant::now());
            tracing::warn!(reason, total = refusal.count, "refused {what}");
        }
    }

    pub fn count(&self, reason: &str) -> u64 {
        let by_reason = self.by_reason.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        by_reason.get(reason).map_or(0, |refusal| refusal.count)
    }

    fn counts(&self) -> BTreeMap<&'static str, u64> {
        let by_reason = self.by_reason.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        by_reason.iter().map(|(reason, refusal)| (*reason, refusal.count)).collect()
    }
}

/// The text of `/metrics`.
pub fn render(report: Report, refusals: &Refusals) -> String {
    let core = &report.counters;
    let mut refused = refusals.counts();
    for (reason, count) in &core.refused {
        *refused.entry(reason).or_default() += count;
    }
    let mut registry = Registry::with_prefix("berth");
    registry.register_collector(Box::new(Scrape { report, refused }));
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Scrape {
    report: Report,
    refused: BTreeMap<&'static str, u64>,
}

impl Collector for Scrape {
    fn encode(&self, mut to: DescriptorEncoder) -> fmt::Result {
        let core = &self.report.counters;
        counters(&mut to, "messages", "Messages received, by kind", "kind", &core.messages)?;
        counters(&mut to, "refused", "Messages and requests refused, by reason", "reason", &self.refused)?;
        gauges(&mut to, "jobs", "Jobs now, by phase", "phase", &core.jobs)?;
        gauges(&mut to, "pods", "Pods of unfinished jobs now, by phase", "phase", &core.pods)?;
        gauges(&mut to, "nodes", "Nodes now, by state", "state", &core.nodes)?;
        counter(&mut to, "placements", "Pods placed since the start", core.placements)?;
        counter(&mut to, "evictions", "Pods evicted since the start", core.evictions)?;
        counter(&mut to, "failures", "Pods that failed since the start", core.failures)?;
        counter(&mut to, "migrations", "Pods moved by way of a checkpoint since the start", core.migrations)?;
        counter(&mut to, "checkpoints", "Checkpoints taken since the start", core.checkpoints)?;
        counter(&mut to, "checkpoint_failures", "Checkpoints that failed", core.checkpoint_failures)?;
        counter(&mut to, "restores", "Pods started from a checkpoint since the start", core.restores)?;
        counter(&mut to, "restore_failures", "Starts from a checkpoint that failed", core.restore_failures)?;
        counter(&mut to, "prices", "Times that room was given new prices", core.prices)?;
        number(&mut to, "depot_checkpoints", "Checkpoints in the depot", self.report.depot_checkpoints)?;
        number(&mut to, "depot_chunk_bytes", "Bytes of their chunks", self.report.depot_bytes)?;
        let (records, jobs) = core.damaged;
        number(&mut to, "damaged_records", "Records of the store that cannot be read", records as u64)?;
        let help = "Jobs that are not loaded because a record of theirs cannot be read";
        number(&mut to, "jobs_set_aside", help, jobs as u64)?;
        if let Some(expires) = core.key_expires {
            let help = "When the key that signs orders expires, in seconds since 1970";
            number(&mut to, "controller_key_expires_seconds", help, expires.0 / 1000)?;
        }
        gauge(&mut to, "blind", "1 while silence is held to be the controller's own blindness", core.blind)?;
        gauge(&mut to, "bus_up", "1 while the broker is connected", self.report.bus_up)
    }
}

type NoExemplar = [(&'static str, &'static str); 0];
type ByLabel = BTreeMap<&'static str, u64>;

fn counter(to: &mut DescriptorEncoder, name: &str, help: &str, value: u64) -> fmt::Result {
    to.encode_descriptor(name, help, None, MetricType::Counter)?
        .encode_counter::<NoExemplar, _, u64>(&value, None)
}

fn gauge(to: &mut DescriptorEncoder, name: &str, help: &str, value: bool) -> fmt::Result {
    number(to, name, help, u64::from(value))
}

fn number(to: &mut DescriptorEncoder, name: &str, help: &str, value: u64) -> fmt::Result {
    to.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
}

fn counters(
    to: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    label: &'static str,
    by: &ByLabel,
) -> fmt::Result {
    let mut family = to.encode_descriptor(name, help, None, MetricType::Counter)?;
    by.iter().try_for_each(|(of, value)| {
        family.encode_family(&[(label, *of)])?.encode_counter::<NoExemplar, _, u64>(value, None)
    })
}

fn gauges(
    to: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    label: &'static str,
    by: &ByLabel,
) -> fmt::Result {
    let mut family = to.encode_descriptor(name, help, None, MetricType::Gauge)?;
    by.iter().try_for_each(|(of, value)| family.encode_family(&[(label, *of)])?.encode_gauge(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_of_io_and_core_are_one_metric() {
        let refusals = Refusals::default();
        refusals.refuse("acl", format_args!("a test"));
        refusals.refuse("malformed", format_args!("a test"));
        let mut core = crate::core::Counters::default();
        core.refused.insert("malformed", 2);
        core.nodes.insert("online", 3);
        let text =
            render(Report { bus_up: true, counters: core, depot_bytes: 5, depot_checkpoints: 2 }, &refusals);
        for line in [
            "berth_refused_total{reason=\"acl\"} 1",
            "berth_refused_total{reason=\"malformed\"} 3",
            "berth_nodes{state=\"online\"} 3",
            "berth_bus_up 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
