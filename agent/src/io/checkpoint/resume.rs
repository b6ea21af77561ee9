//! A pod's last checkpoint on this node, laid out for its next run without the depot. Every byte is verified, as one that
//! was fetched; what is not whole is passed over for the one before.

use std::fs;
use std::path::{Path, PathBuf};

use berth_protocol::ids::Digest;
use berth_protocol::manifest::Manifest;

use super::fetch::{approve, give, is_of, link, make_parent, places};
use super::store::MANIFEST;
use super::{Resume, TransferError, named, own_ones};
use crate::shim::checkpoint::Parts;
use crate::shim::log;

/// # Errors
/// None that is kept here is whole; what was wrong with the newest is said.
pub fn resume(order: &Resume) -> Result<(), TransferError> {
    let mut first = None;
    for dir in candidates(order) {
        match lay_out(order, &dir) {
            Ok(log_records) => {
                return log::cut(&order.log, log_records)
                    .map_err(TransferError::io("cannot set the log back"));
            }
            Err(error) => drop(first.get_or_insert(error)),
        }
    }
    Err(first.unwrap_or_else(|| TransferError::Unfit("this node keeps no checkpoint of it".to_owned())))
}

/// The newest first: what the depot has not heard of was taken after what it has.
fn candidates(order: &Resume) -> Vec<PathBuf> {
    let entries = fs::read_dir(&order.cache).into_iter().flatten().flatten().map(|entry| entry.path());
    let kept = entries.filter(|dir| named(dir).as_ref() == Some(&order.pod));
    own_ones(&order.own).into_iter().filter(|dir| dir.join(MANIFEST).exists()).chain(kept).collect()
}

/// Returns how many records of this epoch's log the checkpoint has seen.
fn lay_out(order: &Resume, from: &Path) -> Result<u64, TransferError> {
    let unfit = |why: String| TransferError::Unfit(format!("{} is passed over: {why}", from.display()));
    let bytes = fs::read(from.join(MANIFEST)).map_err(TransferError::io("cannot read a manifest"))?;
    let manifest = Manifest::parse(&Digest::of(&bytes), &bytes).map_err(|error| unfit(error.to_string()))?;
    if manifest.pod != order.pod || manifest.epoch > order.epoch {
        return Err(unfit("it is of another pod".to_owned()));
    }
    is_of(&manifest, &order.template, &order.images)?;
    let half = order.dir.with_extension("half");
    let wrong = |e| TransferError::io(format!("cannot write below {}", half.display()))(e);
    if half.exists() {
        fs::remove_dir_all(&half).map_err(wrong)?;
    }
    let volumes = &order.template.volumes;
    let theirs = places(&manifest, volumes, &Parts::new(from.to_owned()))?;
    let ours = places(&manifest, volumes, &Parts::new(half.clone()))?;
    for ((there, saved), (here, _)) in theirs.iter().zip(&ours) {
        make_parent(here).map_err(wrong)?;
        if !link(there, here, saved) {
            return Err(unfit(format!("{} is not as it was written", saved.name)));
        }
    }
    approve(&manifest, &half, &order.template)?;
    give(&half, &order.dir).map_err(wrong)?;
    Ok(if manifest.epoch == order.epoch { manifest.log_records } else { 0 })
}
