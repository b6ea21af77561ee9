//! The job file's fields: the one table from which files are read, written back, explained and described.

use super::form::{self, Form};
use crate::limits::{
    ARGS_MAX, BACKOFF_LIMIT_MAX, CHECKPOINTS_KEPT_MAX, CONTAINERS_PER_POD_MAX, DISCONNECT_AFTER_MS_MIN,
    DURATION_MS_MAX, GPU_MILLI_FULL, GPUS_PER_NODE_MAX, JOB_LIST_MAX, MEMORY_BYTES_MIN, PARALLELISM_MAX,
    PODS_PER_JOB_MAX, PRIORITY_MAX,
};
use crate::units::{Bytes, MilliCpu, Millis};

/// One field of a mapping.
pub(super) struct Field {
    pub name: &'static str,
    pub kind: Kind,
    pub required: bool,
    /// What it means, and its default.
    pub doc: &'static str,
    /// A value as one would write it, in JSON.
    pub example: &'static str,
}

/// What a field may hold.
pub(super) enum Kind {
    Text(Form),
    Flag,
    Whole {
        min: i64,
        max: i64,
    },
    /// Cores, at most `CPU_MILLI_MAX`.
    Cpu {
        min: MilliCpu,
    },
    /// Bytes, at most `MEMORY_BYTES_MAX`.
    Size {
        min: Bytes,
    },
    /// A duration, at most `DURATION_MS_MAX`.
    Span {
        min: Millis,
    },
    Choice(&'static [&'static str]),
    Object(Shape),
    List {
        of: &'static Kind,
        min: usize,
        max: usize,
    },
    /// Names, as the form or choice allows, to texts.
    Map {
        keys: Form,
        max: usize,
    },
}

/// The fields of a mapping, in groups that mappings share.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub groups: &'static [&'static [Field]],
    /// Exactly one of these is there.
    pub one_of: &'static [&'static str],
}

impl Shape {
    pub fn fields(&self) -> impl Iterator<Item = &'static Field> + use<> {
        self.groups.iter().copied().flatten()
    }

    pub fn field(&self, name: &str) -> Option<&'static Field> {
        self.fields().find(|field| field.name == name)
    }
}

const fn field(name: &'static str, kind: Kind, example: &'static str, doc: &'static str) -> Field {
    Field { name, kind, required: false, doc, example }
}

const fn required(name: &'static str, kind: Kind, example: &'static str, doc: &'static str) -> Field {
    Field { name, kind, required: true, doc, example }
}

const fn object(fields: &'static [&'static [Field]]) -> Kind {
    Kind::Object(Shape { groups: fields, one_of: &[] })
}

const fn list(of: &'static Kind, max: usize) -> Kind {
    Kind::List { of, min: 0, max }
}

const SECONDS_MAX: i64 = (DURATION_MS_MAX / 1000) as i64;
/// How long a pod may take to stop, in seconds.
const GRACE_SECONDS_MAX: i64 = 24 * 3600;
const WEIGHT_MAX: i64 = 100;

const TEXT: Kind = Kind::Text(form::TEXT);
const PATH: Kind = Kind::Text(form::PATH);
const MOUNT: Kind = Kind::Text(form::MOUNT);
const CEL: Kind = Kind::Text(form::CEL);
const SPAN: Kind = Kind::Span { min: Millis::ZERO };
const CPU: Kind = Kind::Cpu { min: MilliCpu(1) };
const MEMORY: Kind = Kind::Size { min: Bytes(MEMORY_BYTES_MIN) };
const SIZE: Kind = Kind::Size { min: Bytes(1) };

pub(super) static JOB: Shape =
    Shape { groups: &[&WHO, &CONTAINER, &SEVERAL, &WHERE, &POD, &HOW], one_of: &["image", "containers"] };

