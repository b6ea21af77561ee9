//! A job file as written, field for field: typed and normalised, no default filled in, nothing held together yet.
//!
//! It stands between the canonical values of `read` and the `JobSpec` of `build`. Its serialised form is what the
//! digest of a file is taken of: fields keep their order here, or every job submitted again is a new generation.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{CheckpointMode, DisconnectAction, JobSpec, Network, RestartPolicy, TcpPolicy, VolumeSource};
use crate::ids::{ContainerName, Digest, Generation, JobName, Namespace, RequestId, SecretName, VolumeName};
use crate::units::{Bytes, MilliCpu, Millis};

/// Structs whose fields may all be absent; `..` marks a part whose fields stand beside its own.
macro_rules! written {
    ($(#[$doc:meta])* struct $name:ident { $($(#[$attr:meta])* $field:ident: $type:ty,)* $(..$part:ident: $of:ty)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase")]
        pub(super) struct $name {
            $(
                $(#[$attr])*
                #[serde(skip_serializing_if = "Option::is_none")]
                pub $field: Option<$type>,
            )*
            $(
                #[serde(flatten)]
                pub $part: $of,
            )?
        }
    };
}

written! {
    struct File {
        kind: String,
        name: JobName,
        namespace: Namespace,
        id: RequestId,
        replaces: Generation,
        containers: Vec<Container>,
        affinity: String,
        prefer: Vec<Preference>,
        spread: String,
        tolerations: BTreeSet<String>,
        anti_affinity: String,
        volumes: Vec<Volume>,
        network: Network,
        outputs: Vec<String>,
        workspace: Workspace,
        parallelism: u32,
        completions: u32,
        gang: bool,
        suspend: bool,
        restart_policy: RestartPolicy,
        backoff_limit: u32,
        retry: Retry,
        active_deadline_seconds: u64,
        termination_grace_period_seconds: u64,
        ttl_seconds_after_finished: u64,
        priority: i32,
        preemptible: bool,
        checkpoint: Checkpoint,
        on_disconnect: OnDisconnect,
        ..single: Body
    }
}

written! {
    struct Container {
        name: ContainerName,
        ..body: Body
    }
}

written! {
    /// What a container says, the single one at the top of the file.
    struct Body {
        image: String,
        command: Vec<String>,
        args: Vec<String>,
        env: BTreeMap<String, String>,
        working_dir: String,
        user: String,
        resources: Resources,
        limits: Limits,
        read_only_root: bool,
        capabilities: BTreeSet<String>,
        secrets: Vec<Secret>,
    }
}

written! {
    struct Resources {
        cpu: MilliCpu,
        memory: Bytes,
        gpu: Gpu,
    }
}

written! {
    struct Gpu {
        count: u32,
        milli: u32,
        memory: Bytes,
        model: BTreeSet<String>,
    }
}

written! {
    struct Limits {
        cpu: MilliCpu,
        memory: Bytes,
    }
}

written! {
    struct Secret {
        name: SecretName,
        mount: String,
    }
}

written! {
    struct Preference {
        when: String,
        weight: i32,
    }
}

written! {
    struct Volume {
        mount: String,
        host: String,
        size: Bytes,
        name: VolumeName,
        read_only: bool,
        save: bool,
    }
}

written! {
    struct Workspace {
        digest: Digest,
        bytes: Bytes,
        path: String,
    }
}

written! {
    struct Retry {
        min: Millis,
        max: Millis,
    }
}

written! {
    struct Checkpoint {
        mode: CheckpointMode,
        interval: Millis,
        signal: String,
        grace: Millis,
        ready: String,
        hooks: Hooks,
        tcp: TcpPolicy,
        keep: u32,
    }
}

written! {
    struct Hooks {
        quiesce: Vec<String>,
        resume: Vec<String>,
    }
}

written! {
    struct OnDisconnect {
        after: Millis,
        #[serde(rename = "do")]
        action: DisconnectAction,
        lost_after: Millis,
    }
}

impl File {
    /// The digest of what was written. Names do not count: they say which job this is, not what it does; nor does what a
    /// submission says of itself.
    pub fn digest(&self) -> Result<Digest, serde_json::Error> {
        let nameless = File { name: None, namespace: None, id: None, replaces: None, ..self.clone() };
        Ok(Digest::of(&serde_json::to_vec(&nameless)?))
    }
}

/// Absent where empty, as people write it.
fn some<T: Clone + Default + PartialEq>(value: &T) -> Option<T> {
    (*value != T::default()).then(|| value.clone())
}

impl From<&JobSpec> for File {
    /// The file that says in full what the job is, defaults included.
    fn from(job: &JobSpec) -> Self {
        let JobSpec { pod, placement, .. } = job;
        let single = match pod.containers.as_slice() {
            [only] if only.name.as_str() == super::build::SINGLE_CONTAINER => Some(Body::from(only)),
            _ => None,
        };
        let several = || {
            let container =
                |c: &super::ContainerSpec| Container { name: Some(c.name.clone()), body: Body::from(c) };
            pod.containers.iter().map(container).collect()
        };
        let preference =
            |p: &super::Preference| Preference { when: Some(p.when.clone()), weight: Some(p.weight) };
        File {
            kind: Some("Job".into()),
            name: Some(job.name.clone()),
            namespace: Some(job.namespace.clone()),
            id: None,
            replaces: None,
            containers: if single.is_some() { None } else { Some(several()) },
            affinity: placement.affinity.clone(),
            prefer: some(&placement.prefer.iter().map(preference).collect()),
            spread: placement.spread.clone(),
            tolerations: some(&placement.tolerations),
            anti_affinity: placement.anti_affinity.clone(),
            volumes: some(&pod.volumes.iter().map(Volume::from).collect()),
            network: Some(pod.network),
            outputs: some(&pod.outputs),
            workspace: pod.workspace.as_ref().map(|w| Workspace {
                digest: Some(w.digest),
                bytes: Some(w.bytes),
                path: Some(w.path.clone()),
            }),
            parallelism: Some(job.parallelism),
            completions: Some(job.completions),
            gang: some(&job.gang),
            suspend: some(&job.suspend),
            restart_policy: Some(pod.restart.policy),
            backoff_limit: Some(pod.restart.backoff_limit),
            retry: Some(Retry { min: Some(pod.restart.retry_min), max: Some(pod.restart.retry_max) }),
            active_deadline_seconds: job.active_deadline.map(seconds),
            termination_grace_period_seconds: Some(seconds(pod.grace)),
            ttl_seconds_after_finished: Some(seconds(job.ttl)),
            priority: Some(job.priority),
            preemptible: Some(job.preemptible),
            checkpoint: Some(Checkpoint::from(&pod.checkpoint)),
            on_disconnect: Some(OnDisconnect {
                after: Some(pod.on_disconnect.after),
                action: Some(pod.on_disconnect.action),
                lost_after: Some(pod.on_disconnect.lost_after),
            }),
            single: single.unwrap_or_default(),
        }
    }
}

fn seconds(span: Millis) -> u64 {
    span.0 / 1000
}

impl From<&super::ContainerSpec> for Body {
    fn from(container: &super::ContainerSpec) -> Self {
        let super::ContainerSpec { resources, limits, .. } = container;
        let gpu = |gpu: &crate::resources::GpuRequest| Gpu {
            count: Some(gpu.count),
            milli: Some(gpu.milli),
            memory: gpu.memory,
            model: some(&gpu.model),
        };
        let secret =
            |s: &super::SecretMount| Secret { name: Some(s.name.clone()), mount: Some(s.mount.clone()) };
        Body {
            image: Some(container.image.clone()),
            command: some(&container.command),
            args: some(&container.args),
            env: some(&container.env),
            working_dir: container.working_dir.clone(),
            user: container.user.clone(),
            resources: Some(Resources {
                cpu: Some(resources.cpu),
                memory: Some(resources.memory),
                gpu: resources.gpu.as_ref().map(gpu),
            }),
            limits: Some(Limits { cpu: Some(limits.cpu), memory: Some(limits.memory) }),
            read_only_root: some(&container.read_only_root),
            capabilities: some(&container.capabilities),
            secrets: some(&container.secrets.iter().map(secret).collect()),
        }
    }
}

impl From<&super::Volume> for Volume {
    fn from(volume: &super::Volume) -> Self {
        let mut written = Volume {
            mount: Some(volume.mount.clone()),
            read_only: some(&volume.read_only),
            save: some(&volume.save),
            ..Volume::default()
        };
        match &volume.source {
            VolumeSource::Host(path) => written.host = Some(path.clone()),
            VolumeSource::Scratch(size) => written.size = Some(*size),
            VolumeSource::Named(name) => written.name = Some(name.clone()),
        }
        written
    }
}

impl From<&super::Checkpoint> for Checkpoint {
    fn from(checkpoint: &super::Checkpoint) -> Self {
        Checkpoint {
            mode: Some(checkpoint.mode),
            interval: checkpoint.interval,
            signal: checkpoint.signal.clone(),
            grace: Some(checkpoint.grace),
            ready: checkpoint.ready.clone(),
            hooks: some(&Hooks { quiesce: some(&checkpoint.quiesce), resume: some(&checkpoint.resume) }),
            tcp: Some(checkpoint.tcp),
            keep: Some(checkpoint.keep),
        }
    }
}
