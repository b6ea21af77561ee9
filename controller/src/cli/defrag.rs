//! `defrag`: who would have to move so that the fleet is packed better, and the order to move them.

use std::io::Write as _;

use anyhow::Context as _;
use berth_protocol::message::query::{DefragPlan, PlannedMove, Query};
use berth_protocol::units::Bytes;

use super::command::{Defrag, Format};
use super::config::Settings;
use super::connect::Session;
use super::print_value;
use super::table::Table;

pub async fn defrag(settings: &Settings, args: Defrag) -> anyhow::Result<u8> {
    let mut session = Session::open(settings, Vec::new()).await?;
    let value = session.query(Query::Defrag { moves: args.moves, execute: !args.dry_run }).await?;
    session.close().await;
    let plan: DefragPlan = serde_json::from_value(value.clone())
        .context("the controller's reply cannot be read: is it of another version?")?;
    match settings.format {
        Format::Table | Format::Wide => std::io::stdout().write_all(words(&plan, args.dry_run).as_bytes())?,
        Format::Name => {
            let mut out = std::io::stdout().lock();
            plan.moves.iter().try_for_each(|step| writeln!(out, "{}", step.pod))?;
        }
        format => print_value(format, &value)?,
    }
    Ok(0)
}

fn words(plan: &DefragPlan, dry_run: bool) -> String {
    if plan.moves.is_empty() {
        let mut text =
            "nothing to gain: no move would let a waiting job fit, or leave fewer fragments\n".to_owned();
        let held: u32 = plan.stay.values().sum();
        if held > 0 {
            let reasons: Vec<String> = plan.stay.iter().map(|(why, n)| format!("{n} {why}")).collect();
            text.push_str(&format!(
                "{held} pod{} may not be moved: {}\n",
                if held == 1 { "" } else { "s" },
                reasons.join(", ")
            ));
        }
        return text;
    }
    let mut table = Table::new(vec!["NAMESPACE", "POD", "FROM", "TO", "CPU", "MEMORY", "GPU"]);
    for step in &plan.moves {
        let PlannedMove { namespace, pod, from, to, cpu_milli, memory_bytes, gpu_milli } = step;
        let texts = [namespace.to_string(), pod.to_string(), from.to_string(), to.to_string()];
        let amounts = [cpu_milli.to_string(), memory_bytes.to_string(), devices(*gpu_milli)];
        table.push(texts.into_iter().chain(amounts).map(Into::into).collect());
    }
    let bytes = Bytes(plan.moves.iter().map(|step| step.memory_bytes.0).sum());
    let (n, plural) = (plan.moves.len(), if plan.moves.len() == 1 { "" } else { "s" });
    let gains = match (&plan.serves, plan.fragments_milli) {
        (Some(served), _) => format!("then job {}/{} fits on {}", served.namespace, served.job, served.node),
        (None, Some((before, after))) => {
            format!("free GPUs that the next pod could not use: {}, then {}", devices(before), devices(after))
        }
        (None, None) => String::new(),
    };
    let done = match (plan.executed, dry_run) {
        (true, _) => format!("{n} pod{plural} being moved, one after the other"),
        (false, true) => format!("{n} pod{plural} would move"),
        (false, false) => "nothing was moved: the fleet has just changed, ask again".to_owned(),
    };
    format!("{}{done} (at most {bytes} of memory); {gains}\n", table.render(true, false, &mut Vec::new()))
}

/// Thousandths of devices, as devices.
fn devices(milli: u64) -> String {
    match milli {
        0 => "-".to_owned(),
        milli if milli % 1000 == 0 => (milli / 1000).to_string(),
        milli => format!("{:.2}", milli as f64 / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use berth_protocol::ids::{JobName, Namespace, NodeId};
    use berth_protocol::message::query::{Served, Stays};
    use berth_protocol::units::MilliCpu;

    use super::*;

    #[test]
    fn a_plan_in_words() {
        let namespace = Namespace::parse("lab").unwrap();
        let job = JobName::parse("digits").unwrap();
        let node = |name: &str| NodeId::parse(name).unwrap();
        let step = PlannedMove {
            namespace: namespace.clone(),
            pod: job.pod(0),
            from: node("n1"),
            to: node("n2"),
            cpu_milli: MilliCpu(2000),
            memory_bytes: Bytes(4 * Bytes::GIB),
            gpu_milli: 500,
        };
        let serves = Some(Served { namespace, job, node: node("n1") });
        let mut plan = DefragPlan {
            moves: vec![step],
            serves,
            fragments_milli: None,
            stay: Default::default(),
            executed: false,
        };
        let said = words(&plan, true);
        assert!(
            said.ends_with("1 pod would move (at most 4Gi of memory); then job lab/digits fits on n1\n"),
            "{said}"
        );
        assert!(said.contains("lab        digits-0  n1    n2  2    4Gi     0.50"), "{said}");
        (plan.serves, plan.fragments_milli, plan.executed) = (None, Some((3200, 1000)), true);
        let said = words(&plan, false);
        assert!(said.ends_with("free GPUs that the next pod could not use: 3.20, then 1\n"), "{said}");
        assert!(said.contains("1 pod being moved, one after the other"), "{said}");
        plan.moves.clear();
        assert!(words(&plan, true).starts_with("nothing to gain"));
        plan.stay.insert(Stays::Young, 2);
        plan.stay.insert(Stays::Gang, 1);
        let said = words(&plan, true);
        let reasons = "3 pods may not be moved: 1 of a gang, 2 running for less than a minute\n";
        assert!(said.ends_with(reasons), "{said}");
    }
}
