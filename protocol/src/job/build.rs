//! From a file as written to a job: fills in the defaults and checks what must hold between fields.
//!
//! Each function yields one part of the job and reports all that contradicts itself there; where a value is already
//! in error, nothing is concluded from it.

use std::collections::BTreeMap;

use super::report::Report;
use super::written::{self, Body, File};
use super::{
    Checkpoint, CheckpointMode, ContainerSpec, JobSpec, OnDisconnect, Placement, PodTemplate, Preference,
    Restart, SecretMount, Volume, VolumeSource, Workspace, schema,
};
use crate::ids::{ContainerName, JobName, Namespace};
use crate::limits::{GPU_MILLI_FULL, SPEC_BYTES_MAX};
use crate::resources::{GpuRequest, Limits, Resources};
use crate::units::{Bytes, MilliCpu, Millis};

/// The name of a plain job's only container.
pub(super) const SINGLE_CONTAINER: &str = "main";

const CPU_DEFAULT: MilliCpu = MilliCpu(100);
const MEMORY_DEFAULT: Bytes = Bytes(128 * Bytes::MIB);
const GRACE_DEFAULT: Millis = Millis::from_secs(30);
const TTL_DEFAULT: Millis = Millis::from_secs(7 * 24 * 3600);

/// The job, or `None` where the report says why there is none.
pub(super) fn job(file: File, topic: Option<(&Namespace, &JobName)>, report: &mut Report) -> Option<JobSpec> {
    let names = names(&file, topic, report);
    let grace = file.termination_grace_period_seconds.map_or(GRACE_DEFAULT, Millis::from_secs);
    let parallelism = file.parallelism.unwrap_or(1);
    let completions = file.completions.unwrap_or(parallelism);
    counts(&file, parallelism, completions, report);
    let containers = containers(&file, report);
    mounts(&file, report);
    saved_volumes(&file, parallelism, report);
    asked_to_save(&file, report);
    let restart = restart(&file, report);
    let on_disconnect = on_disconnect(&file, report);
    let placement = placement(&file);
    let (namespace, name) = names?;
    let pod = PodTemplate {
        namespace: namespace.clone(),
        job: name.clone(),
        containers,
        volumes: file.volumes.into_iter().flatten().filter_map(volume).collect(),
        network: file.network.unwrap_or_default(),
        restart,
        grace,
        on_disconnect,
        checkpoint: checkpoint(file.checkpoint.unwrap_or_default()),
        outputs: file.outputs.unwrap_or_default(),
        workspace: file.workspace.and_then(workspace),
    };
    spec_size(&pod, report);
    Some(JobSpec {
        namespace,
        name,
        pod,
        placement,
        parallelism,
        completions,
        gang: file.gang.unwrap_or_default(),
        suspend: file.suspend.unwrap_or_default(),
        active_deadline: file.active_deadline_seconds.map(Millis::from_secs),
        ttl: file.ttl_seconds_after_finished.map_or(TTL_DEFAULT, Millis::from_secs),
        priority: file.priority.unwrap_or_default(),
        preemptible: file.preemptible.unwrap_or(true),
    })
}

fn names(
    file: &File,
    topic: Option<(&Namespace, &JobName)>,
    report: &mut Report,
) -> Option<(Namespace, JobName)> {
    let Some((namespace, name)) = topic else {
        if file.name.is_none() && !report.doubts("name") {
            report.error("name", "required, such as \"digits\"".into());
        }
        let namespace = file.namespace.clone().unwrap_or_else(Namespace::default_namespace);
        return file.name.clone().map(|name| (namespace, name));
    };
    let disagree =
        |written: &str, topic: &str| format!("`{written}` here, but `{topic}` in the topic it was sent to");
    if let Some(written) = file.namespace.as_ref().filter(|written| *written != namespace) {
        report.error("namespace", disagree(written.as_str(), namespace.as_str()));
    }
    if let Some(written) = file.name.as_ref().filter(|written| *written != name) {
        report.error("name", disagree(written.as_str(), name.as_str()));
    }
    Some((namespace.clone(), name.clone()))
}

fn counts(file: &File, parallelism: u32, completions: u32, report: &mut Report) {
    if report.doubts("parallelism") || report.doubts("completions") {
        return;
    }
    if parallelism > completions {
        let message = format!(
            "{parallelism} pods at once are more than the {completions} that must succeed (`completions`)"
        );
        report.error("parallelism", message);
    } else if file.gang == Some(true) && parallelism < completions {
        let message = format!(
            "a gang runs all {completions} of its pods at once, and `parallelism` allows {parallelism}"
        );
        report.error("gang", message);
    }
}

