//! Who is served next: priority, then the namespace with the least share, then the order of submission. Jobs that ask
//! for the same are one line, so that what fits nowhere is asked once for all of them. Knows no rooms.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use berth_protocol::ids::{JobUid, Namespace};
use berth_protocol::units::BootMs;

use super::place::ClassId;

/// Jobs that are refused together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Line {
    pub class: ClassId,
    /// All or none of so many.
    pub gang: Option<usize>,
    /// What its own pods stand in the way of, or have brought to a node, is this job's alone.
    pub own: Option<JobUid>,
}

/// A waiting job's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    pub priority: i32,
    pub namespace: Namespace,
    pub line: Line,
    pub seq: u64,
    /// Since when none of its pods was placed.
    pub since: BootMs,
}

type Lines = BTreeMap<Line, BTreeSet<(u64, JobUid)>>;

/// Every job that has pods ready to be placed.
#[derive(Debug, Default)]
pub struct Queue {
    levels: BTreeMap<Reverse<i32>, BTreeMap<Namespace, Lines>>,
    tickets: BTreeMap<JobUid, Ticket>,
    /// Longest waiting first.
    ages: BTreeSet<(BootMs, JobUid)>,
    /// The rooms' version at which a line was last refused.
    refused: BTreeMap<(Namespace, Line), u64>,
}

impl Queue {
    pub fn insert(&mut self, uid: &JobUid, ticket: Ticket) {
        self.remove(uid);
        let level = self.levels.entry(Reverse(ticket.priority)).or_default();
        let lines = level.entry(ticket.namespace.clone()).or_default();
        lines.entry(ticket.line.clone()).or_default().insert((ticket.seq, uid.clone()));
        self.ages.insert((ticket.since, uid.clone()));
        self.tickets.insert(uid.clone(), ticket);
    }

    pub fn remove(&mut self, uid: &JobUid) -> Option<Ticket> {
        let ticket = self.tickets.remove(uid)?;
        self.ages.remove(&(ticket.since, uid.clone()));
        let level = self.levels.get_mut(&Reverse(ticket.priority))?;
        let lines = level.get_mut(&ticket.namespace)?;
        let line = lines.get_mut(&ticket.line)?;
        line.remove(&(ticket.seq, uid.clone()));
        if line.is_empty() {
            lines.remove(&ticket.line);
            let others = self.levels.values().filter_map(|level| level.get(&ticket.namespace));
            if !others.into_iter().any(|lines| lines.contains_key(&ticket.line)) {
                self.refused.remove(&(ticket.namespace.clone(), ticket.line.clone()));
            }
        }
        if let Some(level) = self.levels.get_mut(&Reverse(ticket.priority)) {
            level.retain(|_, lines| !lines.is_empty());
            if level.is_empty() {
                self.levels.remove(&Reverse(ticket.priority));
            }
        }
        Some(ticket)
    }

    pub fn ticket(&self, uid: &JobUid) -> Option<&Ticket> {
        self.tickets.get(uid)
    }

    pub fn len(&self) -> usize {
        self.tickets.len()
    }

    /// The line fits nowhere at this version of the rooms.
    pub fn refuse(&mut self, ticket: &Ticket, version: u64) {
        self.refused.insert((ticket.namespace.clone(), ticket.line.clone()), version);
    }

    /// Of the highest priority that has a line not refused at `version`: the first job, and whether its namespace is
    /// the only one there.
    pub fn next(&self, version: u64, share: impl Fn(&Namespace) -> u128) -> Option<(JobUid, bool)> {
        for level in self.levels.values() {
            let mut open = level.iter().filter_map(|(namespace, lines)| {
                let asked = lines.iter().filter(|(line, _)| {
                    // A key made for each look is dearer than the look: few lines are ever refused.
                    self.refused.is_empty()
                        || self
                            .refused
                            .get(&(namespace.clone(), (*line).clone()))
                            .is_none_or(|at| *at < version)
                });
                let first = asked.filter_map(|(_, jobs)| jobs.first()).min()?;
                Some((namespace, &first.1))
            });
            let Some(first) = open.next() else { continue };
            let rest: Vec<_> = open.collect();
            let alone = rest.is_empty();
            if alone {
                return Some((first.1.clone(), true));
            }
            let all = std::iter::once(first).chain(rest);
            let least = all.min_by_key(|(namespace, _)| (share(namespace), *namespace));
            return least.map(|(_, uid)| (uid.clone(), false));
        }
        None
    }

