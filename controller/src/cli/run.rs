//! `run`: a command as a job, its output here, its exit code ours.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use berth_protocol::ids::{JobName, Namespace};
use berth_protocol::job::parse;
use berth_protocol::message::query::Query;
use berth_protocol::message::user::{FieldError, JobPhase, NodeState, NodeStatus, Verdict};
use berth_protocol::topic::{JobTopic, Topic, filter};
use serde_json::{Map, Value, json};

use super::command::Run;
use super::config::Settings;
use super::connect::{Session, random};
use super::follow::{Follow, Left, Target, Until};
use super::jobfile::JobFile;
use super::logs::{Only, Printer};
use super::{Usage, exit, submit, wait, workspace};

/// Where the directory goes in an image that is not the node's own file system.
const WORKSPACE_PATH: &str = "/workspace";

pub async fn run(settings: &Settings, args: Run) -> anyhow::Result<u8> {
    let here = std::env::current_dir().context("cannot tell the working directory")?;
    let namespace = settings.namespace.clone();
    let job = match &args.name {
        Some(name) => name.clone(),
        None => made_up_name(random()?)?,
    };
    let mut spec = spec(&args, &job, &namespace, &here, &|name| std::env::var(name).ok())?;
    check(&spec)?;

    let filters = filter::job(&settings.cluster, &namespace, &job);
    let mut session = Session::open(settings, filters.to_vec()).await?;
    if goes_along(&mut session, &args).await? {
        let path = workspace_path(&spec);
        let packed = workspace::take_along(&mut session, &namespace, &here).await?;
        spec.insert("workingDir".into(), json!(path));
        spec.insert(
            "workspace".into(),
            json!({"digest": packed.digest, "bytes": packed.bytes.to_string(), "path": path}),
        );
    }
    let file =
        JobFile { namespace: namespace.clone(), job: job.clone(), payload: serde_json::to_vec(&spec)? };

    // The question for the logs goes right behind the job, not after its answer.
    session.publish(&Topic::job(&namespace, &job, JobTopic::Submit), file.payload.clone())?;
    let asked = match args.detach {
        true => None,
        false => Some(session.ask(&Follow::question(&namespace, &job, Until::Ended))?),
    };
    let (answer, unchanged) = submit::answered(&mut session, &file).await?;
    let generation = match answer.verdict {
        Verdict::Accepted { generation, .. } => generation,
        Verdict::Rejected { rejected } => {
            eprintln!("berth: {}", submit::rejection(&file, None, &rejected));
            session.close().await;
            return Ok(submit::code_of(&rejected));
        }
    };
    if unchanged {
        eprintln!(
            "berth: job {namespace}/{job} was there already, unchanged: `berth restart {job}` runs it anew"
        );
    }
    let Some(asked) = asked else {
        writeln!(std::io::stdout(), "{job}")?;
        session.close().await;
        return Ok(0);
    };

    let target = Target { namespace: namespace.clone(), job: job.clone(), pod: None, generation };
    let follow = Follow::new(&mut session, target, Until::Ended, Printer::new(false, Only::default()));
    let seen = match follow.asked(asked).cancel_on_interrupt()?.run().await {
        Ok(seen) => seen.filter(|seen| seen.status.phase.is_final()),
        Err(error) if error.is::<Left>() => {
            eprintln!("berth: {error}");
            session.close().await;
            return Ok(exit::CANCELLED);
        }
        Err(error) => return Err(error),
    };
    let ended = match seen {
        Some(seen) => seen,
        None => wait::until_final(&mut session, &namespace, &job, generation).await?,
    };
    let code = wait::exit_code(&mut session, &ended.status).await?;
    if ended.status.phase == JobPhase::Failed
        && let Some(why) = wait::verdict(&ended.status)
    {
        eprintln!("berth: job {namespace}/{job} failed: {why}");
    }
    session.close().await;
    Ok(code)
}

/// Flags are checked as a job file before anything is sent.
fn check(spec: &Map<String, Value>) -> anyhow::Result<()> {
    let Err(errors) = parse(&serde_json::to_vec(spec)?, None) else { return Ok(()) };
    let each = errors.iter().map(|FieldError { field, message, .. }| match field.as_str() {
        "" => message.clone(),
        field => format!("{field}: {message}"),
    });
    Err(Usage::new(each.collect::<Vec<_>>().join("\n  ")).into())
}