fn containers(file: &File, report: &mut Report) -> Vec<ContainerSpec> {
    let Some(several) = &file.containers else {
        let name = ContainerName::parse(SINGLE_CONTAINER).ok();
        return name.and_then(|name| container(&file.single, name, "", report)).into_iter().collect();
    };
    for field in schema::CONTAINER.iter().filter(|field| field.name != "image") {
        if report.is_written(field.name) {
            report.error(field.name, "with `containers`, write it in each of them".into());
        }
    }
    let mut first = BTreeMap::new();
    let mut gpu = None;
    let mut specs = Vec::new();
    for (index, written::Container { name, body }) in several.iter().enumerate() {
        let at = format!("containers[{index}]");
        let Some(name) = name else { continue };
        if let Some(other) = first.insert(name, index) {
            report
                .error(&format!("{at}.name"), format!("`{name}` is the name of containers[{other}] already"));
        }
        if body.resources.as_ref().is_some_and(|resources| resources.gpu.is_some())
            && let Some(other) = gpu.replace(index)
        {
            let message =
                format!("only one container of a pod may ask for GPUs, and containers[{other}] does");
            report.error(&format!("{at}.resources.gpu"), message);
        }
        specs.extend(container(body, name.clone(), &format!("{at}."), report));
    }
    specs
}

/// `prefix` is what stands before the container's fields in their paths.
fn container(body: &Body, name: ContainerName, prefix: &str, report: &mut Report) -> Option<ContainerSpec> {
    let (resources, limits) = resources(body, prefix, report);
    if body.command.as_ref().and_then(|command| command.first()).is_some_and(String::is_empty) {
        report.error(&format!("{prefix}command[0]"), "the command's name is empty".into());
    }
    let secret = |s: &written::Secret| Some(SecretMount { name: s.name.clone()?, mount: s.mount.clone()? });
    Some(ContainerSpec {
        name,
        image: body.image.clone()?,
        command: body.command.clone().unwrap_or_default(),
        args: body.args.clone().unwrap_or_default(),
        env: body.env.clone().unwrap_or_default(),
        working_dir: body.working_dir.clone(),
        user: body.user.clone(),
        resources,
        limits,
        read_only_root: body.read_only_root.unwrap_or_default(),
        capabilities: body.capabilities.clone().unwrap_or_default(),
        secrets: body.secrets.iter().flatten().filter_map(secret).collect(),
    })
}

fn resources(body: &Body, prefix: &str, report: &mut Report) -> (Resources, Limits) {
    let asked = body.resources.clone().unwrap_or_default();
    let burst = body.limits.clone().unwrap_or_default();
    let (cpu, memory) = (asked.cpu.unwrap_or(CPU_DEFAULT), asked.memory.unwrap_or(MEMORY_DEFAULT));
    let limits = Limits { cpu: burst.cpu.unwrap_or(cpu), memory: burst.memory.unwrap_or(memory) };
    let mut below = |field: &str, limit: String, amount: String, is_default: bool| {
        if !report.doubts(&format!("{prefix}resources.{field}")) {
            let default = if is_default { ", the default" } else { "" };
            let message = format!("{limit} is less than `resources.{field}` ({amount}{default})");
            report.error(&format!("{prefix}limits.{field}"), message);
        }
    };
    if limits.cpu < cpu {
        below("cpu", limits.cpu.to_string(), cpu.to_string(), asked.cpu.is_none());
    }
    if limits.memory < memory {
        below("memory", limits.memory.to_string(), memory.to_string(), asked.memory.is_none());
    }
    let gpu = asked.gpu.map(|gpu| GpuRequest {
        count: gpu.count.unwrap_or(1),
        milli: gpu.milli.unwrap_or(GPU_MILLI_FULL),
        memory: gpu.memory,
        model: gpu.model.unwrap_or_default(),
    });
    if let Some(gpu) = gpu.as_ref().filter(|gpu| gpu.milli < GPU_MILLI_FULL && gpu.count > 1) {
        let message =
            format!("a share of {} thousandths is of one device, and `count` is {}", gpu.milli, gpu.count);
        report.error(&format!("{prefix}resources.gpu.milli"), message);
    }
    (Resources { cpu, memory, disk: Bytes::ZERO, gpu }, limits)
}

/// What is set back with one pod is that pod's alone.
fn saved_volumes(file: &File, parallelism: u32, report: &mut Report) {
    for (index, volume) in file.volumes.iter().flatten().enumerate() {
        if volume.save != Some(true) {
            continue;
        }
        let at = format!("volumes[{index}].save");
        if volume.name.is_none() {
            report.error(
                &at,
                "for a named volume: scratch goes along anyway, a path of the node's never".into(),
            );
        } else if parallelism > 1 {
            let message = format!("its {parallelism} pods at once would each set the volume back for all");
            report.error(&at, message);
        }
    }
}

/// What saves itself has to be asked to.
fn asked_to_save(file: &File, report: &mut Report) {
    let Some(written) = &file.checkpoint else { return };
    let asked = written.signal.is_some() || written.ready.is_some();
    if written.mode == Some(CheckpointMode::Cooperative) && !asked && !report.doubts("checkpoint") {
        report.error("checkpoint.mode", "cooperative needs `signal` or `ready` to ask the program by".into());
    }
}

