//! What somebody may have meant: the nearest known word, and what other systems call berth's fields.

use super::schema::{JOB, Kind, Shape};

/// Longer words are not compared: nobody mistypes so much.
const WORD_BYTES_MAX: usize = 40;

/// Names from Kubernetes, Compose, Slurm and Docker, in lowercase and without `-` and `_`.
const FOREIGN: [(&str, &str); 38] = [
    ("cpus", "resources.cpu"),
    ("cores", "resources.cpu"),
    ("mem", "resources.memory"),
    ("memorylimit", "limits.memory"),
    ("cpulimit", "limits.cpu"),
    ("gpus", "resources.gpu"),
    ("nvidia.com/gpu", "resources.gpu"),
    ("replicas", "parallelism"),
    ("entrypoint", "command"),
    ("cmd", "command"),
    ("arguments", "args"),
    ("environment", "env"),
    ("envvars", "env"),
    ("cwd", "workingDir"),
    ("workdir", "workingDir"),
    ("runasuser", "user"),
    ("uid", "user"),
    ("nodeselector", "affinity"),
    ("constraints", "affinity"),
    ("nodeaffinity", "affinity"),
    ("podantiaffinity", "antiAffinity"),
    ("topologyspreadconstraints", "spread"),
    ("volumemounts", "volumes"),
    ("mounts", "volumes"),
    ("mountpath", "mount"),
    ("hostpath", "host"),
    ("source", "host"),
    ("sizelimit", "size"),
    ("target", "mount"),
    ("hostnetwork", "network: host"),
    ("readonlyrootfilesystem", "readOnlyRoot"),
    ("capadd", "capabilities"),
    ("timeout", "activeDeadlineSeconds"),
    ("stopgraceperiod", "terminationGracePeriodSeconds"),
    ("retries", "backoffLimit"),
    ("restart", "restartPolicy"),
    ("priorityclassname", "priority"),
    ("ttl", "ttlSecondsAfterFinished"),
];

/// What stands in a Kubernetes manifest and has no counterpart.
const ADVICE: [(&str, &str); 9] = [
    ("apiversion", "leave it out, a job file has no version"),
    ("metadata", "write `name` and `namespace` at the top"),
    ("spec", "write its fields at the top"),
    ("template", "write its fields at the top"),
    ("labels", "jobs have none"),
    ("annotations", "jobs have none"),
    ("requests", "write `cpu` and `memory` right below `resources`"),
    ("ports", "pods are reached through `network: host`, or not at all"),
    ("schedule", "jobs that recur are not supported by this version"),
];

/// The message on the unknown field `name` of `shape`.
pub(super) fn unknown_field(name: &str, shape: Shape) -> String {
    let word = plain(name);
    let here = || shape.fields().map(|field| field.name);
    let found = (word.len() <= WORD_BYTES_MAX)
        .then(|| {
            let alike = here().find(|known| plain(known) == word);
            let near = || nearest(name, here());
            let foreign = || lookup(&FOREIGN, &word).filter(|known| reachable(known, shape));
            // What another system calls a field says more than the likeness of two words.
            alike.or_else(foreign).or_else(near).map(str::to_owned).or_else(|| below(&word, shape))
        })
        .flatten();
    if let Some(known) = found {
        return format!("unknown field, did you mean `{known}`?");
    }
    if let Some(advice) = lookup(&ADVICE, &word) {
        return format!("unknown field: {advice}");
    }
    if let Some(field) = JOB.fields().find(|field| plain(field.name) == word) {
        return format!("unknown field here; `{}` stands at the top", field.name);
    }
    let known: Vec<&str> = here().collect();
    match known.len() {
        0..=8 => format!("unknown field; known are {}", known.join(", ")),
        _ => "unknown field; `berth schema` lists those known".to_owned(),
    }
}

/// The known word nearest to `word`, if near enough to be a slip.
pub(super) fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > WORD_BYTES_MAX {
        return None;
    }
    let word = word.to_lowercase();
    known
        .map(|candidate| (distance(&word, &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= candidate.len().div_ceil(3).min(3))
        .filter(|(distance, candidate)| *distance < candidate.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

fn lookup(table: &[(&str, &'static str)], word: &str) -> Option<&'static str> {
    table.iter().find(|(foreign, _)| *foreign == word).map(|(_, known)| *known)
}

/// Whether `path` begins with a field of `shape`.
fn reachable(path: &str, shape: Shape) -> bool {
    path.split(['.', ':']).next().is_some_and(|head| shape.field(head).is_some())
}

/// The field of that name one level below, such as `resources.cpu` for `cpu`.
fn below(word: &str, shape: Shape) -> Option<String> {
    shape.fields().find_map(|field| match &field.kind {
        Kind::Object(inner) => inner
            .fields()
            .find(|f| plain(f.name) == word)
            .map(|found| format!("{}.{}", field.name, found.name)),
        _ => None,
    })
}

fn plain(name: &str) -> String {
    name.chars().filter(|c| !matches!(c, '-' | '_')).flat_map(char::to_lowercase).collect()
}

/// Insertions, deletions, replacements and swaps of neighbours from `a` to `b` (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 0..a.len() {
        let mut row = vec![i + 1];
        for j in 0..b.len() {
            let replaced = last[j] + usize::from(a[i] != b[j]);
            let mut least = replaced.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j] {
                least = least.min(before_last[j - 1] + 1);
            }
            row.push(least);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, steps) in [
            ("", "", 0),
            ("cpu", "cpu", 0),
            ("", "cpu", 3),
            ("cpus", "cpu", 1),
            ("pcu", "cpu", 1),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!(distance(a, b), steps, "{a} {b}");
            assert_eq!(distance(b, a), steps, "{b} {a}");
        }
    }

    #[test]
    fn every_name_we_point_to_exists() {
        let exists = |path: &str| {
            let head = path.split([':', '.']).next().unwrap();
            let volume = ["mount", "host", "size"];
            JOB.field(head).is_some() || volume.contains(&head)
        };
        for (foreign, known) in FOREIGN {
            assert!(exists(known), "{foreign} points to {known}");
            assert_eq!(plain(foreign), foreign);
        }
    }
}
