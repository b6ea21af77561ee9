//! Owns the choice and removal of what is used least, when the disk fills up.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use serde::{Deserialize, Serialize};

use super::disk::{Disk, WorkDir};
use super::{Digest, ImageRecord};

/// What was used this recently is not removed: between finding an image and being seen as in use by the collector,
/// a pod has this long.
const IDLE_MS_MIN: u64 = 10 * 60 * 1000;

/// What a collection removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Collected {
    pub images: u32,
    pub layers: u32,
    /// Sum of the sizes of files.
    pub bytes: u64,
    /// Leftovers of workers that died.
    pub leftovers: u32,
}

enum Victim {
    Image(Box<ImageRecord>),
    /// In no record: of an image that moved on, or was never completed.
    Layer(Digest),
}

/// Sweeps, then removes what is not in use, the longest unused first, until at most `used_permille_max` of the file
/// system is taken. Layers that a worker holds stay.
pub(super) fn collect(
    disk: &Disk,
    in_use: &BTreeSet<Digest>,
    used_permille_max: u64,
    now_ms: u64,
) -> io::Result<Collected> {
    let mut collected = Collected { leftovers: disk.sweep()?, ..Collected::default() };
    let unused_since_ms = now_ms.saturating_sub(IDLE_MS_MIN);
    let work = disk.work_dir()?;
    let records = disk.records()?;
    let mut holders: BTreeMap<Digest, u32> = BTreeMap::new();
    let layers_of = |record: &ImageRecord| record.layers.iter().copied().collect::<BTreeSet<_>>();
    for layer in records.iter().flat_map(layers_of) {
        *holders.entry(layer).or_default() += 1;
    }
    let mut victims: Vec<(u64, Victim)> = Vec::new();
    for layer in disk.layers()?.into_iter().filter(|layer| !holders.contains_key(layer)) {
        victims.push((disk.layer_used_ms(&layer).unwrap_or(0), Victim::Layer(layer)));
    }
    // Without its record an image in use would only be pulled again.
    let removable = |record: &ImageRecord| {
        record.layers.is_empty() || !record.layers.iter().all(|layer| in_use.contains(layer))
    };
    for record in records.into_iter().filter(removable) {
        victims.push((record.last_used_ms, Victim::Image(Box::new(record))));
    }
    victims.sort_by_key(|(used_ms, _)| *used_ms);
    for (used_ms, victim) in victims {
        if used_ms > unused_since_ms || disk.used_permille()? <= used_permille_max {
            break;
        }
        let freed = match victim {
            Victim::Layer(layer) => BTreeSet::from([layer]),
            Victim::Image(record) => {
                if !disk.remove_record(&record, unused_since_ms)? {
                    continue;
                }
                collected.images += 1;
                let mut layers = layers_of(&record);
                layers.retain(|layer| {
                    let holders = holders.entry(*layer).or_default();
                    *holders = holders.saturating_sub(1);
                    *holders == 0
                });
                layers
            }
        };
        for layer in freed.difference(in_use) {
            if let Some(bytes) = remove_layer(disk, layer, &work, unused_since_ms)? {
                collected.layers += 1;
                collected.bytes += bytes;
            }
        }
    }
    Ok(collected)
}

/// Removes a layer unless a worker has it or it has just been used; its size.
fn remove_layer(
    disk: &Disk,
    layer: &Digest,
    work: &WorkDir,
    unused_since_ms: u64,
) -> io::Result<Option<u64>> {
    let Some(lock) = disk.try_lock(layer, true)? else { return Ok(None) };
    let Some(meta) = disk.layer_meta(layer)? else { return Ok(None) };
    if disk.layer_used_ms(layer)? > unused_since_ms {
        return Ok(None);
    }
    disk.remove_layer(layer, work, &lock)?;
    Ok(Some(meta.bytes))
}
