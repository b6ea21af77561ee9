//! `logs`, and what log records look like on a terminal.

use std::collections::BTreeMap;
use std::io::{self, Write};

use berth_protocol::ids::{ContainerName, Generation, PodName};
use berth_protocol::log::Stream;
use berth_protocol::topic::filter;

use super::command::Logs;
use super::config::Settings;
use super::connect::Session;
use super::follow::{Follow, Target, Until};
use super::order::Line;

/// A line longer than this is shown in pieces where lines carry a prefix.
const LINE_BYTES_MAX: usize = 64 * 1024;

pub async fn logs(settings: &Settings, args: Logs) -> anyhow::Result<u8> {
    let filters = filter::job(&settings.cluster, &settings.namespace, &args.target.job);
    let mut session = Session::open(settings, filters[1..].to_vec()).await?;
    let stream =
        args.stream.as_deref().map(|word| if word == "stdout" { Stream::Stdout } else { Stream::Stderr });
    let target = Target {
        namespace: settings.namespace.clone(),
        job: args.target.job,
        pod: args.target.pod,
        generation: Generation(0),
    };
    let until = if args.follow { Until::Ended } else { Until::Quiet };
    let printer = Printer::new(args.timestamps, Only { stream, container: args.container });
    Follow::new(&mut session, target, until, printer).run().await?;
    session.close().await;
    Ok(0)
}

/// Which records are shown; `None`: all.
#[derive(Debug, Clone, Default)]
pub struct Only {
    pub stream: Option<Stream>,
    pub container: Option<ContainerName>,
}

impl Only {
    fn shows(&self, line: &Line) -> bool {
        self.stream.is_none_or(|stream| stream == line.stream)
            && self.container.as_ref().is_none_or(|container| *container == line.container)
    }
}

/// Writes records: as they are, or line by line where something stands before each line.
pub struct Printer {
    /// Lines carry their pod's name.
    pub names: bool,
    /// And their container's.
    pub containers: bool,
    timestamps: bool,
    only: Only,
    /// Lines whose end has not come yet.
    begun: BTreeMap<(PodName, ContainerName, bool), Vec<u8>>,
}

impl Printer {
    pub fn new(timestamps: bool, only: Only) -> Self {
        Self { names: false, containers: false, timestamps, only, begun: BTreeMap::new() }
    }

    /// To the process' own streams.
    pub fn print(&mut self, lines: &[Line]) -> io::Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
        self.write(lines, &mut out, &mut err)?;
        out.flush()
    }

    fn write(&mut self, lines: &[Line], out: &mut dyn Write, err: &mut dyn Write) -> io::Result<()> {
        for line in lines.iter().filter(|line| self.only.shows(line)) {
            let error = line.stream == Stream::Stderr;
            if !self.names && !self.timestamps {
                if error {
                    // What was said before on the other stream is seen before.
                    out.flush()?;
                    err.write_all(&line.bytes)?;
                } else {
                    out.write_all(&line.bytes)?;
                }
                continue;
            }
            let key = (line.pod.clone(), line.container.clone(), error);
            let mut text = self.begun.remove(&key).unwrap_or_default();
            if text.is_empty() {
                text.extend(self.prefix(line).into_bytes());
            }
            let mut whole = Vec::new();
            let pieces: Vec<&[u8]> = line.bytes.split_inclusive(|byte| *byte == b'\n').collect();
            for (at, piece) in pieces.iter().enumerate() {
                if at > 0 {
                    text.extend(self.prefix(line).into_bytes());
                }
                text.extend(*piece);
                if !piece.ends_with(b"\n") && text.len() < LINE_BYTES_MAX {
                    break;
                }
                if !piece.ends_with(b"\n") {
                    text.push(b'\n');
                }
                whole.append(&mut text);
            }
            if line.bytes.is_empty() || !text.is_empty() {
                self.begun.insert(key, text);
            }
            if error {
                out.flush()?;
                err.write_all(&whole)?;
            } else {
                out.write_all(&whole)?;
            }
        }
        Ok(())
    }

    /// Shows lines that were begun and will not be ended.
    pub fn finish(&mut self) -> io::Result<()> {
        let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
        for ((_, _, error), mut text) in std::mem::take(&mut self.begun) {
            text.push(b'\n');
            if error { err.write_all(&text)? } else { out.write_all(&text)? }
        }
        out.flush()
    }

    fn prefix(&self, line: &Line) -> String {
        let time = if self.timestamps { format!("{} ", line.at) } else { String::new() };
        let name = match (self.names, self.containers) {
            (true, true) => format!("{} {} | ", line.pod, line.container),
            (true, false) => format!("{} | ", line.pod),
            (false, _) => String::new(),
        };
        time + &name
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_protocol::ids::Epoch;
    use berth_protocol::units::Timestamp;

    fn line(pod: &str, stream: Stream, text: &str) -> Line {
        Line {
            pod: pod.parse().unwrap(),
            epoch: Epoch(1),
            seq: 1,
            at: Timestamp(0),
            container: ContainerName::parse("main").unwrap(),
            stream,
            bytes: text.as_bytes().to_vec(),
        }
    }

    fn written(mut printer: Printer, names: bool, lines: &[Line]) -> (String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        printer.names = names;
        printer.write(lines, &mut out, &mut err).unwrap();
        (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    #[test]
    fn one_pod_is_shown_raw_and_streams_stay_apart() {
        let lines = [
            line("j-0", Stream::Stdout, "a\nb"),
            line("j-0", Stream::Stderr, "x\n"),
            line("j-0", Stream::Stdout, "c\n"),
        ];
        assert_eq!(
            written(Printer::new(false, Only::default()), false, &lines),
            ("a\nbc\n".into(), "x\n".into())
        );
        let only = written(
            Printer::new(false, Only { stream: Some(Stream::Stderr), container: None }),
            false,
            &lines,
        );
        assert_eq!(only, (String::new(), "x\n".into()));
    }

    #[test]
    fn several_pods_do_not_cut_each_others_lines() {
        let lines = [
            line("j-0", Stream::Stdout, "one "),
            line("j-1", Stream::Stdout, "two\nthree\n"),
            line("j-0", Stream::Stdout, "half\nnext\n"),
        ];
        let want = "j-1 | two\nj-1 | three\nj-0 | one half\nj-0 | next\n";
        assert_eq!(written(Printer::new(false, Only::default()), true, &lines), (want.into(), String::new()));
        let mut named = Printer::new(false, Only::default());
        named.containers = true;
        assert_eq!(written(named, true, &lines[1..2]).0, "j-1 main | two\nj-1 main | three\n");
        let other = Only { stream: None, container: Some(ContainerName::parse("side").unwrap()) };
        assert_eq!(written(Printer::new(false, other), true, &lines).0, "");
        let timed = written(Printer::new(true, Only::default()), false, &lines[1..2]).0;
        assert_eq!(timed, "1970-01-01T00:00:00.000Z two\n1970-01-01T00:00:00.000Z three\n");
    }
}