/// No two things at one place of a container: volumes and workspace are in all of them, secrets in their own.
fn mounts(file: &File, report: &mut Report) {
    let place = |mount: &str| mount.trim_end_matches('/').to_owned();
    let mut taken: BTreeMap<String, String> = BTreeMap::new();
    let mut take = |taken: &mut BTreeMap<String, String>, mount: &Option<String>, path: String| {
        let Some(mount) = mount else { return };
        match taken.get(&place(mount)) {
            Some(other) => report.error(&path, format!("`{other}` is mounted there already")),
            None => _ = taken.insert(place(mount), path),
        }
    };
    for (index, volume) in file.volumes.iter().flatten().enumerate() {
        take(&mut taken, &volume.mount, format!("volumes[{index}].mount"));
    }
    if let Some(workspace) = &file.workspace {
        take(&mut taken, &workspace.path, "workspace.path".into());
    }
    let several = file.containers.iter().flatten().enumerate();
    let bodies = several.map(|(index, container)| (format!("containers[{index}]."), &container.body));
    for (prefix, body) in bodies.chain([(String::new(), &file.single)]) {
        let mut taken = taken.clone();
        for (index, secret) in body.secrets.iter().flatten().enumerate() {
            take(&mut taken, &secret.mount, format!("{prefix}secrets[{index}].mount"));
        }
    }
}

fn restart(file: &File, report: &mut Report) -> Restart {
    let default = Restart::default();
    let retry = file.retry.clone().unwrap_or_default();
    let restart = Restart {
        policy: file.restart_policy.unwrap_or(default.policy),
        backoff_limit: file.backoff_limit.unwrap_or(default.backoff_limit),
        retry_min: retry.min.unwrap_or(default.retry_min),
        retry_max: retry.max.unwrap_or(default.retry_max),
    };
    let Restart { retry_min: min, retry_max: max, .. } = restart;
    if min > max && !report.doubts("retry") {
        report.error("retry", format!("the first wait (min, {min}) is longer than the longest (max, {max})"));
    }
    restart
}

fn on_disconnect(file: &File, report: &mut Report) -> OnDisconnect {
    let default = OnDisconnect::default();
    let written = file.on_disconnect.clone().unwrap_or_default();
    let after = written.after.unwrap_or(default.after);
    let lost_after = written.lost_after.unwrap_or_else(|| default.lost_after.max(after));
    if lost_after < after && !report.doubts("onDisconnect") {
        let message =
            format!("{lost_after} is shorter than `after` ({after}): a node is not lost before its pods act");
        report.error("onDisconnect.lostAfter", message);
    }
    OnDisconnect { after, action: written.action.unwrap_or(default.action), lost_after }
}

fn placement(file: &File) -> Placement {
    let preference = |p: &written::Preference| Some(Preference { when: p.when.clone()?, weight: p.weight? });
    Placement {
        affinity: file.affinity.clone(),
        prefer: file.prefer.iter().flatten().filter_map(preference).collect(),
        spread: file.spread.clone(),
        tolerations: file.tolerations.clone().unwrap_or_default(),
        anti_affinity: file.anti_affinity.clone(),
    }
}

fn volume(written: written::Volume) -> Option<Volume> {
    let source = match written {
        written::Volume { host: Some(path), .. } => VolumeSource::Host(path),
        written::Volume { size: Some(size), .. } => VolumeSource::Scratch(size),
        written::Volume { name: Some(name), .. } => VolumeSource::Named(name),
        _ => return None,
    };
    let (read_only, save) = (written.read_only.unwrap_or_default(), written.save.unwrap_or_default());
    Some(Volume { mount: written.mount?, source, read_only, save })
}

fn workspace(written: written::Workspace) -> Option<Workspace> {
    Some(Workspace { digest: written.digest?, bytes: written.bytes?, path: written.path? })
}

fn checkpoint(written: written::Checkpoint) -> Checkpoint {
    let default = Checkpoint::default();
    let hooks = written.hooks.unwrap_or_default();
    Checkpoint {
        mode: written.mode.unwrap_or(default.mode),
        interval: written.interval,
        signal: written.signal,
        grace: written.grace.unwrap_or(default.grace),
        ready: written.ready,
        quiesce: hooks.quiesce.unwrap_or_default(),
        resume: hooks.resume.unwrap_or_default(),
        tcp: written.tcp.unwrap_or(default.tcp),
        keep: written.keep.unwrap_or(default.keep),
    }
}

/// Defaults and escapes make the specification longer than the file.
fn spec_size(pod: &PodTemplate, report: &mut Report) {
    match serde_json::to_vec(pod) {
        Ok(spec) if spec.len() <= SPEC_BYTES_MAX => {}
        Ok(spec) => {
            let bytes = spec.len();
            report.file_error(format!(
                "what nodes are sent of this job is {bytes} bytes long, at most {SPEC_BYTES_MAX} are allowed: \
                 shorten `args` or `env`"
            ));
        }
        Err(error) => report.file_error(format!("the job cannot be sent to nodes: {error}")),
    }
}
