//! `cp`: a job's outputs from the depot into a directory.

use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use berth_protocol::ids::Namespace;
use berth_protocol::message::query::{OutputRow, Query};
use berth_protocol::pod::NO_OUTPUTS;
use flate2::read::GzDecoder;

use super::command::{Cp, CpSource, LogTarget};
use super::config::Settings;
use super::connect::Session;
use super::depot::Depot;
use super::render;
use super::workspace::Progress;

pub async fn cp(settings: &Settings, args: Cp) -> anyhow::Result<u8> {
    let CpSource { target, path } = &args.source;
    let namespace = &settings.namespace;
    let mut session = Session::open(settings, Vec::new()).await?;
    let of_job = |after| Query::Outputs { namespace: namespace.clone(), job: target.job.clone(), after };
    let rows = session.pages(of_job).await?;
    let rows: Vec<OutputRow> = rows.into_iter().map(serde_json::from_value).collect::<Result<_, _>>()?;
    let rows: Vec<OutputRow> =
        rows.into_iter().filter(|row| target.pod.as_ref().is_none_or(|pod| *pod == row.pod)).collect();
    if rows.is_empty() {
        let why = why_none(&mut session, namespace, target).await?;
        let why = why.map(|why| format!(": {why}")).unwrap_or_default();
        bail!("job {namespace}/{} has no outputs in the depot{why}", target.job);
    }
    let depot = Depot::of(&mut session, namespace).await?;
    std::fs::create_dir_all(&args.dir).with_context(|| format!("cannot make {}", args.dir.display()))?;
    let many = rows.iter().any(|row| row.pod != rows[0].pod);
    let mut found = 0;
    for row in newest(rows) {
        let to = if many { args.dir.join(row.pod.to_string()) } else { args.dir.clone() };
        std::fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
        let progress = Progress::new();
        let content = progress.reader(depot.get(&row.path)?, row.bytes);
        let count = unpack(content, path.as_deref(), &to)
            .with_context(|| format!("cannot unpack the outputs of {} into {}", row.pod, to.display()))?;
        progress.clear();
        if count > 0 {
            eprintln!(
                "berth: {count} files of {} in {} ({})",
                row.pod,
                to.display(),
                render::size(row.bytes)
            );
        }
        found += count;
    }
    session.close().await;
    match path {
        Some(path) if found == 0 => Err(anyhow!("the outputs of {} hold no {}", target.job, path.display())),
        _ => Ok(0),
    }
}

/// What the first pod that was to leave some says of it.
async fn why_none(
    session: &mut Session,
    namespace: &Namespace,
    target: &LogTarget,
) -> anyhow::Result<Option<String>> {
    let (namespace, job) = (Some(namespace.clone()), Some(target.job.clone()));
    let of_job = |after| Query::Pods { namespace: namespace.clone(), job: job.clone(), after };
    let rows = session.pages(of_job).await?;
    let pod = target.pod.as_ref().map(ToString::to_string);
    let mut wanted = rows.iter().filter(|row| pod.is_none() || row["pod"].as_str() == pod.as_deref());
    Ok(wanted.find_map(|row| Some(row["message"].as_str()?.split_once(NO_OUTPUTS)?.1.to_owned())))
}

/// Of each pod what its last epoch left.
fn newest(mut rows: Vec<OutputRow>) -> Vec<OutputRow> {
    rows.sort_by(|a, b| (&a.pod, b.epoch).cmp(&(&b.pod, a.epoch)));
    rows.dedup_by(|later, first| later.pod == first.pod);
    rows
}

/// Unpacks what lies at or below `wanted` as `to/NAME`, or everything with its whole path; returns the files' number.
/// It goes through a directory beside the target first, so that no path in the archive leads out of it.
fn unpack(content: impl std::io::Read, wanted: Option<&Path>, to: &Path) -> anyhow::Result<u64> {
    let staging = tempfile::Builder::new().prefix(".berth-cp-").tempdir_in(to)?;
    let mut archive = tar::Archive::new(GzDecoder::new(content));
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    let (mut count, mut whole) = (0, None);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = plain(&entry.path()?);
        if path.as_os_str().is_empty() {
            continue;
        }
        if let Some(wanted) = wanted {
            let Some(found) = tail(&path, wanted) else { continue };
            if whole.get_or_insert_with(|| found.to_owned()) != found {
                continue;
            }
        }
        if entry.unpack_in(staging.path())? && !entry.header().entry_type().is_dir() {
            count += 1;
        }
    }
    match wanted {
        None => merge(staging.path(), to)?,
        Some(wanted) => {
            let from = staging.path().join(whole.as_deref().unwrap_or(wanted));
            if let Some(name) = wanted.file_name().filter(|_| from.symlink_metadata().is_ok()) {
                put(&from, &to.join(name))?;
            }
        }
    }
    Ok(count)
}

/// The part of `path` that `wanted` names, in full or by its last components: `model` names `srv/model/weights`.
fn tail<'a>(path: &'a Path, wanted: &Path) -> Option<&'a Path> {
    let ancestors: Vec<&Path> = path.ancestors().filter(|part| part.ends_with(wanted)).collect();
    ancestors.last().copied()
}

/// The path without what makes it absolute or leads upwards.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|part| matches!(part, Component::Normal(_))).collect()
}

/// Moves everything in `from` into `to`, directories into directories of the same name.
fn merge(from: &Path, to: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        put(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

fn put(from: &Path, to: &Path) -> std::io::Result<()> {
    let is_dir = |path: &Path| path.symlink_metadata().is_ok_and(|meta| meta.is_dir());
    if is_dir(from) && is_dir(to) { merge(from, to) } else { std::fs::rename(from, to) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::write::GzEncoder;

    fn archive(files: &[(&str, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), flate2::Compression::fast()));
        for (path, text) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            // Around the builder's own refusal of paths that lead out.
            header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, text.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap()
    }

    #[test]
    fn a_path_everything_and_no_escape() {
        let files = [("srv/model/a", "A"), ("srv/model/sub/b", "B"), ("srv/other", "C"), ("../../evil", "E")];
        let bytes = archive(&files);
        let root = tempfile::tempdir().unwrap();
        let to = root.path().join("deep/er");
        std::fs::create_dir_all(to.join("model")).unwrap();
        std::fs::write(to.join("model/old"), "O").unwrap();
        let read = |path: &str| std::fs::read_to_string(to.join(path)).unwrap();

        assert_eq!(unpack(&bytes[..], Some(Path::new("srv/model")), &to).unwrap(), 2);
        assert_eq!(
            (read("model/a"), read("model/sub/b"), read("model/old")),
            ("A".into(), "B".into(), "O".into())
        );
        assert!(!to.join("other").exists());
        assert_eq!(unpack(&bytes[..], None, &to).unwrap(), 3);
        assert_eq!(read("srv/other"), "C");
        assert!(!root.path().join("evil").exists());
        assert_eq!(unpack(&bytes[..], Some(Path::new("nothing")), &to).unwrap(), 0);
        let left: Vec<_> = std::fs::read_dir(&to).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(!left.iter().any(|name| name.to_string_lossy().starts_with(".berth")), "{left:?}");
    }
}
