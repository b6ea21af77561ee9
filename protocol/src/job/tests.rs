//! Job files as data: texts and what is made of them, to the letter.

mod properties;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use super::*;
use crate::message::user::FieldError;
use crate::units::MilliCpu;

const CONTRACT: &str = include_str!("testdata/contract.yaml");

fn errors(text: &str) -> Vec<FieldError> {
    parse(text.as_bytes(), None).expect_err(text)
}

/// The errors of `text`, each as `line:column field: message`, in order.
fn check(text: &str, expect: &[&str]) {
    let place = |e: &FieldError| match (e.line, e.column) {
        (Some(line), Some(column)) => format!("{line}:{column} "),
        _ => String::new(),
    };
    let told: Vec<String> =
        errors(text).iter().map(|e| format!("{}{}: {}", place(e), e.field, e.message)).collect();
    assert_eq!(told, expect, "\n{text}");
}

/// A file of one field beside those required.
fn check_field(text: &str, expect: &str) {
    check(&format!("name: a\nimage: host\n{text}\n"), &[expect]);
}

fn spec(text: &str) -> JobSpec {
    parse(text.as_bytes(), None).unwrap_or_else(|e| panic!("{}", show_errors("job", text, &e))).spec
}

fn written(text: &str) -> Digest {
    parse(text.as_bytes(), None).unwrap_or_else(|e| panic!("{}", show_errors("job", text, &e))).written
}

