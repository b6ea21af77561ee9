//! Whether berth has kept its word: histories, jobs, what is left, memory; as figures, and in words what is wrong.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Result;

use super::history::{Verdict, check, excerpt};
use super::leaks::Leaks;
use super::run::Soak;
use super::weight::{self, Sample};
use crate::bench::figures::Figure;

/// Lines of one kind that are shown.
const SHOWN: usize = 5;

#[derive(Debug, Default)]
pub struct Judgement {
    pub figures: Vec<Figure>,
    /// What is wrong, in words.
    pub wrong: Vec<String>,
}

impl Judgement {
    fn none_of(&mut self, name: &str, found: &[String]) {
        self.figures.push(Figure::asked(name, found.len() as f64, "", 0.0));
        self.wrong.extend(found.iter().take(SHOWN).map(|what| format!("{name}: {what}")));
    }
}

pub fn judge(soak: &Soak, leaks: &Leaks) -> Result<Judgement> {
    let mut judgement = Judgement::default();
    let injected: usize = soak.injected.values().sum();
    judgement.figures.push(Figure::at_least("faults", injected as f64, "", soak.plan.faults as f64));
    let accepted = soak.work.jobs.values().filter(|job| job.is_accepted()).count();
    judgement.figures.push(Figure::at_least("jobs accepted", accepted as f64, "", 1.0));
    judgement.none_of("jobs never answered", &soak.unanswered);
    let lost: Vec<String> = soak
        .work
        .lost()
        .into_iter()
        .map(|(job, why)| format!("{} {why}: {}", job.name, job.status))
        .collect();
    judgement.none_of("jobs lost", &lost);
    histories(soak, &mut judgement)?;
    judgement.none_of("programs that broke", &soak.ground.crashes);
    judgement.none_of("processes left", &leaks.processes);
    judgement.none_of("mounts left", &leaks.mounts);
    judgement.none_of("control groups left", &leaks.groups);
    judgement.none_of("interfaces left", &leaks.interfaces);
    judgement.none_of("pods' directories left", &leaks.pods);
    for (what, samples) in [("agent", &soak.agent), ("controller", &soak.controller)] {
        match weight::figures(what, samples) {
            Ok(figures) => judgement.figures.extend(figures),
            Err(why) => judgement.wrong.push(why),
        }
    }
    for of in ["evictions", "migrations", "failures"] {
        judgement.figures.push(Figure::peer(of, soak.work.sum(of) as f64, ""));
    }
    let (packets, lost) = soak.ground.packets();
    judgement.figures.push(Figure::peer("packets", packets as f64, ""));
    judgement.figures.push(Figure::peer("packets lost", lost as f64 / packets.max(1) as f64 * 100.0, "%"));
    Ok(judgement)
}

fn histories(soak: &Soak, judgement: &mut Judgement) -> Result<()> {
    let mut verdicts = BTreeMap::new();
    let (mut overlaps, mut skips) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(soak.ground.histories())? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        let pod = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let verdict = check(&text);
        for fault in &verdict.faults {
            let found = format!("{pod}, {fault:?}\n{}", excerpt(&text, fault.line()));
            if fault.is_overlap() { overlaps.push(found) } else { skips.push(found) }
        }
        verdicts.insert(pod, verdict);
    }
    let mut unfinished = Vec::new();
    for job in soak.work.jobs.values().filter(|job| job.phase() == "Succeeded") {
        let whole =
            |pod: &String| verdicts.get(pod).and_then(|verdict| verdict.stopped_at) == Some(job.ticks);
        unfinished.extend(job.whole_pods().filter(|pod| !whole(pod)));
    }
    judgement.none_of("overlaps", &overlaps);
    judgement.none_of("ticks left out", &skips);
    judgement.none_of("pods that ended too early", &unfinished);
    let sum = |of: fn(&Verdict) -> u64| verdicts.values().map(of).sum::<u64>() as f64;
    let ticks = sum(|verdict| verdict.ticks);
    judgement.figures.push(Figure::peer("ticks", ticks, ""));
    judgement.figures.push(Figure::peer(
        "ticks done again",
        sum(|verdict| verdict.repeated) / ticks * 100.0,
        "%",
    ));
    judgement.figures.push(Figure::peer(
        "runs that went on from a checkpoint",
        sum(|verdict| verdict.resumed),
        "",
    ));
    judgement.figures.push(Figure::peer("runs begun anew", sum(|verdict| verdict.begun_anew), ""));
    Ok(())
}

/// Writes down what was last heard of each job, and what programs took of memory, for whoever looks into it.
pub fn keep(soak: &Soak, dir: &Path) -> Result<()> {
    let lines = soak.work.jobs.values().map(|job| format!("{}\n", job.status));
    fs::write(dir.join("jobs.jsonl"), lines.collect::<String>())?;
    for (what, samples) in [("agent", &soak.agent), ("controller", &soak.controller)] {
        let line = |sample: &Sample| format!("{:.3} {} {}\n", sample.at, sample.pid, sample.bytes);
        fs::write(dir.join(format!("memory-{what}.txt")), samples.iter().map(line).collect::<String>())?;
    }
    Ok(())
}