/// The job file that the flags stand for.
fn spec(
    args: &Run,
    job: &JobName,
    namespace: &Namespace,
    here: &Path,
    environment: &dyn Fn(&str) -> Option<String>,
) -> anyhow::Result<Map<String, Value>> {
    let mut spec = Map::new();
    let mut set = |key: &str, value: Value| spec.insert(key.into(), value);
    set("name", json!(job));
    set("namespace", json!(namespace));
    set("image", json!(args.image));
    set("command", json!(args.command));
    let working_dir = match (&args.workdir, args.image == "host") {
        (Some(path), _) => Some(path.clone()),
        (None, true) => Some(text(here)?),
        (None, false) => None,
    };
    let base = working_dir.clone().unwrap_or_else(|| "/".into());
    if let Some(path) = working_dir {
        set("workingDir", json!(path));
    }
    let mut resources = Map::new();
    if let Some(cpu) = &args.cpu {
        resources.insert("cpu".into(), json!(cpu));
    }
    if let Some(memory) = &args.memory {
        resources.insert("memory".into(), json!(memory));
    }
    if let Some(gpu) = &args.gpu {
        resources.insert("gpu".into(), devices(gpu)?);
    }
    if !resources.is_empty() {
        set("resources", resources.into());
    }
    if !args.env.is_empty() {
        let pairs = args.env.iter().map(|pair| match pair.split_once('=') {
            Some((name, value)) => Ok((name.to_owned(), json!(value))),
            None => match environment(pair) {
                Some(value) => Ok((pair.clone(), json!(value))),
                None => Err(Usage::new(format!("-e {pair}: it is not set here; write {pair}=VALUE"))),
            },
        });
        set("env", pairs.collect::<Result<Map<_, _>, _>>()?.into());
    }
    if !args.volumes.is_empty() {
        let volumes: Vec<Value> =
            args.volumes.iter().map(|text| volume(text, here)).collect::<anyhow::Result<_>>()?;
        set("volumes", volumes.into());
    }
    if !args.outputs.is_empty() {
        let paths: Vec<String> = args
            .outputs
            .iter()
            .map(|path| text(&Path::new(&base).join(path)))
            .collect::<anyhow::Result<_>>()?;
        set("outputs", json!(paths));
    }
    if let Some(network) = &args.network {
        set("network", json!(network));
    }
    if let Some(affinity) = &args.affinity {
        set("affinity", json!(affinity));
    }
    if let Some(priority) = args.priority {
        set("priority", json!(priority));
    }
    if let Some(retries) = args.retries {
        set("restartPolicy", json!("OnFailure"));
        set("backoffLimit", json!(retries));
    }
    Ok(spec)
}

fn text(path: &Path) -> anyhow::Result<String> {
    // Without `.` and doubled slashes, as a job file wants it.
    let plain: PathBuf = path.components().collect();
    let text = plain.to_str().map(str::to_owned);
    text.ok_or_else(|| Usage::new(format!("{} is not UTF-8, as a job file has to be", path.display())).into())
}

/// `2` devices, or `0.25` of one.
fn devices(text: &str) -> anyhow::Result<Value> {
    let bad =
        || Usage::new(format!("--gpu {text}: write a number of devices, or a share of one such as 0.25"));
    if let Ok(count) = text.parse::<u32>() {
        return Ok(json!({"count": count}));
    }
    match berth_protocol::units::MilliCpu::parse(text).map_err(|_| bad())?.0 {
        milli @ 1..1000 => Ok(json!({"count": 1, "milli": milli})),
        _ => Err(bad().into()),
    }
}

/// `SOURCE:MOUNT[:ro]`; a source with a slash or a dot in front is a path of the node's, any other a volume's name.
fn volume(written: &str, here: &Path) -> anyhow::Result<Value> {
    let bad = || Usage::new(format!("-v {written}: write SOURCE:MOUNT or SOURCE:MOUNT:ro"));
    let parts: Vec<&str> = written.split(':').collect();
    let (source, mount, read_only) = match parts[..] {
        [source, mount] | [source, mount, "rw"] => (source, mount, false),
        [source, mount, "ro"] => (source, mount, true),
        _ => return Err(bad().into()),
    };
    if source.is_empty() || !mount.starts_with('/') {
        return Err(bad().into());
    }
    let mut volume = json!({"mount": mount});
    match source.starts_with(['/', '.']) {
        true => volume["host"] = json!(text(&absolute(source, here))?),
        false => volume["name"] = json!(source),
    }
    if read_only {
        volume["readOnly"] = json!(true);
    }
    Ok(volume)
}

/// `./a/../b` below `here`, by its text alone: the path is another machine's.
fn absolute(source: &str, here: &Path) -> PathBuf {
    let mut path = PathBuf::new();
    for part in here.join(source).components() {
        match part {
            std::path::Component::ParentDir => {
                path.pop();
            }
            part => path.push(part),
        }
    }
    path
}

fn workspace_path(spec: &Map<String, Value>) -> String {
    spec.get("workingDir").and_then(Value::as_str).unwrap_or(WORKSPACE_PATH).to_owned()
}

/// Whether the directory has to travel: the node's own file system is wanted, and it may be another machine's.
async fn goes_along(session: &mut Session, args: &Run) -> anyhow::Result<bool> {
    if args.workspace || args.no_workspace || args.image != "host" || args.workdir.is_some() {
        return Ok(args.workspace);
    }
    let rows = session.pages(|after| Query::Nodes { after }).await?;
    let here = Machine::here();
    let mut online = false;
    for row in &rows {
        let node: NodeStatus =
            serde_json::from_value(row.clone()).context("the list of nodes is unreadable")?;
        if matches!(node.state, NodeState::Online | NodeState::Silent) {
            online = true;
            if !here.is(&node) {
                return Ok(true);
            }
        }
    }
    Ok(!online)
}

/// What tells this machine from others.
struct Machine {
    hostname: String,
    kernel: String,
}

