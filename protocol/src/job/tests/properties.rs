//! What holds of any job and of any text.

use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::ids::SecretName;
use crate::resources::GpuRequest;

const NAME: &str = "[a-z0-9]([-a-z0-9]{0,6}[a-z0-9])?";

fn name<T: std::fmt::Debug + std::str::FromStr>(pattern: &'static str) -> impl Strategy<Value = T>
where
    T::Err: std::fmt::Debug,
{
    pattern.prop_map(|text| text.parse().unwrap())
}

fn text() -> impl Strategy<Value = String> {
    "[^\0]{0,12}|true|12|0x1|~||<<|- a|a: b|\\PC{0,20}"
}

fn path() -> impl Strategy<Value = String> {
    "/[a-zé ]{1,5}(/[a-z]{1,3}){0,2}"
}

fn seconds(min: u64) -> impl Strategy<Value = Millis> {
    (min..100_000u64).prop_map(Millis::from_secs)
}

fn gpu() -> impl Strategy<Value = GpuRequest> {
    let count = prop_oneof![(1..=64u32, Just(1000u32)), (Just(1u32), 1..=1000u32)];
    (count, option::of(memory()), btree_set("[A-Z][A-Z0-9 ]{1,6}", 0..3))
        .prop_map(|((count, milli), memory, model)| GpuRequest { count, milli, memory, model })
}

fn cpu() -> impl Strategy<Value = MilliCpu> {
    (1..1_000_000u64).prop_map(MilliCpu)
}

fn memory() -> impl Strategy<Value = Bytes> {
    prop_oneof![(4..4096u64).prop_map(|mib| Bytes(mib << 20)), (4u64 << 20..1 << 40).prop_map(Bytes)]
}

prop_compose! {
    fn resources()(a in cpu(), b in cpu(), c in memory(), d in memory(), gpu in option::of(gpu()))
        -> (Resources, Limits)
    {
        (Resources { cpu: a.min(b), memory: c.min(d), disk: Bytes::ZERO, gpu }, Limits { cpu: a.max(b), memory: c.max(d) })
    }
}

prop_compose! {
    fn container(secret_root: &'static str)(
        name in name::<ContainerName>(NAME),
        image in prop_oneof![Just("host".to_owned()), "[a-z]{1,9}(:[A-Za-z0-9]{1,4})?", "oci:/[a-z]{1,9}"],
        command in vec(text(), 0..3).prop_filter("a command", |c| c.first().is_none_or(|c| !c.is_empty())),
        args in vec(text(), 0..3),
        env in btree_map("[A-Z_][A-Z0-9_]{0,8}", text(), 0..4),
        (working_dir, user) in (option::of(path()), option::of("[a-z]{1,5}|[0-9]{1,5}(:[0-9]{1,5})?")),
        (resources, limits) in resources(),
        read_only_root: bool,
        capabilities in btree_set(proptest::sample::select(&form::CAPABILITIES[..]).prop_map(String::from), 0..3),
        secrets in btree_map(0..9u8, name::<SecretName>(NAME), 0..3),
    ) -> ContainerSpec {
        let secret = |(n, name)| SecretMount { name, mount: format!("{secret_root}/{n}") };
        let secrets = secrets.into_iter().map(secret).collect();
        ContainerSpec {
            name, image, command, args, env, working_dir, user, resources, limits, read_only_root, capabilities,
            secrets,
        }
    }
}

fn containers() -> impl Strategy<Value = Vec<ContainerSpec>> {
    let single = container("/secrets").prop_map(|mut one| {
        one.name = ContainerName::parse("main").unwrap();
        vec![one]
    });
    let several = vec(container("/secrets"), 1..4).prop_map(|mut several| {
        for (index, container) in several.iter_mut().enumerate() {
            container.name = ContainerName::parse(&format!("c{index}")).unwrap();
            if index > 0 {
                container.resources.gpu = None;
            }
        }
        several
    });
    prop_oneof![single, several]
}

fn volumes() -> impl Strategy<Value = Vec<Volume>> {
    let source = prop_oneof![
        path().prop_map(VolumeSource::Host),
        (1..1u64 << 40).prop_map(|size| VolumeSource::Scratch(Bytes(size))),
        name::<VolumeName>(NAME).prop_map(VolumeSource::Named),
    ];
    btree_map(0..9u8, (source, any::<bool>(), any::<bool>()), 0..3).prop_map(|volumes| {
        let volume = |(n, (source, read_only, save))| {
            let save = save && matches!(source, VolumeSource::Named(_));
            Volume { mount: format!("/volumes/{n}"), source, read_only, save }
        };
        volumes.into_iter().map(volume).collect()
    })
}

fn restart() -> impl Strategy<Value = Restart> {
    use RestartPolicy::{Always, Never, OnFailure};
    let policy = proptest::sample::select(vec![Never, OnFailure, Always]);
    (policy, 0..=10_000u32, 0..100_000u64, 0..100_000u64).prop_map(|(policy, backoff_limit, a, b)| Restart {
        policy,
        backoff_limit,
        retry_min: Millis(a.min(b)),
        retry_max: Millis(a.max(b)),
    })
}

fn on_disconnect() -> impl Strategy<Value = OnDisconnect> {
    use DisconnectAction::{Continue, Pause, Stop};
    let action = proptest::sample::select(vec![Pause, Continue, Stop]);
    (action, 20_000..200_000u64, 20_000..200_000u64).prop_map(|(action, a, b)| OnDisconnect {
        after: Millis(a.min(b)),
        action,
        lost_after: Millis(a.max(b)),
    })
}

prop_compose! {
    fn checkpoint()(
        mode in proptest::sample::select(vec![
            CheckpointMode::Auto, CheckpointMode::Criu, CheckpointMode::Cooperative, CheckpointMode::None,
        ]),
        interval in option::of(seconds(1)),
        signal in option::of(proptest::sample::select(&form::SIGNALS[..]).prop_map(String::from)),
        grace in seconds(0),
        ready in option::of(path()),
        quiesce in vec(text(), 0..3),
        resume in vec(text(), 0..3),
        keep_tcp: bool,
        keep in 1..=100u32,
    ) -> Checkpoint {
        let tcp = if keep_tcp { TcpPolicy::Keep } else { TcpPolicy::Close };
        let mode = match mode {
            CheckpointMode::Cooperative if signal.is_none() && ready.is_none() => CheckpointMode::Auto,
            mode => mode,
        };
        Checkpoint { mode, interval, signal, grace, ready, quiesce, resume, tcp, keep }
    }
}

prop_compose! {
    fn placement()(
        affinity in option::of("[a-z' =]{0,20}x"),
        prefer in vec(("[a-z' =]{0,20}x", 1..=100).prop_map(|(when, weight)| Preference { when, weight }), 0..3),
        spread in option::of("node\\.labels\\.[a-z./-]{1,9}"),
        tolerations in btree_set("[a-z=]{1,8}", 0..3),
        anti_affinity in option::of("job|node\\.labels\\.[a-z]{1,9}"),
    ) -> Placement {
        Placement { affinity, prefer, spread, tolerations, anti_affinity }
    }
}

prop_compose! {
    fn template()(
        containers in containers(),
        volumes in volumes(),
        network in proptest::sample::select(vec![Network::Bridge, Network::Host, Network::None]),
        restart in restart(),
        grace in (0..=86_400u64).prop_map(Millis::from_secs),
        on_disconnect in on_disconnect(),
        checkpoint in checkpoint(),
        outputs in vec(path(), 0..3),
        workspace in option::of((any::<u64>(), 1..1u64 << 40)),
    ) -> PodTemplate {
        let workspace = workspace.map(|(content, bytes)| Workspace {
            digest: Digest::of(&content.to_le_bytes()),
            bytes: Bytes(bytes),
            path: "/workspace".into(),
        });
        PodTemplate {
            namespace: Namespace::default_namespace(),
            job: JobName::parse("x").unwrap(),
            containers, volumes, network, restart, grace, on_disconnect, checkpoint, outputs, workspace,
        }
    }
}

prop_compose! {
    fn job()(
        namespace in name::<Namespace>(NAME),
        name in name::<JobName>(NAME),
        mut pod in template(),
        placement in placement(),
        (a, b, gang) in (1..=10_000u32, 1..=10_000u32, any::<bool>()),
        suspend: bool,
        active_deadline in option::of(seconds(1)),
        ttl in seconds(0),
        priority in -1000..=1000,
        preemptible: bool,
    ) -> JobSpec {
        (pod.namespace, pod.job) = (namespace.clone(), name.clone());
        let (completions, parallelism) = if gang { (a, a) } else { (a.max(b), a.min(b)) };
        for volume in &mut pod.volumes {
            volume.save = volume.save && parallelism == 1;
        }
        JobSpec {
            namespace, name, pod, placement, parallelism, completions, gang, suspend, active_deadline, ttl,
            priority, preemptible,
        }
    }
}

/// Any JSON, as deep and as odd as a job file may be.
fn json() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::Value;
    let number = prop_oneof![any::<i64>().prop_map(Value::from), any::<f64>().prop_map(Value::from)];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        number,
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 5, |inner| {
        let fields = btree_map(text(), inner.clone(), 0..5);
        prop_oneof![
            vec(inner, 0..5).prop_map(Value::from),
            fields.prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// The same document, out of reach of the JSON reader.
fn as_yaml(json: &str) -> String {
    format!("{json}\n# not JSON")
}

proptest! {
    #[test]
    fn a_job_goes_to_a_file_and_back(job in job()) {
        let file = serde_json::to_string_pretty(&render(&job)).unwrap();
        prop_assert_eq!(schema_errors(&render(&job)), [""; 0]);
        let parsed = parse(file.as_bytes(), None);
        let parsed = parsed.map_err(|e| TestCaseError::fail(show_errors("job", &file, &e)))?;
        prop_assert_eq!(&parsed.spec, &job);
        let yaml = parse(as_yaml(&file).as_bytes(), Some((&job.namespace, &job.name)));
        prop_assert_eq!(yaml, Ok(parsed));
    }

    #[test]
    fn json_and_yaml_are_one_tree(json in json(), pretty: bool) {
        let text = if pretty { serde_json::to_string_pretty(&json) } else { serde_json::to_string(&json) }.unwrap();
        let read = |text: &str| {
            let mut report = report::Report::default();
            let tree = document::read(text.as_bytes(), &mut report);
            (tree, report.into_errors())
        };
        prop_assert!(json::is_json(&text) && !json::is_json(&as_yaml(&text)));
        prop_assert_eq!(read(&text), read(&as_yaml(&text)));
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,60}|([\\[\\]{}:,&*!|>'\"%@`#?~ \n\t-]|[a-c]|0|<<|image: host\n){0,40}") {
        if let Err(errors) = parse(text.as_bytes(), None) {
            prop_assert!(!errors.is_empty());
            prop_assert!(!show_errors("f", &text, &errors).is_empty());
        }
    }
}