#[test]
fn the_contract_parses_field_by_field() {
    let job = spec(CONTRACT);
    let main = &job.pod.containers[0];
    assert_eq!((job.namespace.as_str(), job.name.as_str()), ("default", "digits"));
    assert_eq!((main.name.as_str(), main.image.as_str()), ("main", "docker.io/library/python:3.12-slim"));
    assert_eq!(main.command, ["python3", "train.py"]);
    assert_eq!(main.env, BTreeMap::from([("EPOCHS".into(), "20".into())]));
    assert_eq!(main.working_dir.as_deref(), Some("/srv/app"));
    assert_eq!(main.user.as_deref(), Some("1000:1000"));
    assert_eq!((main.resources.cpu, main.resources.memory), (MilliCpu(2000), Bytes(4 << 30)));
    let gpu = main.resources.gpu.as_ref().unwrap();
    assert_eq!((gpu.count, gpu.milli, gpu.memory), (1, 1000, Some(Bytes(8 << 30))));
    assert_eq!(gpu.model, BTreeSet::from(["A100".into(), "H100".into()]));
    assert_eq!(main.limits, Limits { cpu: MilliCpu(4000), memory: Bytes(8 << 30) });
    assert_eq!(main.secrets[0].mount, "/run/secrets/wandb");
    assert_eq!(
        job.placement.affinity.as_deref(),
        Some(r#"node.labels.zone == "lab" && node.arch == "x86_64""#)
    );
    assert_eq!(job.placement.prefer[0].weight, 50);
    assert_eq!(job.placement.spread.as_deref(), Some("node.labels.rack"));
    assert_eq!(job.placement.anti_affinity.as_deref(), Some("job"));
    assert_eq!(job.placement.tolerations, BTreeSet::from(["spot".into()]));
    let volume = |i: usize| (job.pod.volumes[i].source.clone(), job.pod.volumes[i].read_only);
    assert_eq!(volume(0), (VolumeSource::Host("/srv/data".into()), true));
    assert_eq!(volume(1), (VolumeSource::Scratch(Bytes(10 << 30)), false));
    assert_eq!(volume(2), (VolumeSource::Named(VolumeName::parse("digits-ckpt").unwrap()), false));
    assert_eq!(job.pod.outputs, ["/srv/app/model"]);
    assert_eq!(job.active_deadline, Some(Millis::from_secs(86400)));
    let checkpoint = &job.pod.checkpoint;
    assert_eq!(checkpoint.interval, Some(Millis::from_secs(600)));
    assert_eq!(checkpoint.signal.as_deref(), Some("SIGUSR1"));
    assert_eq!(checkpoint.ready.as_deref(), Some("/run/berth/saved"));
    assert_eq!((checkpoint.quiesce.len(), checkpoint.resume.len()), (1, 1));
    assert_eq!(job.pod.on_disconnect, OnDisconnect::default());
    // Every field of the table is in the sample, but for the other form, what orders submissions, and what `berth run`
    // writes.
    let fields: BTreeSet<&str> = schema::JOB.fields().map(|field| field.name).collect();
    let sample: serde_json::Map<String, serde_json::Value> = match render(&job) {
        serde_json::Value::Object(fields) => fields,
        other => panic!("{other}"),
    };
    let top_keys: BTreeSet<&str> = CONTRACT
        .lines()
        .filter(|line| !line.starts_with(' '))
        .filter_map(|line| line.split_once(':').map(|(key, _)| key))
        .collect();
    let missing: Vec<_> = fields.difference(&top_keys).collect();
    assert_eq!(missing, [&"containers", &"id", &"replaces", &"workspace"]);
    assert!(sample.keys().all(|key| fields.contains(key.as_str())));
}

#[test]
fn the_defaults_of_the_contract() {
    let job = spec("{name: a, image: host}");
    assert_eq!(job.namespace.as_str(), "default");
    let main = &job.pod.containers[0];
    assert!(main.command.is_empty() && main.working_dir.is_none() && main.user.is_none());
    assert_eq!(
        main.resources,
        Resources { cpu: MilliCpu(100), memory: Bytes(128 << 20), ..Resources::default() }
    );
    assert_eq!(main.limits, Limits { cpu: MilliCpu(100), memory: Bytes(128 << 20) });
    assert_eq!(job.pod.network, Network::Bridge);
    assert_eq!(job.pod.restart.policy, RestartPolicy::Never);
    assert_eq!((job.parallelism, job.completions, job.priority), (1, 1, 0));
    assert!(job.preemptible && !job.gang && !job.suspend);
    assert_eq!(job.pod.checkpoint, Checkpoint::default());
    assert_eq!(job.pod.on_disconnect, OnDisconnect::default());
    assert_eq!(job.pod.grace, Millis::from_secs(30));
    assert_eq!(job.ttl, Millis::from_secs(7 * 86400));
    assert_eq!(job.active_deadline, None);
    assert_eq!(spec("{name: a, image: host, resources: {gpu: {}}}").pod.resources().gpu.unwrap().milli, 1000);
    assert_eq!(spec("{name: a, image: host, parallelism: 4}").completions, 4);
}

#[test]
fn names_come_from_the_topic_or_agree_with_it() {
    let (namespace, name) = (Namespace::parse("lab").unwrap(), JobName::parse("a").unwrap());
    let parse = |text: &str| parse(text.as_bytes(), Some((&namespace, &name)));
    let bare = parse("image: host").unwrap();
    assert_eq!((&bare.spec.namespace, &bare.spec.pod.job), (&namespace, &name));
    assert_eq!(parse("{image: host, name: a, namespace: lab}").unwrap(), bare);
    let told: Vec<String> = parse("{image: host, name: b, namespace: default}")
        .unwrap_err()
        .into_iter()
        .map(|e| format!("{}: {}", e.field, e.message))
        .collect();
    assert_eq!(
        told,
        [
            "name: `b` here, but `a` in the topic it was sent to",
            "namespace: `default` here, but `lab` in the topic it was sent to"
        ]
    );
}

#[test]
fn every_error_at_once() {
    check(
        "kind: Job\nname: Digits\nimage: host\nresources:\n  cpus: 2\n  memory: 4gi\nrestart_policy: never\nparallelism: lots\n",
        &[
            "2:7 name: job `Digits` may hold only a-z, 0-9 and `-`, and must begin and end with a letter or a digit",
            "5:3 resources.cpus: unknown field, did you mean `cpu`?",
            "6:11 resources.memory: `4gi` is not a size: write a whole number and a unit, such as 500Mi, 4Gi or 8GB",
            "7:1 restart_policy: unknown field, did you mean `restartPolicy`?",
            "8:14 parallelism: expected a whole number, found the text `lots`; write for example 1",
        ],
    );
}

#[test]
fn unknown_fields() {
    for (text, expect) in [
        ("cpus: 2", "3:1 cpus: unknown field, did you mean `resources.cpu`?"),
        ("memory: 2Gi", "3:1 memory: unknown field, did you mean `resources.memory`?"),
        ("gpus: 1", "3:1 gpus: unknown field, did you mean `resources.gpu`?"),
        ("restart-policy: Never", "3:1 restart-policy: unknown field, did you mean `restartPolicy`?"),
        ("comand: [a]", "3:1 comand: unknown field, did you mean `command`?"),
        ("replicas: 3", "3:1 replicas: unknown field, did you mean `parallelism`?"),
        ("nodeSelector: {a: b}", "3:1 nodeSelector: unknown field, did you mean `affinity`?"),
        ("hostNetwork: true", "3:1 hostNetwork: unknown field, did you mean `network: host`?"),
        ("apiVersion: batch/v1", "3:1 apiVersion: unknown field: leave it out, a job file has no version"),
        ("metadata: {name: a}", "3:1 metadata: unknown field: write `name` and `namespace` at the top"),
        ("quux: 1", "3:1 quux: unknown field; `berth schema` lists those known"),
        (
            "resources: {requests: {cpu: 1}}",
            "3:13 resources.requests: unknown field: write `cpu` and `memory` right below `resources`",
        ),
        (
            "resources: {limits: {cpu: 1}}",
            "3:13 resources.limits: unknown field here; `limits` stands at the top",
        ),
        ("retry: {foo: 1s}", "3:9 retry.foo: unknown field; known are min, max"),
        (
            "volumes: [{mountPath: /a, size: 1Gi, mount: /b}]",
            "3:12 volumes[0].mountPath: unknown field, did you mean `mount`?",
        ),
    ] {
        check_field(text, expect);
    }
}

#[test]
fn wrong_types() {
    for (text, expect) in [
        (
            "command: python3 train.py",
            r#"3:10 command: expected a list, found the text `python3 train.py`; write for example ["python3", "train.py"]"#,
        ),
        (
            "env: {EPOCHS: 20}",
            r#"3:15 env.EPOCHS: expected text, found the number 20; put it in quotes: "20""#,
        ),
        ("env: {V: 1.10}", r#"3:10 env.V: expected text, found the number 1.10; put it in quotes: "1.10""#),
        ("env: {V: true}", r#"3:10 env.V: expected text, found the boolean true; put it in quotes: "true""#),
        ("env: {V: }", "3:8 env.V: expected text, found nothing; write a value, or leave the field out"),
        ("env: [A=1]", r#"3:6 env: expected a mapping, found a list; write for example {"EPOCHS": "20"}"#),
        ("gang: yes", "3:7 gang: expected true or false, found the text `yes`; write for example true"),
        ("priority: 1.5", "3:11 priority: expected a whole number, found the number 1.5"),
        (
            "resources: {gpu: 1}",
            r#"3:18 resources.gpu: expected a mapping, found the number 1; write for example {"count": 1}"#,
        ),
        (
            "resources: {cpu: [2]}",
            r#"3:18 resources.cpu: expected a number of cores, found a list; write for example "2""#,
        ),
        ("retry: {max: 300}", "3:14 retry.max: `300` is not a duration: write 30s, 10m, 1h30m or 500ms"),
        ("args: [1]", r#"3:8 args[0]: expected text, found the number 1; put it in quotes: "1""#),
        ("args:", "3:5 args: expected a list, found nothing; write a value, or leave the field out"),
    ] {
        check_field(text, expect);
    }
}

#[test]
fn bounds_and_words() {
    for (text, expect) in [
        ("kind: Deployment", "3:7 kind: `Deployment` is not supported by this version, only `Job` is"),
        ("kind: job", "3:7 kind: `job` is no kind of job file; write Job"),
        ("parallelism: 0", "3:14 parallelism: 0 is out of bounds: 1 to 10000 are allowed"),
        ("priority: -1001", "3:11 priority: -1001 is out of bounds: -1000 to 1000 are allowed"),
        ("priority: 1e300", "3:11 priority: expected a whole number, found the number 1e300"),
        ("resources: {cpu: 0}", "3:18 resources.cpu: 0 is less than the least amount, 1m"),
        ("resources: {memory: 1Mi}", "3:21 resources.memory: 1Mi is less than the least size, 4Mi"),
        ("resources: {memory: 9999Ti}", "3:21 resources.memory: `9999Ti` is more than 1024Ti"),
        (
            "onDisconnect: {after: 10s}",
            "3:23 onDisconnect.after: 10s is shorter than the least duration, 20s",
        ),
        (
            "restartPolicy: always",
            "3:16 restartPolicy: `always` is not a choice here, did you mean `Always`?",
        ),
        ("network: vlan", "3:10 network: `vlan` is not a choice here; write one of bridge, host, none"),
        (
            "capabilities: [CAP_NET_ADMIN]",
            "3:16 capabilities[0]: `CAP_NET_ADMIN` is not a choice here, did you mean `NET_ADMIN`?",
        ),
        (
            "volumes: [{mount: /a, size: 1Mi, save: true}]",
            "3:40 volumes[0].save: for a named volume: scratch goes along anyway, a path of the node's never",
        ),
        (
            "volumes: [{mount: /a, name: a, save: true}]\nparallelism: 2\ncompletions: 2",
            "3:38 volumes[0].save: its 2 pods at once would each set the volume back for all",
        ),
        (
            "checkpoint: {signal: USR1}",
            "3:22 checkpoint.signal: `USR1` is not a choice here, did you mean `SIGUSR1`?",
        ),
        (
            "checkpoint: {signal: SIGKILL}",
            "3:22 checkpoint.signal: `SIGKILL` is not a choice here; write one of SIGALRM, SIGCONT, SIGHUP, SIGINT, SIGIO, SIGPWR, SIGQUIT, SIGTERM, SIGTSTP, SIGURG, SIGUSR1, SIGUSR2, SIGVTALRM, SIGWINCH",
        ),
        ("workingDir: app", "3:13 workingDir: not an absolute path: begin it with `/`"),
        ("workingDir: /a/../b", "3:13 workingDir: holds an empty part, `.` or `..`: write the path out"),
        ("outputs: [model]", "3:11 outputs[0]: not an absolute path: begin it with `/`"),
        (
            "env: {1A: x}",
            "3:7 env.1A: not an environment variable's name: letters, digits, `_`, `.` and `-`, not beginning with a digit",
        ),
        ("env: {A: \"\\0\"}", "3:10 env.A: holds a NUL character, which no program can be handed"),
        ("user: a b", "3:7 user: not a user: write a uid, uid:gid or a name, such as 1000:1000"),
        ("spread: rack", "3:9 spread: not a label: write one such as node.labels.rack"),
        ("antiAffinity: node", "3:15 antiAffinity: neither `job` nor a label such as node.labels.rack"),
        (
            "affinity: ' '",
            "3:11 affinity: empty: write an expression such as node.arch == 'x86_64', or leave it out",
        ),
    ] {
        check_field(text, expect);
    }
    check_field(
        &format!("affinity: {}", "a".repeat(1025)),
        "3:11 affinity: 1025 bytes long, at most 1024 are allowed",
    );
    check_field(
        &format!("tolerations: [{}]", "a,".repeat(65)),
        "3:14 tolerations: holds 65 entries, 0 to 64 are allowed",
    );
}

#[test]
fn images() {
    for good in [
        "host",
        "busybox",
        "python:3.12-slim",
        "docker.io/library/python:3.12-slim",
        "localhost:5000/a/b_c.d:V1",
        "Registry.Lab:5000/a",
        "a@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "oci:/srv/layout",
        "oci:/srv/layout:latest",
        "docker-archive:/srv/a.tar",
    ] {
        spec(&format!("name: a\nimage: {good}"));
    }
    for (bad, why) in [
        ("\"\"", "empty: name an image, or write host"),
        ("a b", "an image's reference holds no white space"),
        ("oci:layout", "the path behind the `:`: not an absolute path: begin it with `/`"),
        (
            "docker://python",
            "an image's reference has no scheme: write docker.io/library/python:3.12-slim, oci:/path or docker-archive:/file.tar",
        ),
        (
            "Python",
            "not an image's reference: write one such as docker.io/library/python:3.12-slim, lowercase but for the tag",
        ),
        (
            "a//b",
            "not an image's reference: write one such as docker.io/library/python:3.12-slim, lowercase but for the tag",
        ),
        ("a@md5:00", "`md5:00` is not a digest: expected sha256: and 64 hexadecimal digits"),
    ] {
        check(&format!("name: a\nimage: {bad}"), &[&format!("2:8 image: {why}")]);
    }
}

#[test]
fn relations() {
    for (text, expect) in [
        (
            "resources: {gpu: {count: 2, milli: 500}}",
            "3:36 resources.gpu.milli: a share of 500 thousandths is of one device, and `count` is 2",
        ),
        ("resources: {cpu: 2}\nlimits: {cpu: 1}", "4:15 limits.cpu: 1 is less than `resources.cpu` (2)"),
        (
            "limits: {memory: 64Mi}",
            "3:18 limits.memory: 64Mi is less than `resources.memory` (128Mi, the default)",
        ),
        ("retry: {min: 10m}", "3:8 retry: the first wait (min, 10m) is longer than the longest (max, 5m)"),
        (
            "onDisconnect: {after: 2m, lostAfter: 60s}",
            "3:38 onDisconnect.lostAfter: 1m is shorter than `after` (2m): a node is not lost before its pods act",
        ),
        (
            "parallelism: 3\ncompletions: 2",
            "3:14 parallelism: 3 pods at once are more than the 2 that must succeed (`completions`)",
        ),
        (
            "gang: true\ncompletions: 2",
            "3:7 gang: a gang runs all 2 of its pods at once, and `parallelism` allows 1",
        ),
        ("command: ['']", "3:11 command[0]: the command's name is empty"),
        (
            "volumes: [{mount: /a, size: 1Gi}, {mount: /a/, host: /b}]",
            "3:43 volumes[1].mount: `volumes[0].mount` is mounted there already",
        ),
        (
            "volumes: [{mount: /a, size: 1Gi}]\nsecrets: [{name: s, mount: /a}]",
            "4:28 secrets[0].mount: `volumes[0].mount` is mounted there already",
        ),
        (
            "volumes: [{mount: /a, size: 1Gi, name: b}]",
            "3:34 volumes[0].name: cannot be together with `size`",
        ),
        ("volumes: [{mount: /a}]", "3:11 volumes[0]: one of host, size, name is required"),
        (
            "volumes: [{mount: /, size: 1Gi}]",
            "3:19 volumes[0].mount: the root itself cannot be a mount: name a directory below it",
        ),
        ("secrets: [{mount: /a}]", "3:11 secrets[0].name: required, such as \"wandb\""),
        (
            "checkpoint: {mode: cooperative, grace: 10s}",
            "3:20 checkpoint.mode: cooperative needs `signal` or `ready` to ask the program by",
        ),
        (
            "checkpoint: {mode: cooperative, signal: USR1}",
            "3:41 checkpoint.signal: `USR1` is not a choice here, did you mean `SIGUSR1`?",
        ),
    ] {
        check_field(text, expect);
    }
    check("{}", &["1:1 : one of image, containers is required", "1:1 name: required, such as \"digits\""]);
    // What is in error already contradicts nothing.
    check_field(
        "resources: {memory: lots}\nlimits: {memory: 64Mi}",
        "3:21 resources.memory: `lots` is not a size: write a whole number and a unit, such as 500Mi, 4Gi or 8GB",
    );
}

#[test]
fn what_is_asked_may_save_itself() {
    for by in ["signal: SIGUSR1", "ready: /run/saved"] {
        let job = spec(&format!("name: a\nimage: host\ncheckpoint: {{mode: cooperative, {by}}}\n"));
        assert!(job.pod.checkpoint.asks(), "{by}");
    }
}

#[test]
fn pauses_double_and_differ_by_a_tenth_at_most() {
    let restart = Restart::default();
    for (failures, whole) in
        [(0, 10_000), (1, 10_000), (2, 20_000), (5, 160_000), (6, 300_000), (u32::MAX, 300_000)]
    {
        let pauses: BTreeSet<Millis> =
            (0..50).map(|pod| restart.backoff(&format!("u1-{pod}"), failures)).collect();
        assert!(pauses.iter().all(|pause| (whole / 10 * 9..=whole).contains(&pause.0)), "{pauses:?}");
        assert!(pauses.len() > 40, "{pauses:?}");
    }
    assert_eq!(restart.backoff(&"u1-0", 3), restart.backoff(&"u1-0", 3));
    let endless = Restart { retry_min: Millis(u64::MAX), retry_max: Millis(u64::MAX), ..restart };
    assert!(endless.backoff(&"u1-0", 9) <= endless.retry_max);
}

#[test]
fn several_containers() {
    let job = spec(
        "name: a\ncontainers:\n- {name: x, image: host, resources: {cpu: 1}}\n- {name: y, image: b, resources: {gpu: {}}}",
    );
    let names: Vec<&str> = job.pod.containers.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, ["x", "y"]);
    assert_eq!(job.pod.resources().cpu, MilliCpu(1100));
    check(
        "name: a\nimage: host\nargs: [b]\ncontainers:\n- {name: x, image: host, resources: {gpu: {}}}\n- {name: x, image: host, resources: {gpu: {}}}\n- {env: {}}",
        &[
            "3:7 args: with `containers`, write it in each of them",
            "4:1 containers: cannot be together with `image`",
            "6:10 containers[1].name: `x` is the name of containers[0] already",
            "6:43 containers[1].resources.gpu: only one container of a pod may ask for GPUs, and containers[0] does",
            r#"7:3 containers[2].name: required, such as "main""#,
            r#"7:3 containers[2].image: required, such as "docker.io/library/python:3.12-slim""#,
        ],
    );
    check("name: a\ncontainers: []", &["2:13 containers: holds 0 entries, 1 to 16 are allowed"]);
}

#[test]
fn what_is_not_a_document() {
    check("", &[": the job file is empty"]);
    check("# nothing\n", &[": the job file is empty"]);
    check("[a]", &[": expected the fields of a job, such as `image: host`; found a list"]);
    check("hello", &[": expected the fields of a job, such as `image: host`; found the text `hello`"]);
    check(
        "name: a\nimage: host\n---\nname: b\n",
        &["3:1 : a second document begins here, and a file holds one job"],
    );
    check("name: a\nimage: host\nname: b\n", &["3:1 name: written twice; the first is in line 1"]);
    check(r#"{"name":"a","image":"host","name":"b"}"#, &["1:28 name: written twice; the first is in line 1"]);
    check("name: &x a\nimage: host\n", &["1:7 name: anchors are not allowed: write the value out"]);
    check(
        "name: &x a\nimage: *x\n",
        &[
            "1:7 name: anchors are not allowed: write the value out",
            "2:8 image: aliases are not allowed: write the value out",
        ],
    );
    check(
        "name: !!str a\nimage: host\n",
        &["1:7 name: tags such as `tag:yaml.org,2002:!str` are not allowed"],
    );
    check(
        "name: a\nimage: host\nenv:\n  <<: {A: b}\n",
        &["4:3 env.<<: merge keys are not allowed: write the fields out"],
    );
    check("name: a\nimage: host\n? [a]\n: b\n", &["3:3 : a key must be text"]);
    check(
        "name: a\nimage: host\nnamespace: \"\\x7f\"\n",
        &[
            "3:12 namespace: namespace `\u{fffd}` may hold only a-z, 0-9 and `-`, and must begin and end with a letter or a digit",
        ],
    );
    check("name: a\u{1}\n", &["1:1 : the control character U+0001 is not allowed"]);
    check(
        r#"{"name":"a","image":"host","env":{"A":"\ud800"}}"#,
        &["1:39 env.A: half a surrogate pair is no character"],
    );
    assert_eq!(parse(b"\xff", None).unwrap_err()[0].message, "the job file is not UTF-8 text");
    let long = vec![b' '; crate::limits::JOB_FILE_BYTES_MAX + 1];
    assert_eq!(
        parse(&long, None).unwrap_err()[0].message,
        "the job file is 32769 bytes long, at most 32768 are allowed"
    );
}

#[test]
fn depth_is_bounded() {
    let nested = |levels: usize| format!("{{\"x\":{}{}}}", "[".repeat(levels), "]".repeat(levels));
    let unknown = "unknown field; `berth schema` lists those known";
    assert!(errors(&nested(31)).iter().any(|e| e.message == unknown));
    assert_eq!(errors(&nested(32))[0].message, "nested deeper than 32 levels");
    assert_eq!(errors(&nested(200))[0].message, "nested deeper than 32 levels");
}

#[test]
fn errors_are_bounded() {
    let many: String = (0..1000).map(|n| format!("x{n}: 1\n")).collect();
    let told = errors(&many);
    assert_eq!(told.len(), crate::limits::JOB_FILE_ERRORS_MAX);
    assert!(told.iter().any(|e| e.message == "there are more errors than these 19"));
}

#[test]
fn the_same_file_is_the_same_however_it_is_spelled() {
    let json =
        r#"{"name":"a","image":"host","resources":{"cpu":0.5,"memory":1073741824},"tolerations":["b","a"]}"#;
    let yaml = "tolerations: [a, b]\nimage: 'host'\nresources:\n  memory: 1Gi\n  cpu: 500m\n";
    let topic = (Namespace::default_namespace(), JobName::parse("a").unwrap());
    let with_topic = parse(yaml.as_bytes(), Some((&topic.0, &topic.1))).unwrap();
    assert_eq!(written(json), with_topic.written);
    assert_eq!(spec(json), with_topic.spec);
    // Before defaults: saying a default is saying something.
    assert_ne!(written("{name: a, image: host}"), written("{name: a, image: host, priority: 0}"));
    assert_ne!(written("{name: a, image: host}"), written("{name: a, image: b}"));
    // The digest lasts: stored generations are compared with it.
    assert_eq!(
        written(CONTRACT).to_string(),
        "sha256:b3b2e81c68e6f5a9a82c9f920707843f993dcf22a0d962148fcab34100513fef"
    );
}

#[test]
fn json_reads_the_same_as_yaml_in_its_corners() {
    let key = "K".repeat(2000);
    for (json, name, value) in [
        (r#"{"name":"a","image":"host","env":{"A":"\ud83d\ude00\/"}}"#.to_owned(), "A", "😀/"),
        ("{\n\t\"name\":\"a\",\r\n\t\"image\"\t:\"host\"\n\t,\"env\":{\"A\":\"b\"}}".to_owned(), "A", "b"),
        (format!(r#"{{"name":"a","image":"host","env":{{"{key}":"b"}}}}"#), key.as_str(), "b"),
        (r#"{"name":"a","image":"host","env":{"A":"\u0085\u2028"}}"#.to_owned(), "A", "\u{85}\u{2028}"),
    ] {
        assert_eq!(spec(&json).pod.containers[0].env[name], value);
    }
}

#[test]
fn positions_are_the_same_in_json_and_yaml() {
    let text = "{\"name\": \"ä\", \"image\":\n \"host\", \"prority\": 1}";
    let expect = [
        "1:10 name: job `ä` may hold only a-z, 0-9 and `-`, and must begin and end with a letter or a digit",
        "2:10 prority: unknown field, did you mean `priority`?",
    ];
    check(text, &expect);
    check(&text.replace('"', "'"), &expect);
}

#[test]
fn a_terminal_sees_the_line_and_a_caret() {
    let text = "name: a\nimage: host\nresources:\n\tcpu: 1\n";
    let shown = show_errors("digits.yaml", text, &errors(text));
    assert!(shown.starts_with("digits.yaml:4:"), "{shown}");
    let text = "name: a\nimage: host\nresources:\n  cpus: 2\n";
    assert_eq!(
        show_errors("digits.yaml", text, &errors(text)),
        "digits.yaml:4:3: resources.cpus: unknown field, did you mean `cpu`?\n  4 |   cpus: 2\n    |   ^\n"
    );
    assert_eq!(show_errors("-", "", &errors("")), "-: the job file is empty\n");
    let far = format!("name: a\nimage: host\nenv: {{A: {}, 1: b}}\n", "é".repeat(200));
    let shown = show_errors("f", &far, &errors(&far));
    let rows: Vec<&str> = shown.lines().collect();
    let caret = rows[2].chars().position(|c| c == '^').unwrap();
    assert_eq!(rows[1].chars().nth(caret), Some('1'), "{shown}");
}

#[test]
fn hostile_error_places_do_not_panic() {
    let error = |line, column| FieldError { field: String::new(), line, column, message: "m".into() };
    let coloured = FieldError { message: "\u{1b}[31m".into(), ..error(None, None) };
    assert_eq!(show_errors("f", "", &[coloured]), "f: \u{fffd}[31m\n");
    for (line, column) in
        [(Some(0), Some(0)), (Some(u32::MAX), Some(1)), (Some(1), Some(u32::MAX)), (Some(1), None)]
    {
        assert!(show_errors("f", "abc", &[error(line, column)]).ends_with('\n'));
    }
}

/// Files of the greatest size that are worst for one part or another.
fn worst() -> Vec<String> {
    let max = crate::limits::JOB_FILE_BYTES_MAX;
    let fill = |head: &str, unit: &str| {
        let mut text = head.to_owned();
        while text.len() + unit.len() <= max {
            text.push_str(unit);
        }
        text
    };
    let numbered = |unit: &dyn Fn(usize) -> String| {
        let mut text = String::new();
        for unit in (0..).map(unit) {
            if text.len() + unit.len() > max {
                break;
            }
            text.push_str(&unit);
        }
        text
    };
    let laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n".to_owned()
        + &numbered(&|n| format!("b{n}: &b{n} [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"));
    let mut all: Vec<String> = [
        "[", "{", "{a: ", "[a: ", "- ", "? ", "- - ", "a: ", "\"", "'", "&a ", "!a ", "*a ", "x ", "\n",
        "\t", "#", "|\n ", "%a\n", ": ", "[]", ",", "\\", "---\n", "\u{fffd}",
    ]
    .iter()
    .flat_map(|unit| ["", "a: ", "[", "{", "\"", "env: {"].map(|head| fill(head, unit)))
    .collect();
    all.push(laughs.chars().take(max).collect());
    all.push(numbered(&|n| format!("x{n}: 1\n")));
    all.push(numbered(&|n| format!("{n:>width$}:\n", width = n % 40)));
    all.push(numbered(&|n| format!("{}- \n", " ".repeat(n))));
    all.push(fill("args: [", "a,") + "]");
    all.push(fill("{\"args\":[", "{},"));
    all.push(fill("env: {", "A: 1,"));
    all.push(format!("{{\"args\":[{}1]}}", "1,".repeat(max / 2 - 8)));
    all
}

#[test]
fn the_worst_files_take_bounded_work() {
    // Far above what they take in a debug build on a busy machine, far below what a bomb takes.
    const SECONDS_MAX: u64 = 10;
    for text in worst() {
        let before = std::time::Instant::now();
        let told = errors(&text).len();
        let head: String = text.chars().take(30).collect();
        assert!(told <= crate::limits::JOB_FILE_ERRORS_MAX, "{head:?}");
        let took = before.elapsed();
        assert!(took.as_secs() < SECONDS_MAX, "{head:?} took {took:?}");
    }
}

#[test]
fn a_spec_too_long_for_the_wire_is_refused() {
    let text = format!("name: a\nimage: host\nargs: [\"{}\"]\n", "\\x01".repeat(6000));
    let told = errors(&text);
    assert!(told[0].message.starts_with("what nodes are sent of this job is 36"), "{told:?}");
}

/// Every example of the table parses as the field that it is the example of.
#[test]
fn examples_are_right() {
    fn walk(shape: schema::Shape, path: &str) {
        for field in shape.fields() {
            let path = format!("{path}.{}", field.name);
            let mut report = report::Report::default();
            let node = document::read(field.example.as_bytes(), &mut report).unwrap();
            let read = read::value(&node, &field.kind, "", &path, &mut report);
            assert!(read.is_some() && report.is_empty(), "{path}: {:?}", report.into_errors());
            assert!(!field.doc.is_empty() && field.doc.ends_with('.'), "{path}");
            match &field.kind {
                schema::Kind::Object(inner) => walk(*inner, &path),
                schema::Kind::List { of: schema::Kind::Object(inner), .. } => walk(*inner, &path),
                _ => {}
            }
        }
    }
    walk(schema::JOB, "");
}

/// Why `file` does not fit the JSON Schema.
fn schema_errors(file: &serde_json::Value) -> Vec<String> {
    static VALIDATOR: LazyLock<jsonschema::Validator> =
        LazyLock::new(|| jsonschema::draft202012::new(&json_schema()).unwrap());
    VALIDATOR.iter_errors(file).map(|e| format!("{}: {e}", e.instance_path())).collect()
}

#[test]
fn the_json_schema_is_one_and_tells_good_files_from_bad() {
    assert!(jsonschema::draft202012::meta::is_valid(&json_schema()));
    let sample = render(&spec(CONTRACT));
    assert_eq!(schema_errors(&sample), [""; 0]);
    for (field, value) in [
        ("cpus", serde_json::json!(2)),
        ("containers", serde_json::json!([{ "name": "a", "image": "host" }])),
        ("parallelism", serde_json::json!(0)),
        ("name", serde_json::json!("Digits")),
        ("resources", serde_json::json!({ "memory": "4gi" })),
        ("env", serde_json::json!({ "1A": "x" })),
        ("network", serde_json::json!("vlan")),
    ] {
        let mut file = sample.clone();
        file[field] = value;
        assert!(!schema_errors(&file).is_empty(), "{field}");
    }
}
