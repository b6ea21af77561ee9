//! What texts in a job file look like: names, paths, image references, expressions.

use crate::ids::{ContainerName, Digest, IdError, JobName, Namespace, RequestId, SecretName, VolumeName};
use crate::limits::{CEL_BYTES_MAX, LABEL_BYTES_MAX};

/// A kind of text.
#[derive(Clone, Copy)]
pub(super) struct Form {
    /// Whether the text is one; else why not, in words that follow the field's path.
    pub check: fn(&str) -> Result<(), String>,
    /// For editors: a regular expression (ECMA-262) that allows at least what `check` allows.
    pub pattern: &'static str,
}

const NAME_PATTERN: &str = "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$";
const PATH_BYTES_MAX: usize = 4095;
const IMAGE_BYTES_MAX: usize = 1024;
const USER_BYTES_MAX: usize = 128;

pub(super) const TEXT: Form = Form { check: text, pattern: "" };
pub(super) const KIND: Form = Form { check: kind, pattern: "^Job$" };
pub(super) const JOB_NAME: Form = Form { check: |t| id(JobName::parse(t)), pattern: NAME_PATTERN };
pub(super) const NAMESPACE: Form = Form { check: |t| id(Namespace::parse(t)), pattern: NAME_PATTERN };
pub(super) const TOKEN: Form = Form { check: |t| id(RequestId::parse(t)), pattern: "^[-a-z0-9]{1,64}$" };
pub(super) const CONTAINER_NAME: Form =
    Form { check: |t| id(ContainerName::parse(t)), pattern: NAME_PATTERN };
pub(super) const VOLUME_NAME: Form = Form { check: |t| id(VolumeName::parse(t)), pattern: NAME_PATTERN };
pub(super) const SECRET_NAME: Form = Form { check: |t| id(SecretName::parse(t)), pattern: NAME_PATTERN };
pub(super) const DIGEST: Form = Form { check: |t| id(Digest::parse(t)), pattern: "^sha256:[0-9a-f]{64}$" };
pub(super) const PATH: Form = Form { check: path, pattern: "^/" };
pub(super) const MOUNT: Form = Form { check: mount, pattern: "^/." };
pub(super) const ENV_NAME: Form = Form { check: env_name, pattern: "^[A-Za-z_][A-Za-z0-9_.-]*$" };
pub(super) const USER: Form =
    Form { check: user, pattern: "^[A-Za-z0-9_][A-Za-z0-9_.-]*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?$" };
pub(super) const IMAGE: Form = Form { check: image, pattern: "^[^\\s]+$" };
pub(super) const CEL: Form = Form { check: cel, pattern: "[^\\s]" };
pub(super) const LABEL: Form = Form { check: label, pattern: "^node\\.labels\\.[A-Za-z0-9_./-]+$" };
pub(super) const ANTI_AFFINITY: Form =
    Form { check: anti_affinity, pattern: "^(job|node\\.labels\\.[A-Za-z0-9_./-]+)$" };
/// What nodes call their taints and vendors their devices.
pub(super) const WORDS: Form = Form { check: words, pattern: "[^\\s]" };

/// capabilities(7), without the prefix `CAP_`.
pub(super) const CAPABILITIES: [&str; 41] = [
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

/// signal(7): those that ask a program for something and that it can catch.
pub(super) const SIGNALS: [&str; 14] = [
    "SIGALRM",
    "SIGCONT",
    "SIGHUP",
    "SIGINT",
    "SIGIO",
    "SIGPWR",
    "SIGQUIT",
    "SIGTERM",
    "SIGTSTP",
    "SIGURG",
    "SIGUSR1",
    "SIGUSR2",
    "SIGVTALRM",
    "SIGWINCH",
];

fn id<T>(parsed: Result<T, IdError>) -> Result<(), String> {
    parsed.map(drop).map_err(|error| error.to_string())
}

fn ensure(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.to_owned()) }
}

fn at_most(text: &str, bytes_max: usize) -> Result<(), String> {
    let bytes = text.len();
    if bytes <= bytes_max {
        Ok(())
    } else {
        Err(format!("{bytes} bytes long, at most {bytes_max} are allowed"))
    }
}

