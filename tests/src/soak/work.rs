//! The jobs of a soak: what they are, what must become of each, and what has. Pure: lists of jobs come in, findings go out.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use fastrand::Rng;
use serde_json::{Value, json};

/// Long enough for the end to be seen, short enough for the controller to hold the same number all the time.
const KEPT_S: u64 = 180;
/// What a program needs for a tick.
const PACE: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Seconds; a failure would be its end.
    Short,
    /// Fails at first, and is to be begun again.
    Retried,
    /// Ends as failed, as it should.
    Doomed,
    /// Saved all along.
    Saved,
    /// Several pods.
    Array,
    /// Minutes; a failure would be its end.
    Long,
    /// Others make way for it.
    Urgent,
}

/// How often of 100.
const CLASSES: [(Class, &str, usize); 7] = [
    (Class::Short, "short", 32),
    (Class::Retried, "retried", 10),
    (Class::Doomed, "doomed", 5),
    (Class::Saved, "saved", 24),
    (Class::Array, "array", 12),
    (Class::Long, "long", 12),
    (Class::Urgent, "urgent", 5),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// On its way; nobody has said yes.
    Sent,
    Accepted(Instant),
    Ended(Instant),
}

#[derive(Debug)]
pub struct Job {
    pub name: String,
    class: Class,
    pub file: Value,
    /// Ticks of each pod.
    pub ticks: u64,
    state: State,
    /// The last that was heard of it.
    pub status: Value,
    /// Lists in which it should have been.
    missing: u32,
}

impl Job {
    /// Whether its programs may be killed: that counts as a failure of its own.
    pub fn forgives(&self) -> bool {
        matches!(self.class, Class::Retried | Class::Saved | Class::Array)
    }

    fn is_open(&self) -> bool {
        matches!(self.state, State::Accepted(_))
    }

    pub fn is_accepted(&self) -> bool {
        self.state != State::Sent
    }

    pub fn phase(&self) -> &str {
        self.status["phase"].as_str().unwrap_or("unseen")
    }

    fn wanted(&self) -> &'static str {
        if self.class == Class::Doomed { "Failed" } else { "Succeeded" }
    }

    /// Names of the pods that must have come to their end.
    pub fn whole_pods(&self) -> impl Iterator<Item = String> + use<'_> {
        let count = self.file["completions"].as_u64().unwrap_or(1);
        let count = if self.class == Class::Doomed { 0 } else { count };
        (0..count).map(|index| format!("{}-{index}", self.name))
    }
}

/// What a job's program is called with, and where it may write.
pub struct Means<'a> {
    pub program: &'a Path,
    pub histories: &'a Path,
}

/// All jobs, by name.
#[derive(Debug, Default)]
pub struct Work {
    pub jobs: BTreeMap<String, Job>,
}

/// The next job, which without faults is over in `left`.
pub fn draw(random: &mut Rng, number: usize, left: Duration, means: &Means) -> Job {
    let mut ticket = random.usize(0..CLASSES.iter().map(|row| row.2).sum());
    let mut chosen = CLASSES[0];
    for row in CLASSES {
        chosen = row;
        match ticket.checked_sub(row.2) {
            Some(rest) => ticket = rest,
            None => break,
        }
    }
    let (class, word, _) = chosen;
    let name = format!("{word}-{number}");
    let span = match class {
        Class::Short | Class::Doomed => 20..120,
        Class::Retried => 40..200,
        Class::Urgent => 40..120,
        Class::Array => 60..400,
        Class::Saved => 300..1600,
        Class::Long => 1600..5000,
    };
    let most = (left.as_millis() / PACE.as_millis()) as u64;
    let ticks = random.u64(span).min(most.max(20));
    let tries_failed = match class {
        Class::Retried => random.u64(1..=2),
        Class::Doomed => 1000,
        _ => 0,
    };
    let mut file = json!({
        "name": name,
        "image": "host",
        "command": [means.program, "tick", means.histories, name, ticks.to_string(), tries_failed.to_string()],
        "network": *random.choice(&["none", "none", "bridge", "host"]).unwrap_or(&"none"),
        "resources": {"cpu": if class == Class::Urgent { "500m" } else { "100m" }, "memory": "48Mi"},
        "volumes": [{"mount": means.histories, "host": means.histories}],
        "terminationGracePeriodSeconds": 5,
        "ttlSecondsAfterFinished": KEPT_S,
    });
    let forgiving = |file: &mut Value, limit: u32| {
        file["restartPolicy"] = "OnFailure".into();
        file["backoffLimit"] = limit.into();
        file["retry"] = json!({"min": "1s", "max": "5s"});
    };
    match class {
        Class::Short => {}
        Class::Retried => forgiving(&mut file, 1000),
        Class::Doomed if random.bool() => forgiving(&mut file, 1),
        Class::Doomed => {}
        Class::Saved => {
            forgiving(&mut file, 1000);
            file["checkpoint"] = json!({"mode": "criu", "interval": format!("{}s", random.u64(8..25))});
        }
        Class::Array => {
            forgiving(&mut file, 1000);
            let parallelism = random.u64(2..=4);
            file["parallelism"] = parallelism.into();
            file["completions"] = (parallelism + random.u64(0..=2)).into();
        }
        Class::Long => {
            file["checkpoint"] = json!({"mode": "criu", "interval": format!("{}s", random.u64(15..40))})
        }
        Class::Urgent => file["priority"] = 100.into(),
    }
    if random.u32(0..4) > 0 {
        let what = *random.choice(&["pause", "pause", "stop", "continue"]).unwrap_or(&"pause");
        file["onDisconnect"] = json!({"after": "20s", "do": what, "lostAfter": "30s"});
    }
    let status = Value::Null;
    Job { name, class, file, ticks, state: State::Sent, status, missing: 0 }
}

