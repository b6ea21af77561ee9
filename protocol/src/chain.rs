//! Errors as a person reads them.

use std::error::Error;

/// An error and what caused it, in one line. What has been said already is not said again: some errors print their cause
/// themselves.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    for cause in std::iter::successors(error.source(), |&cause| cause.source()) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Told(&'static str, #[source] Option<Box<Told>>);

    #[test]
    fn each_cause_is_said_once() {
        let told = |text, cause: Option<Told>| Told(text, cause.map(Box::new));
        let error = told("cannot start: no room", Some(told("no room", Some(told("disk full", None)))));
        assert_eq!(chain(&error), "cannot start: no room: disk full");
        assert_eq!(chain(&told("alone", None)), "alone");
    }
}