fn text(text: &str) -> Result<(), String> {
    ensure(!text.contains('\0'), "holds a NUL character, which no program can be handed")
}

fn kind(text: &str) -> Result<(), String> {
    match text {
        "Job" => Ok(()),
        "CronJob" | "Deployment" | "Service" => {
            Err(format!("`{text}` is not supported by this version, only `Job` is"))
        }
        _ => Err(format!("`{}` is no kind of job file; write Job", super::document::shorten(text))),
    }
}

fn path(path: &str) -> Result<(), String> {
    at_most(path, PATH_BYTES_MAX)?;
    ensure(path.starts_with('/'), "not an absolute path: begin it with `/`")?;
    ensure(!path.contains(char::is_control), "holds a control character")?;
    let whole = path.strip_suffix('/').unwrap_or(path);
    let plain = whole.split('/').skip(1).all(|part| !matches!(part, "" | "." | ".."));
    ensure(plain, "holds an empty part, `.` or `..`: write the path out")
}

fn mount(mount: &str) -> Result<(), String> {
    path(mount)?;
    ensure(mount != "/", "the root itself cannot be a mount: name a directory below it")
}

fn env_name(name: &str) -> Result<(), String> {
    let first = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    let rest = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    ensure(
        first && rest,
        "not an environment variable's name: letters, digits, `_`, `.` and `-`, not beginning with a digit",
    )
}

fn user(user: &str) -> Result<(), String> {
    at_most(user, USER_BYTES_MAX)?;
    let (name, group) = user.split_once(':').map_or((user, None), |(name, group)| (name, Some(group)));
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
            && (!part.bytes().all(|b| b.is_ascii_digit()) || part.parse::<u32>().is_ok())
    };
    ensure(
        part(name) && group.is_none_or(part),
        "not a user: write a uid, uid:gid or a name, such as 1000:1000",
    )
}

/// The shape only: the agent, which pulls, reads references to the letter.
fn image(image: &str) -> Result<(), String> {
    at_most(image, IMAGE_BYTES_MAX)?;
    ensure(!image.is_empty(), "empty: name an image, or write host")?;
    ensure(
        !image.contains(|c: char| c.is_whitespace() || c.is_control()),
        "an image's reference holds no white space",
    )?;
    if let Some(file) = image.strip_prefix("oci:").or_else(|| image.strip_prefix("docker-archive:")) {
        return mount(file).map_err(|why| format!("the path behind the `:`: {why}"));
    }
    ensure(
        !image.contains("://"),
        "an image's reference has no scheme: write docker.io/library/python:3.12-slim, oci:/path or \
         docker-archive:/file.tar",
    )?;
    let (name, digest) = image.split_once('@').map_or((image, None), |(name, digest)| (name, Some(digest)));
    if let Some(digest) = digest {
        id(Digest::parse(digest))?;
    }
    let (host, rest) = match name.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (Some(host), rest),
        _ => (None, name),
    };
    let (repository, tag) = rest.split_once(':').map_or((rest, None), |(path, tag)| (path, Some(tag)));
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
    };
    let plain =
        |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-[]:".contains(&b));
    ensure(
        host.is_none_or(plain) && repository.split('/').all(part) && tag.is_none_or(plain),
        "not an image's reference: write one such as docker.io/library/python:3.12-slim, lowercase but for \
         the tag",
    )
}

fn cel(expression: &str) -> Result<(), String> {
    text(expression)?;
    ensure(
        !expression.trim().is_empty(),
        "empty: write an expression such as node.arch == 'x86_64', or leave it out",
    )?;
    at_most(expression, CEL_BYTES_MAX)
}

fn label(label: &str) -> Result<(), String> {
    let key = label.strip_prefix("node.labels.").unwrap_or_default();
    at_most(key, LABEL_BYTES_MAX)?;
    ensure(
        !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"_./-".contains(&b)),
        "not a label: write one such as node.labels.rack",
    )
}

fn anti_affinity(value: &str) -> Result<(), String> {
    ensure(value == "job" || label(value).is_ok(), "neither `job` nor a label such as node.labels.rack")
}

fn words(words: &str) -> Result<(), String> {
    text(words)?;
    ensure(!words.trim().is_empty(), "empty")?;
    at_most(words, LABEL_BYTES_MAX)
}
