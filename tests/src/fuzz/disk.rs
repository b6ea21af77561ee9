//! Files that the programs read back or are given, and what processes of berth's own say to each other.

use std::fs;
use std::io::Write;
use std::path::Path;

use berth_agent::cdi::Specs;
use berth_agent::core::ledger::PodKey;
use berth_agent::core::{Agent, Event};
use berth_agent::io::image::CosignKey;
use berth_agent::io::{checkpoint, departure, image, journal};
use berth_agent::policy::{self, PolicyError};
use berth_agent::shim::checkpoint::rpc::Response;
use berth_agent::shim::log as pod_log;
use berth_agent::task::{Exit, Order, Report, Saved, Task};
use berth_agent::{cuda, io};
use berth_controller::io::depot::cipher::Keys;
use berth_controller::io::depot::packs::{self, Pack};
use berth_controller::io::http;
use berth_protocol::chunk::ChunkId;
use berth_protocol::ids::{ContainerName, Namespace};
use berth_protocol::job::{PodTemplate, VolumeSource};
use berth_protocol::log::Stream;
use berth_protocol::policy::{Policy, Wants};
use berth_protocol::units::{Bytes, Timestamp};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::cores::{identity, inventory, now};

/// Files are as many as executions: in memory, where the machine has such a place.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    dir.expect("a temporary directory")
}

/// A journal: what is read of it is written and read the same, and an agent begins on it. Each line of the input is a record
/// without its checksum, which would hide nearly all from the fuzzer.
pub fn ledger(bytes: &[u8]) {
    journal::read(bytes);
    let mut signed = Vec::new();
    for json in bytes.split(|byte| *byte == b'\n') {
        signed.extend_from_slice(format!("{:08x} ", crc32fast::hash(json)).as_bytes());
        signed.extend_from_slice(json);
        signed.push(b'\n');
    }
    let (ledger, _, whole) = journal::read(&signed);
    assert_eq!(whole, signed.len());
    let mut written = Vec::new();
    for record in ledger.snapshot() {
        journal::line(&record, &mut written).expect("a record has a JSON form");
    }
    let (again, damaged, _) = journal::read(&written);
    assert_eq!((&again, damaged), (&ledger, 0));
    for damaged in [false, true] {
        let mut disk = ledger.clone();
        let (mut agent, step) = Agent::start(ledger.clone(), identity(damaged), inventory(), now(0));
        step.records.iter().for_each(|record| disk.apply(record));
        for (ms, event) in [(1, Event::BusUp), (60_000, Event::Tick), (3_600_000, Event::Tick)] {
            let step = agent.step(now(ms), event);
            step.records.iter().for_each(|record| disk.apply(record));
        }
        assert!(disk == *agent.ledger(), "the disk holds what the agent knows");
    }
}

fn there_and_back<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    let Ok(value) = serde_json::from_slice::<T>(bytes) else { return };
    let written = serde_json::to_vec(&value).expect("plain data");
    assert_eq!(serde_json::from_slice::<T>(&written).expect("what is written can be read"), value);
}

/// What agent, shim and their helpers write for each other, in files and on sockets.
pub fn shim(bytes: &[u8]) {
    there_and_back::<Task>(bytes);
    there_and_back::<Exit>(bytes);
    there_and_back::<Saved>(bytes);
    there_and_back::<Order>(bytes);
    there_and_back::<Report>(bytes);
    there_and_back::<checkpoint::Said>(bytes);
    there_and_back::<cuda::Call>(bytes);
    there_and_back::<cuda::Answer>(bytes);
    let _ = serde_json::from_slice::<checkpoint::Order>(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        // The name of a pod's directory.
        if let Some(key) = PodKey::parse(text) {
            assert_eq!(PodKey::parse(&key.to_string()), Some(key));
        }
        http::is_path(text);
        departure::read(text, Timestamp(0));
    }
}

/// Segments of a log, as a crash may have left them: a writer goes on behind what is whole, and what it says can be read.
pub fn log(bytes: &[u8]) {
    let dir = scratch();
    // The first byte says how much of the rest is the first segment.
    let (cut, rest) = bytes.split_first().map_or((0, bytes), |(first, rest)| (usize::from(*first), rest));
    let (first, second) = rest.split_at(rest.len() * cut / 256);
    for (name, content) in [(1, first), (5, second)] {
        let mut file = fs::File::create(dir.path().join(format!("{name:020}.log"))).expect("a file");
        file.write_all(content).expect("room");
    }
    let all = || pod_log::read_from(dir.path(), 1).map_while(Result::ok).take(100_000);
    let told = all().last().map_or(0, |record| record.seq);
    let _ = pod_log::last_seq(dir.path());
    let mut writer = pod_log::Writer::open(dir.path(), Bytes(1 << 20)).expect("it goes on");
    let last = writer.last_seq();
    let name = ContainerName::parse("main").expect("a name");
    writer.append(Timestamp(1), &name, Stream::Stdout, b"behind\n");
    assert_eq!(writer.last_seq(), last + 1);
    drop(writer);
    let written = all().any(|record| record.bytes == b"behind\n" && record.seq == last + 1);
    assert!(written || told > last, "what was written is there");
    pod_log::cut(dir.path(), 2).expect("it is cut");
    assert!(pod_log::last_seq(dir.path()).expect("it is read") <= 2);
}

