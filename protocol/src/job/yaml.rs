//! YAML as a source of events with positions: one document of the core schema, without anchors, aliases and tags.

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Tag};

use super::document::{Builder, Stop};
use super::report::Mark;

pub(super) fn read(text: &str, to: &mut Builder<'_>) -> Result<(), Stop> {
    let mut documents = 0;
    for event in Parser::new_from_str(text) {
        let (event, at) = match event {
            Ok((event, span)) => (event, mark(&span.start)),
            Err(error) => return Err(to.stop(mark(error.marker()), format!("not YAML: {}", error.info()))),
        };
        match event {
            Event::DocumentStart(_) => {
                documents += 1;
                if documents > 1 {
                    return Err(to.stop(at, "a second document begins here, and a file holds one job".into()));
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                plain_node(to, at, anchor, tag.as_deref());
                to.scalar(at, text.into_owned(), style == ScalarStyle::Plain);
            }
            Event::SequenceStart(anchor, tag) => {
                plain_node(to, at, anchor, tag.as_deref());
                to.open_list(at)?;
            }
            Event::MappingStart(anchor, tag) => {
                plain_node(to, at, anchor, tag.as_deref());
                to.open_map(at)?;
            }
            Event::SequenceEnd | Event::MappingEnd => to.close(),
            Event::Alias(_) => to.refused(at, "aliases are not allowed: write the value out".into())?,
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
        }
    }
    Ok(())
}

fn plain_node(to: &mut Builder<'_>, at: Mark, anchor: usize, tag: Option<&Tag>) {
    if anchor != 0 {
        to.error(at, "anchors are not allowed: write the value out".into());
    }
    if let Some(tag) = tag {
        let message =
            format!("tags such as `{}` are not allowed", super::document::shorten(&tag.to_string()));
        to.error(at, message);
    }
}

fn mark(marker: &Marker) -> Mark {
    let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Mark { line: narrow(marker.line()), column: narrow(marker.col()).saturating_add(1) }
}