static WHO: [Field; 5] = [
    field("kind", Kind::Text(form::KIND), r#""Job""#, "What this file describes; default: Job."),
    field("name", Kind::Text(form::JOB_NAME), r#""digits""#, "The job's name, unique in its namespace."),
    field(
        "namespace",
        Kind::Text(form::NAMESPACE),
        r#""default""#,
        "A user, team or project; default: default.",
    ),
    field(
        "id",
        Kind::Text(form::TOKEN),
        r#""submit-7f3a""#,
        "Of this submission, for whoever sends it: arriving again, however late, it changes nothing.",
    ),
    field(
        "replaces",
        Kind::Whole { min: 0, max: i64::MAX },
        "3",
        "The job's generation that this file is meant to follow, 0 where there is to be no such job yet; of any other \
         it changes nothing.",
    ),
];

/// What a job of one container writes at the top, and each of several in its own entry.
pub(super) static CONTAINER: [Field; 11] = [
    field(
        "image",
        Kind::Text(form::IMAGE),
        r#""docker.io/library/python:3.12-slim""#,
        "A registry's reference, oci:/path/to/layout[:tag], docker-archive:/file.tar, or host: the node's own \
         root, copy-on-write.",
    ),
    field(
        "command",
        list(&TEXT, ARGS_MAX),
        r#"["python3", "train.py"]"#,
        "In place of the image's entrypoint; default: the image's.",
    ),
    field("args", list(&TEXT, ARGS_MAX), r#"["--epochs", "20"]"#, "Arguments of the command."),
    field(
        "env",
        Kind::Map { keys: form::ENV_NAME, max: ARGS_MAX },
        r#"{"EPOCHS": "20"}"#,
        "Environment variables; values are text.",
    ),
    field("workingDir", PATH, r#""/srv/app""#, "Where the command starts; default: the image's."),
    field(
        "user",
        Kind::Text(form::USER),
        r#""1000:1000""#,
        "A uid, uid:gid or a name that the image knows; default: the image's.",
    ),
    field(
        "resources",
        object(&[&RESOURCES]),
        r#"{"cpu": "2", "memory": "4Gi"}"#,
        "What is set aside; default: 0.1 cores and 128Mi.",
    ),
    field(
        "limits",
        object(&[&LIMITS]),
        r#"{"cpu": "4", "memory": "8Gi"}"#,
        "Up to where it may burst; default: its resources.",
    ),
    field("readOnlyRoot", Kind::Flag, "true", "The root file system is read-only; default: false."),
    field(
        "capabilities",
        list(&Kind::Choice(&form::CAPABILITIES), JOB_LIST_MAX),
        r#"["NET_ADMIN"]"#,
        "Linux capabilities beyond the default set, where the node's policy grants them.",
    ),
    field(
        "secrets",
        list(&object(&[&SECRET]), JOB_LIST_MAX),
        r#"[{"name": "wandb", "mount": "/run/secrets/wandb"}]"#,
        "Secrets of the namespace, mounted as files.",
    ),
];

static SEVERAL: [Field; 1] = [field(
    "containers",
    Kind::List {
        of: &Kind::Object(Shape { groups: &[&CONTAINER_NAME, &CONTAINER], one_of: &["image"] }),
        min: 1,
        max: CONTAINERS_PER_POD_MAX,
    },
    r#"[{"name": "main", "image": "docker.io/library/python:3.12-slim"}]"#,
    "Several containers of one pod, in place of the fields of a single one.",
)];

static CONTAINER_NAME: [Field; 1] = [required(
    "name",
    Kind::Text(form::CONTAINER_NAME),
    r#""main""#,
    "The container's name, unique in the pod.",
)];

static RESOURCES: [Field; 3] = [
    field("cpu", CPU, r#""2""#, "Cores: 2, 0.5 or 500m; default: 0.1."),
    field("memory", MEMORY, r#""4Gi""#, "Memory; default: 128Mi."),
    field("gpu", object(&[&GPU]), r#"{"count": 1}"#, "GPUs; default: none."),
];

static GPU: [Field; 4] = [
    field("count", Kind::Whole { min: 1, max: GPUS_PER_NODE_MAX as i64 }, "1", "Devices; default: 1."),
    field(
        "milli",
        Kind::Whole { min: 1, max: GPU_MILLI_FULL as i64 },
        "500",
        "Thousandths of the device, below 1000 only with count 1; default: 1000.",
    ),
    field("memory", MEMORY, r#""8Gi""#, "Device memory that each must have, or that the share takes."),
    field(
        "model",
        list(&Kind::Text(form::WORDS), JOB_LIST_MAX),
        r#"["A100", "H100"]"#,
        "Any of these models; default: any.",
    ),
];

static LIMITS: [Field; 2] = [
    field("cpu", CPU, r#""4""#, "Cores; default: those of resources."),
    field("memory", MEMORY, r#""8Gi""#, "Memory, beyond which it is killed; default: that of resources."),
];

static SECRET: [Field; 2] = [
    required("name", Kind::Text(form::SECRET_NAME), r#""wandb""#, "The secret's name."),
    required("mount", MOUNT, r#""/run/secrets/wandb""#, "Where it appears."),
];

static WHERE: [Field; 5] = [
    field("affinity", CEL, r#""node.arch == 'x86_64'""#, "CEL over `node`: where pods may run."),
    field(
        "prefer",
        list(&object(&[&PREFERENCE]), JOB_LIST_MAX),
        r#"[{"when": "node.gpu.model == 'H100'", "weight": 50}]"#,
        "Where pods had rather run.",
    ),
    field(
        "spread",
        Kind::Text(form::LABEL),
        r#""node.labels.rack""#,
        "A label over whose values the pods are spread.",
    ),
    field(
        "tolerations",
        list(&Kind::Text(form::WORDS), JOB_LIST_MAX),
        r#"["spot"]"#,
        "Taints of nodes that do not keep the pods away.",
    ),
    field(
        "antiAffinity",
        Kind::Text(form::ANTI_AFFINITY),
        r#""job""#,
        "job: its pods on different nodes; or a label whose values no two of them share.",
    ),
];

static PREFERENCE: [Field; 2] = [
    required("when", CEL, r#""node.gpu.model == 'H100'""#, "CEL over `node`."),
    required("weight", Kind::Whole { min: 1, max: WEIGHT_MAX }, "50", "How much it counts, 1 to 100."),
];

static POD: [Field; 4] = [
    field(
        "volumes",
        list(&Kind::Object(Shape { groups: &[&VOLUME], one_of: &["host", "size", "name"] }), JOB_LIST_MAX),
        r#"[{"mount": "/data", "host": "/srv/data", "readOnly": true}]"#,
        "Mounts in every container of the pod.",
    ),
    field(
        "network",
        Kind::Choice(&["bridge", "host", "none"]),
        r#""bridge""#,
        "bridge: a network of its own with outgoing access (default); host: the node's; none: loopback only.",
    ),
    field(
        "outputs",
        list(&PATH, JOB_LIST_MAX),
        r#"["/srv/app/model"]"#,
        "Paths in the first container, kept in the depot when the job ends.",
    ),
    field(
        "workspace",
        object(&[&WORKSPACE]),
        WORKSPACE_EXAMPLE,
        "Files that travel with the job, as `berth run` writes it.",
    ),
];

static VOLUME: [Field; 6] = [
    required("mount", MOUNT, r#""/data""#, "Where it appears in the containers."),
    field("host", PATH, r#""/srv/data""#, "A path of the node's, where its configuration allows it."),
    field(
        "size",
        SIZE,
        r#""10Gi""#,
        "Scratch: empty at the pod's start, gone at its end, at most this large.",
    ),
    field(
        "name",
        Kind::Text(form::VOLUME_NAME),
        r#""digits-ckpt""#,
        "A named volume, kept between pods of the job.",
    ),
    field("readOnly", Kind::Flag, "true", "Default: false."),
    field("save", Kind::Flag, "true", "A named volume goes along with checkpoints; default: false."),
];

const WORKSPACE_EXAMPLE: &str = r#"{
    "digest": "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "bytes": "1Mi",
    "path": "/srv/app"
}"#;

static WORKSPACE: [Field; 3] = [
    required(
        "digest",
        Kind::Text(form::DIGEST),
        r#""sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855""#,
        "The archive (tar, gzip) in the depot.",
    ),
    required("bytes", SIZE, r#""1Mi""#, "The archive's size."),
    required("path", MOUNT, r#""/srv/app""#, "Where it is unpacked in each container."),
];

static HOW: [Field; 14] = [
    field(
        "parallelism",
        Kind::Whole { min: 1, max: PARALLELISM_MAX as i64 },
        "1",
        "Pods at once; default: 1.",
    ),
    field(
        "completions",
        Kind::Whole { min: 1, max: PODS_PER_JOB_MAX as i64 },
        "1",
        "Pods that must succeed; default: as many as run at once.",
    ),
    field("gang", Kind::Flag, "true", "All pods of the job together or none; default: false."),
    field("suspend", Kind::Flag, "true", "Accepted, and not started before `berth resume`; default: false."),
    field(
        "restartPolicy",
        Kind::Choice(&["Never", "OnFailure", "Always"]),
        r#""OnFailure""#,
        "After a failure of the program's own; default: Never. Evictions are made good whatever it says.",
    ),
    field(
        "backoffLimit",
        Kind::Whole { min: 0, max: BACKOFF_LIMIT_MAX as i64 },
        "6",
        "With OnFailure: how many failures the job is forgiven; default: 6.",
    ),
    field(
        "retry",
        object(&[&RETRY]),
        r#"{"min": "10s", "max": "5m"}"#,
        "The wait before a retry, doubling from min to max.",
    ),
    field(
        "activeDeadlineSeconds",
        Kind::Whole { min: 1, max: SECONDS_MAX },
        "86400",
        "Running time of the job, not time pending or frozen; default: without end.",
    ),
    field(
        "terminationGracePeriodSeconds",
        Kind::Whole { min: 0, max: GRACE_SECONDS_MAX },
        "30",
        "Between the stop signal and SIGKILL; default: 30.",
    ),
    field(
        "ttlSecondsAfterFinished",
        Kind::Whole { min: 0, max: SECONDS_MAX },
        "604800",
        "How long the record is kept once the job has ended; default: 7 days.",
    ),
    field(
        "priority",
        Kind::Whole { min: -(PRIORITY_MAX as i64), max: PRIORITY_MAX as i64 },
        "0",
        "Higher goes first; default: 0.",
    ),
    field("preemptible", Kind::Flag, "true", "May give way to a higher priority; default: true."),
    field(
        "checkpoint",
        object(&[&CHECKPOINT]),
        r#"{"mode": "auto", "keep": 3}"#,
        "How the pod is saved; default: mode auto, without interval, keep 3.",
    ),
    field(
        "onDisconnect",
        object(&[&ON_DISCONNECT]),
        r#"{"after": "40s", "do": "pause", "lostAfter": "60s"}"#,
        "What a pod does where its node has lost the controller.",
    ),
];

static RETRY: [Field; 2] = [
    field("min", SPAN, r#""10s""#, "The first wait; default: 10s."),
    field("max", SPAN, r#""5m""#, "The longest wait; default: 5m."),
];

static CHECKPOINT: [Field; 8] = [
    field(
        "mode",
        Kind::Choice(&["auto", "criu", "cooperative", "none"]),
        r#""auto""#,
        "criu: the pod's memory; cooperative: the program saves itself; default: auto, whichever works.",
    ),
    field(
        "interval",
        Kind::Span { min: Millis::from_secs(1) },
        r#""10m""#,
        "Between checkpoints; default: only when one is needed.",
    ),
    field(
        "signal",
        Kind::Choice(&form::SIGNALS),
        r#""SIGUSR1""#,
        "Cooperative: save yourself; exit 85 means saved, restart me.",
    ),
    field("grace", SPAN, r#""30s""#, "Cooperative: how long saving may take; default: 30s."),
    field("ready", MOUNT, r#""/run/berth/saved""#, "Cooperative: this file appears once all is saved."),
    field(
        "hooks",
        object(&[&HOOKS]),
        r#"{"quiesce": ["/bin/sync"], "resume": ["/bin/true"]}"#,
        "Commands run in the container around a checkpoint.",
    ),
    field(
        "tcp",
        Kind::Choice(&["close", "keep"]),
        r#""close""#,
        "Established connections after a restore; default: close.",
    ),
    field(
        "keep",
        Kind::Whole { min: 1, max: CHECKPOINTS_KEPT_MAX as i64 },
        "3",
        "How many are kept; default: 3.",
    ),
];

static HOOKS: [Field; 2] = [
    field(
        "quiesce",
        list(&TEXT, ARGS_MAX),
        r#"["/bin/sync"]"#,
        "Before the checkpoint: a command and its arguments.",
    ),
    field("resume", list(&TEXT, ARGS_MAX), r#"["/bin/true"]"#, "After it, and after a restore."),
];

static ON_DISCONNECT: [Field; 3] = [
    field(
        "after",
        Kind::Span { min: Millis(DISCONNECT_AFTER_MS_MIN) },
        r#""40s""#,
        "Without a word from the controller for this long the pod acts; at least 20s; default: 40s.",
    ),
    field(
        "do",
        Kind::Choice(&["pause", "continue", "stop"]),
        r#""pause""#,
        "pause: freeze; stop: end, to start elsewhere; continue: go on, and never be replaced; default: pause.",
    ),
    field(
        "lostAfter",
        Kind::Span { min: Millis(DISCONNECT_AFTER_MS_MIN) },
        r#""60s""#,
        "Silence after which the pod may be placed elsewhere; default: 60s, or `after` where that is longer.",
    ),
];