impl Machine {
    fn here() -> Self {
        let read = |name: &str| {
            let text = std::fs::read_to_string(Path::new("/proc/sys/kernel").join(name));
            text.unwrap_or_default().trim().to_owned()
        };
        Self { hostname: read("hostname"), kernel: read("osrelease") }
    }

    /// A cloned host's name alone is no proof.
    fn is(&self, node: &NodeStatus) -> bool {
        node.hostname == self.hostname && node.kernel == self.kernel
    }
}

const MOODS: [&str; 16] = [
    "amber", "brisk", "calm", "deft", "eager", "fresh", "gentle", "keen", "lucid", "merry", "nimble",
    "quiet", "rapid", "sunny", "tidy", "vivid",
];
const SHIPS: [&str; 16] = [
    "barge", "brig", "canoe", "cutter", "dhow", "ferry", "galley", "junk", "kayak", "ketch", "lugger",
    "packet", "schooner", "skiff", "sloop", "yawl",
];

/// `brisk-sloop-3fa09c`: easy to say, unlikely to be met twice.
fn made_up_name(random: u64) -> anyhow::Result<JobName> {
    let word = |list: &[&'static str; 16], shift: u32| list[(random >> shift & 15) as usize];
    let tail = random >> 8 & 0xff_ffff;
    Ok(JobName::parse(&format!("{}-{}-{tail:06x}", word(&MOODS, 0), word(&SHIPS, 4)))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::command::{Cli, Verb};
    use clap::Parser as _;

    fn made(flags: &[&str]) -> anyhow::Result<Value> {
        let args = ["berth", "run"].iter().chain(flags).chain(&["--", "echo", "x"]);
        let Verb::Run(args) = Cli::parse_from(args).verb else { panic!("not run") };
        let environment = |name: &str| (name == "HOME").then(|| "/home/me".to_owned());
        let (job, namespace) = (JobName::parse("j").unwrap(), Namespace::default_namespace());
        spec(&args, &job, &namespace, Path::new("/work/dir"), &environment).map(Value::Object)
    }

    #[test]
    fn flags_make_a_job_file() {
        let plain = json!({"name": "j", "namespace": "default", "image": "host", "command": ["echo", "x"],
            "workingDir": "/work/dir"});
        assert_eq!(made(&[]).unwrap(), plain);
        let all = [
            "--image=alpine",
            "--cpu=2",
            "--memory=4Gi",
            "--gpu=0.25",
            "-eA=b=c",
            "-eHOME",
            "-v./d:/data:ro",
            "-vckpt:/ckpt",
            "--output=out/model",
            "--output=/srv/x",
            "--network=none",
            "--workdir=/app",
            "--priority=-5",
            "--retries=3",
            "--affinity=node.arch == 'x86_64'",
        ];
        let want = json!({"name": "j", "namespace": "default", "image": "alpine", "command": ["echo", "x"],
            "workingDir": "/app", "resources": {"cpu": "2", "memory": "4Gi", "gpu": {"count": 1, "milli": 250}},
            "env": {"A": "b=c", "HOME": "/home/me"},
            "volumes": [{"mount": "/data", "host": "/work/dir/d", "readOnly": true}, {"mount": "/ckpt", "name": "ckpt"}],
            "outputs": ["/app/out/model", "/srv/x"], "network": "none", "affinity": "node.arch == 'x86_64'",
            "priority": -5, "restartPolicy": "OnFailure", "backoffLimit": 3});
        assert_eq!(made(&all).unwrap(), want);
    }

    #[test]
    fn bad_flags_say_what_to_write() {
        for (flag, want) in [
            ("-eNOT_SET_HERE", "-e NOT_SET_HERE: it is not set here; write NOT_SET_HERE=VALUE"),
            ("--gpu=1.5", "--gpu 1.5: write a number of devices, or a share of one such as 0.25"),
            ("-v/data", "-v /data: write SOURCE:MOUNT or SOURCE:MOUNT:ro"),
            ("-vx:relative", "-v x:relative: write SOURCE:MOUNT or SOURCE:MOUNT:ro"),
        ] {
            let error = made(&[flag]).unwrap_err();
            assert_eq!((error.to_string().as_str(), error.is::<Usage>()), (want, true));
        }
    }

    #[test]
    fn what_the_job_file_refuses_is_refused_before_anything_is_sent() {
        let checked = |flags: &[&str]| check(made(flags).unwrap().as_object().unwrap());
        checked(&["--cpu=2", "--gpu=0.25", "-v./d:/data:ro", "--output=out", "--retries=3"]).unwrap();
        let error = checked(&["--memory=lots", "--priority=5000"]).unwrap_err();
        assert!(error.is::<Usage>());
        let text = error.to_string();
        assert!(text.starts_with("priority: ") && text.contains("\n  resources.memory: "), "{text}");
    }

    #[test]
    fn names_are_names() {
        for random in [0, u64::MAX, 0x1234_5678_9abc_def0] {
            made_up_name(random).unwrap();
        }
        assert_eq!(made_up_name(0).unwrap().as_str(), "amber-barge-000000");
    }
}