/// What registries, archives, credential files and the image store hold; and packs of the depot.
pub fn image(bytes: &[u8]) {
    image::inspect(bytes);
    let _ = serde_json::from_slice::<io::image::ImageRecord>(bytes);
    let cipher = Keys::of(&[1; 32]).cipher(&Namespace::default_namespace());
    if let Ok(spans) = packs::verify(bytes) {
        let Pack { id, bytes: pack, spans } = Pack::seal(&cipher, bytes, &spans);
        let tail = &pack[pack.len() - packs::TAIL_BYTES..];
        let table = packs::table_bytes(tail).expect("its own");
        let (frames, table) = pack.split_at(pack.len() - table);
        let read = packs::read_table(&cipher, &id, table, frames.len() as u64);
        assert_eq!(read.expect("its own"), spans);
    }
    let tail = bytes.len().saturating_sub(packs::TAIL_BYTES);
    if let Ok(length) = packs::table_bytes(&bytes[tail..])
        && let Some(frames) = bytes.len().checked_sub(length)
    {
        let _ = packs::read_table(&cipher, &ChunkId::of(b""), &bytes[frames..], frames as u64);
    }
}

/// What CRIU says and writes.
pub fn criu(bytes: &[u8]) {
    Response::read(bytes);
    checkpoint::inspect(bytes, bytes.len() as u64);
    let (pages, rest) =
        bytes.split_first_chunk::<4>().map_or((0, bytes), |(n, rest)| (u32::from_le_bytes(*n), rest));
    checkpoint::inspect(rest, u64::from(pages % (1 << 16)) * 4096);
}

/// What administrators write: configurations, specifications of devices.
pub fn config(bytes: &[u8]) {
    use clap::Parser;
    let dir = scratch();
    let cdi = dir.path().join("etc/cdi");
    fs::create_dir_all(&cdi).expect("a directory");
    let path = dir.path().join("config.toml");
    for file in [path.clone(), cdi.join("a.json"), cdi.join("b.yaml")] {
        fs::write(file, bytes).expect("room");
    }
    for (spec, device) in Specs::read(dir.path()).devices() {
        assert!(!device.name.is_empty() && spec.kind.contains('/'));
    }
    let line =
        |program: &str| [program.into(), "--dev".into(), "--config".into(), path.clone().into_os_string()];
    if let Ok(args) = berth_agent::config::Args::try_parse_from(line("berth-agent")) {
        let _ = berth_agent::config::Config::from_args(args);
    }
    if let Ok(flags) = berth_controller::config::Flags::try_parse_from(line("berth-controller")) {
        let _ = berth_controller::config::Config::resolve(flags);
    }
}

/// A policy file, and behind a line of dashes a pod's template: what it allows is below what it grants, however it is written.
pub fn policy(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (file, template) = text.split_once("\n---\n").unwrap_or((&text, ""));
    let _ = CosignKey::from_pem(file);
    let key = |path: &Path| {
        let pem = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----";
        assert!(path.is_absolute());
        CosignKey::from_pem(pem).map_err(|source| PolicyError::Key { path: path.to_owned(), source })
    };
    let Ok(read) = policy::parse(Path::new("/policy.toml"), file, key) else { return };
    let granted = read.granted;
    there_and_back::<Policy>(&serde_json::to_vec(&granted.rules).expect("plain data"));
    assert!(granted.to_string().starts_with("/policy.toml: "));
    let Ok(template) = serde_json::from_str::<PodTemplate>(template) else { return };
    let refusal = granted.rules.refuses(&template);
    assert_eq!(refusal.is_some(), granted.refuses(&Wants::of(&template)).is_some());
    if let Some(refusal) = refusal {
        assert!(granted.words(&refusal).contains(refusal.rule.key()));
        return;
    }
    assert!(granted.rules.networks.contains(&template.network));
    for volume in &template.volumes {
        if let VolumeSource::Host(path) = &volume.source {
            let found = granted.rules.host_path(Path::new(path)).expect("it lies in one that is granted");
            assert!(Path::new(path).starts_with(&found.path) && !path.split('/').any(|part| part == ".."));
            assert!(volume.read_only || !found.read_only);
        }
    }
    for container in &template.containers {
        assert!(container.image != "host" || granted.rules.host_image);
        let plain = |name: &String| name.strip_prefix("CAP_").unwrap_or(name).to_owned();
        assert!(container.capabilities.iter().all(|name| granted.rules.capabilities.contains(&plain(name))));
    }
}
