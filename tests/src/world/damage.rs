//! A disk that gives back other bytes than were written, of one record of the store.

use std::collections::BTreeMap;

use berth_controller::core::Controller;
use berth_controller::io::store::seal;
use berth_protocol::ids::{Epoch, JobUid};

use super::rollback::number;
use super::{Due, Fault, World};
use crate::node::change_digit;

/// Draws a record that changes while no controller is there to write it anew.
pub(crate) fn damage(rng: &mut fastrand::Rng, span: u64) -> Vec<(u64, Fault)> {
    let at = rng.u64(1_000..span);
    let back = (at + rng.u64(10..20_000)).min(span);
    vec![(at, Fault::ControllerCrash), (at, Fault::Spoil(rng.u64(..))), (back, Fault::ControllerStart)]
}

/// The job to which a record belongs.
fn job_of(key: &str) -> Option<JobUid> {
    let (kind, name) = key.split_once('/')?;
    let uid = name.split_once('/').map_or(name, |(uid, _)| uid);
    JobUid::parse(uid).ok().filter(|_| ["job", "run", "pod"].contains(&kind))
}

impl World {
    /// As a controller is given them that begins now.
    pub(super) fn entries(&self) -> Vec<(String, Option<Vec<u8>>)> {
        let read = |(key, value): (&String, &Vec<u8>)| match self.spoilt.get(key) {
            Some(stored) => (key.clone(), seal::unseal(key, stored)),
            None => (key.clone(), Some(value.clone())),
        };
        self.store.iter().map(read).collect()
    }

    /// Of a job that nobody is about to submit: it would be another one.
    pub(super) fn spoil(&mut self, seed: u64) {
        let sent = |n: usize| {
            let again = |due: &Due| matches!(due, Due::Submit(other) | Due::Resubmit(other) if *other == n);
            self.due.values().any(again)
        };
        let settled: Vec<&str> = (0..self.jobs.len())
            .filter(|n| !sent(*n))
            .map(|n| self.jobs[n].name.as_str())
            .filter(|job| self.oracle.has_accepted(job))
            .collect();
        let named = |key: &String| {
            let job = self.job_name(&job_of(key)?)?;
            settled.contains(&job.as_str()).then(|| (key.clone(), job))
        };
        let records: Vec<(String, String)> = self.store.keys().filter_map(named).collect();
        let Some((key, job)) = fastrand::Rng::with_seed(seed).choice(records) else { return };
        let whole = seal::seal(&key, &self.store[&key]);
        let mut stored = whole.clone();
        change_digit(&mut stored, seed);
        let Some(uid) = job_of(&key).filter(|_| stored != whole) else { return };
        self.note(|| format!("{key} of {job} is damaged: {}", String::from_utf8_lossy(&stored[8..])));
        let of_job = self.store.iter().filter_map(|(key, record)| {
            let (pod, index) = key.strip_prefix("pod/")?.split_once('/')?;
            Some((index.parse().ok().filter(|_| pod == uid.as_str())?, Epoch(number(Some(record), "epoch"))))
        });
        let epochs: BTreeMap<u32, Epoch> = of_job.collect();
        self.oracle.damaged(job, uid, epochs);
        self.spoilt.insert(key, stored);
    }

    fn job_name(&self, uid: &JobUid) -> Option<String> {
        let file: serde_json::Value = serde_json::from_slice(self.store.get(&format!("job/{uid}"))?).ok()?;
        Some(file["spec"]["name"].as_str()?.to_owned())
    }

    /// Nothing but what is damaged is set aside.
    pub(super) fn check_aside(&self, controller: &Controller) -> Result<(), String> {
        let mut aside = controller.set_aside().jobs.iter();
        match aside.find(|uid| !self.oracle.is_damaged(uid)) {
            Some(uid) => Err(format!("the job with uid {uid} is set aside, and all its records are whole")),
            None => Ok(()),
        }
    }

    /// What belongs to a damaged record is left as it is.
    pub(super) fn check_write(&self, key: &str) -> Result<(), String> {
        match job_of(key).filter(|uid| self.oracle.is_damaged(uid)) {
            Some(_) => Err(format!("{key} is written, and a record of its job is damaged")),
            None => Ok(()),
        }
    }
}