/// How the jobs are, in numbers.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub sent: usize,
    pub running: usize,
    pub waiting: usize,
    pub ended: usize,
}

impl Work {
    pub fn accepted(&mut self, name: &str, now: Instant) {
        if let Some(job) = self.jobs.get_mut(name)
            && job.state == State::Sent
        {
            job.state = State::Accepted(now);
        }
    }

    /// Takes in the controller's list of all jobs, which was asked for at `asked`.
    pub fn listed(&mut self, rows: &[Value], asked: Instant, now: Instant) {
        let rows: BTreeMap<&str, &Value> =
            rows.iter().filter_map(|row| Some((row["job"].as_str()?, row))).collect();
        for job in self.jobs.values_mut().filter(|job| job.is_open()) {
            match rows.get(job.name.as_str()) {
                Some(row) => {
                    job.status = (*row).clone();
                    job.missing = 0;
                    if matches!(job.phase(), "Succeeded" | "Failed" | "Cancelled" | "Rejected") {
                        job.state = State::Ended(now);
                    }
                }
                // One that was accepted since may be missing.
                None => {
                    job.missing += u32::from(matches!(job.state, State::Accepted(since) if since < asked))
                }
            }
        }
    }

    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for job in self.jobs.values() {
            match job.state {
                State::Sent => counts.sent += 1,
                State::Accepted(_) if job.phase() == "Running" => counts.running += 1,
                State::Accepted(_) => counts.waiting += 1,
                State::Ended(_) => counts.ended += 1,
            }
        }
        counts
    }

    /// Nothing is on its way or running; a job that is nowhere is not waited for.
    pub fn is_over(&self) -> bool {
        self.jobs.values().all(|job| matches!(job.state, State::Ended(_)) || job.missing > 1)
    }

    /// Jobs with a pod that runs, and its node.
    pub fn running(&self) -> impl Iterator<Item = (&Job, &str)> {
        self.jobs.values().filter(|job| job.is_open()).filter_map(|job| {
            let pods = job.status["pods"].as_array()?;
            let pod = pods.iter().find(|pod| pod["phase"] == "Running")?;
            Some((job, pod["node"].as_str()?))
        })
    }

    /// Accepted jobs that did not end as their file says, with what was last heard.
    pub fn lost(&self) -> Vec<(&Job, String)> {
        let why = |job: &Job| match job.state {
            State::Sent => None,
            State::Accepted(_) if job.missing > 1 => Some("has vanished".to_owned()),
            State::Accepted(_) => Some(format!("has not ended: {}", job.phase())),
            State::Ended(_) if job.phase() != job.wanted() => {
                Some(format!("is {}, and not {}", job.phase(), job.wanted()))
            }
            State::Ended(_) => None,
        };
        self.jobs.values().filter_map(|job| Some((job, why(job)?))).collect()
    }

    /// The sum of a number that every status has.
    pub fn sum(&self, of: &str) -> u64 {
        self.jobs.values().filter_map(|job| job.status[of].as_u64()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(seed: u64, count: usize) -> Work {
        let mut random = Rng::with_seed(seed);
        let means = Means { program: Path::new("/bin/soak"), histories: Path::new("/tmp/h") };
        let job = |number| draw(&mut random, number, Duration::from_secs(600), &means);
        Work { jobs: (0..count).map(job).map(|job| (job.name.clone(), job)).collect() }
    }

    #[test]
    fn every_job_file_is_one() {
        for job in work(3, 300).jobs.values() {
            let file = job.file.to_string();
            let parsed = berth_protocol::job::parse(file.as_bytes(), None);
            assert!(parsed.is_ok(), "{file}: {:?}", parsed.err());
        }
    }

    #[test]
    fn what_became_of_jobs_is_known() {
        let mut work = work(3, 40);
        let begun = Instant::now();
        let later = begun + Duration::from_secs(1);
        let names: Vec<String> = work.jobs.keys().cloned().collect();
        names.iter().skip(1).for_each(|name| work.accepted(name, begun));
        let row = |name: &String| json!({"job": name, "phase": work.jobs[name].wanted()});
        let mut rows: Vec<Value> = names.iter().skip(3).map(row).collect();
        rows[0]["phase"] = "Cancelled".into();
        rows.push(json!({"job": names[2], "phase": "Running", "pods": [{"phase": "Running", "node": "n1"}]}));
        work.listed(&rows, later, later);
        work.listed(&rows, later, later);
        let counts = Counts { sent: 1, running: 1, waiting: 1, ended: 37 };
        assert_eq!(work.counts(), counts);
        let lost: Vec<(String, String)> =
            work.lost().into_iter().map(|(job, why)| (job.name.clone(), why)).collect();
        assert_eq!(lost.len(), 3);
        assert_eq!(lost[0], (names[1].clone(), "has vanished".to_owned()));
        assert_eq!(lost[1], (names[2].clone(), "has not ended: Running".to_owned()));
        assert!(lost[2].1.starts_with("is Cancelled, and not "));
        assert_eq!(
            work.running().map(|(job, node)| (job.name.as_str(), node)).next(),
            Some((&*names[2], "n1"))
        );
    }
}