    /// One of the job's pods was placed.
    pub fn served(&mut self, uid: &JobUid, now: BootMs) {
        let Some(ticket) = self.tickets.get_mut(uid) else { return };
        let before = std::mem::replace(&mut ticket.since, now);
        self.ages.remove(&(before, uid.clone()));
        self.ages.insert((now, uid.clone()));
    }

    /// Longest waiting first, at most `most`.
    pub fn oldest(&self, most: usize) -> impl Iterator<Item = &(BootMs, JobUid)> {
        self.ages.iter().take(most)
    }

    /// The first job of each line, in order, at most `most`.
    pub fn heads(&self, most: usize, share: impl Fn(&Namespace) -> u128) -> Vec<JobUid> {
        let mut heads = Vec::new();
        for level in self.levels.values() {
            let mut namespaces: Vec<_> = level.iter().collect();
            namespaces.sort_by_key(|(namespace, _)| (share(namespace), *namespace));
            for (_, lines) in namespaces {
                let mut first: Vec<_> = lines.values().filter_map(|jobs| jobs.first()).collect();
                first.sort();
                heads.extend(first.into_iter().map(|(_, uid)| uid.clone()));
                if heads.len() >= most {
                    heads.truncate(most);
                    return heads;
                }
            }
        }
        heads
    }

    /// All jobs in the order in which they would be served if nobody's share changed.
    pub fn in_order(&self, share: impl Fn(&Namespace) -> u128) -> Vec<&JobUid> {
        let mut all: Vec<&JobUid> = Vec::with_capacity(self.tickets.len());
        for level in self.levels.values() {
            let mut namespaces: Vec<_> = level.iter().collect();
            namespaces.sort_by_key(|(namespace, _)| (share(namespace), *namespace));
            for (_, lines) in namespaces {
                let mut jobs: Vec<&(u64, JobUid)> = lines.values().flatten().collect();
                jobs.sort();
                all.extend(jobs.into_iter().map(|(_, uid)| uid));
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(name: &str) -> JobUid {
        JobUid::parse(name).unwrap()
    }

    fn ticket(priority: i32, namespace: &str, class: ClassId, seq: u64) -> Ticket {
        let namespace = Namespace::parse(namespace).unwrap();
        Ticket { priority, namespace, line: Line { class, gang: None, own: None }, seq, since: BootMs(seq) }
    }

    fn next(queue: &Queue, version: u64, rich: &str) -> Option<String> {
        let share = |namespace: &Namespace| u128::from(namespace.as_str() == rich);
        queue.next(version, share).map(|(uid, _)| uid.to_string())
    }

    #[test]
    fn priority_then_share_then_order() {
        let mut queue = Queue::default();
        for (name, priority, namespace, class, seq) in
            [("j1", 0, "a", 0, 1), ("j2", 0, "a", 0, 2), ("j3", 0, "b", 0, 3), ("j4", 5, "a", 1, 4)]
        {
            queue.insert(&uid(name), ticket(priority, namespace, class, seq));
        }
        assert_eq!(next(&queue, 1, "a").as_deref(), Some("j4"));
        queue.remove(&uid("j4"));
        assert_eq!(next(&queue, 1, "a").as_deref(), Some("j3"));
        assert_eq!(next(&queue, 1, "b").as_deref(), Some("j1"));
        let order = queue.in_order(|namespace| u128::from(namespace.as_str() == "a"));
        assert_eq!(order, [&uid("j3"), &uid("j1"), &uid("j2")]);
    }

    #[test]
    fn a_line_is_refused_as_one_until_rooms_change() {
        let mut queue = Queue::default();
        for (name, class, seq) in [("j1", 0, 1), ("j2", 0, 2), ("j3", 1, 3)] {
            queue.insert(&uid(name), ticket(0, "a", class, seq));
        }
        queue.refuse(&ticket(0, "a", 0, 1), 7);
        assert_eq!(next(&queue, 7, "").as_deref(), Some("j3"));
        assert_eq!(next(&queue, 8, "").as_deref(), Some("j1"));
        queue.remove(&uid("j1"));
        assert_eq!(next(&queue, 7, "").as_deref(), Some("j3"));
        queue.remove(&uid("j2"));
        queue.insert(&uid("j2"), ticket(0, "a", 0, 2));
        assert_eq!(next(&queue, 7, "").as_deref(), Some("j2"), "an empty line forgets");
        queue.remove(&uid("j2"));
        queue.remove(&uid("j3"));
        assert!(queue.levels.is_empty() && queue.refused.is_empty() && queue.len() == 0);
    }
}
