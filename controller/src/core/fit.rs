//! What is longer than a message may be, cut down to one. Pure.

use berth_protocol::limits::HUMAN_MESSAGE_BYTES_MAX;
use berth_protocol::message::user::JobStatus;

/// Stands for what was cut off.
const CUT: &str = "…";
/// Where no more than this of each message has room, fewer pods are listed instead.
const SAID_BYTES_MIN: usize = 32;

/// Cuts a text for people down to `bytes_max`.
pub(super) fn shorten(text: &mut String, bytes_max: usize) {
    if text.len() > bytes_max {
        text.truncate(text.floor_char_boundary(bytes_max.saturating_sub(CUT.len())));
        text.push_str(CUT);
    }
}

/// Cuts first what is said of the pods, then how many are listed: `podCounts` counts them all the same.
pub(super) fn status(status: &mut JobStatus, bytes_max: usize) {
    let fits = |status: &JobStatus| serde_json::to_vec(status).is_ok_and(|json| json.len() <= bytes_max);
    if fits(status) {
        return;
    }
    if let Some(message) = &mut status.message {
        shorten(message, 2 * HUMAN_MESSAGE_BYTES_MAX);
    }
    let mut said = HUMAN_MESSAGE_BYTES_MAX;
    while said >= SAID_BYTES_MIN && !fits(status) {
        for message in status.pods.iter_mut().filter_map(|pod| pod.message.as_mut()) {
            shorten(message, said);
        }
        said /= 2;
    }
    while !status.pods.is_empty() && !fits(status) {
        status.pods.truncate(status.pods.len() / 2);
    }
}
