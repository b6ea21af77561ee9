use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::*;
use crate::job::parse;

fn template(text: &str) -> PodTemplate {
    parse(format!("name: a\n{text}").as_bytes(), None).unwrap_or_else(|errors| panic!("{errors:?}")).spec.pod
}

fn patterns(texts: &[&str]) -> Vec<ImagePattern> {
    texts.iter().map(|text| ImagePattern::parse(text).unwrap()).collect()
}

fn at(path: &str, read_only: bool) -> HostPath {
    HostPath { path: path.into(), read_only }
}

#[test]
fn patterns_are_four_forms_and_nothing_else() {
    for text in
        ["*", "docker.io", "registry.lab:5000", "registry.lab:5000/team/*", "localhost/a/b", "[::1]:5000/x"]
    {
        assert_eq!(ImagePattern::parse(text).unwrap().to_string(), text);
    }
    assert_eq!(ImagePattern::parse("index.docker.io/*").unwrap().to_string(), "docker.io");
    for text in [
        "",
        "team/*",
        "python",
        "docker.io/*/x",
        "docker.io/te*",
        "docker.io/x:1",
        "docker.io/X",
        "a.b/",
        "a.b//*",
        "*.b",
    ] {
        assert!(ImagePattern::parse(text).is_err(), "{text}");
    }
}

#[test]
fn patterns_match_whole_parts_of_names_however_they_are_spelled() {
    for (pattern, image, matches) in [
        ("docker.io", "python:3", true),
        ("docker.io", "index.docker.io/library/python", true),
        (
            "docker.io/library/python",
            "python@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            true,
        ),
        ("docker.io/library/python", "python2", false),
        ("registry.lab:5000", "REGISTRY.Lab:5000/team/app", true),
        ("registry.lab:5000", "registry.lab/team/app", false),
        ("registry.lab", "registry.lab.evil.example/app", false),
        ("registry.lab/team/*", "registry.lab/team/app/x:1", true),
        ("registry.lab/team/*", "registry.lab/team", false),
        ("registry.lab/team/*", "registry.lab/teams/app", false),
        ("*", "oci:/srv/x", true),
        ("docker.io", "docker-archive:/srv/x.tar", false),
    ] {
        let image = ImageRef::parse(image).unwrap();
        assert_eq!(ImagePattern::parse(pattern).unwrap().matches(&image), matches, "{pattern} {image}");
    }
}

#[test]
fn each_rule_refuses_by_its_name() {
    let policy = Policy {
        registries: Some(patterns(&["docker.io", "registry.lab/team/*"])),
        host_paths: vec![at("/srv", true), at("/srv/scratch", false)],
        image_paths: Some(vec!["/srv/images".into()]),
        networks: [Network::Bridge].into(),
        capabilities: ["NET_ADMIN".to_owned()].into(),
        gpus: Gpus::None,
        largest: Largest { cpu: Some(MilliCpu(2000)), memory: Some(Bytes(1 << 30)), gpus: None },
        signed: patterns(&["*"]),
        ..Policy::default()
    };
    for (text, refused) in [
        ("image: python:3", None),
        ("image: registry.lab/team/app", None),
        ("image: ghcr.io/x", Some("no image of ghcr.io/x (`registries`)")),
        ("image: host", Some("no `image: host` (`host-image`)")),
        ("image: oci:/srv/other", Some("no image from /srv/other (`image-paths`)")),
        ("image: oci:/srv/images/x", Some("no unsigned image oci:/srv/images/x (`signers`)")),
        ("image: x\nvolumes: [{mount: /d, host: /etc}]", Some("no host path /etc (`host-paths`)")),
        ("image: x\nvolumes: [{mount: /d, host: /srv2}]", Some("no host path /srv2 (`host-paths`)")),
        ("image: x\nvolumes: [{mount: /d, host: /srv/a, readOnly: true}]", None),
        (
            "image: x\nvolumes: [{mount: /d, host: /srv/a}]",
            Some("no host path /srv/a unless it is `readOnly` (`host-paths`)"),
        ),
        ("image: x\nvolumes: [{mount: /d, host: /srv/scratch/a}]", None),
        ("image: x\nnetwork: host", Some("no `network: host` (`networks`)")),
        ("image: x\ncapabilities: [NET_ADMIN]", None),
        ("image: x\ncapabilities: [SYS_ADMIN]", Some("no capability SYS_ADMIN (`capabilities`)")),
        ("image: x\nresources: {gpu: {count: 1}}", Some("no GPUs (`gpus`)")),
        ("image: x\nresources: {cpu: 2, memory: 1Gi}", None),
        ("image: x\nresources: {cpu: 2001m}", Some("no pods with more cores than 2 (`largest`)")),
        ("image: x\nlimits: {memory: 2Gi}", Some("no pods with more memory than 1Gi (`largest`)")),
    ] {
        let said = policy.refuses(&template(text)).map(|refusal| refusal.to_string());
        assert_eq!(said.as_deref(), refused, "{text}");
    }
    // What no parser lets through, and somebody with the controller's key may send all the same.
    let mut forged = template("image: x");
    forged.containers[0].image = "oci:/srv/images/../x".into();
    assert_eq!(policy.refuses(&forged).map(|refusal| refusal.rule), Some(Rule::ImagePaths));
    let mut forged = template("image: x");
    forged.containers[0].capabilities = ["CAP_SYS_ADMIN".to_owned()].into();
    assert_eq!(policy.refuses(&forged).map(|refusal| refusal.rule), Some(Rule::Capabilities));
    let mut forged = template("image: x");
    forged.containers[0].limits.memory = Bytes::ZERO;
    assert_eq!(policy.refuses(&forged).map(|refusal| refusal.rule), Some(Rule::Largest));
    let mut forged = template("image: x");
    forged.containers[0].capabilities = [format!("A\n{}", "B".repeat(30_000))].into();
    let said = policy.refuses(&forged).unwrap().to_string();
    assert!(said.len() < 300 && said.starts_with("no capability A BB"), "{said}");
    let devices = [GpuShare { uuid: "GPU-1".into(), milli: 1000 }];
    let unasked = policy.refusals(&Wants::of(&template("image: x")).with(&devices));
    assert_eq!(unasked.first().map(|refusal| refusal.rule), Some(Rule::Gpus));
    let these = Policy { gpus: Gpus::These(["GPU-2".to_owned()].into()), ..Policy::default() };
    let other =
        these.refusals(&Wants::of(&template("image: x\nresources: {gpu: {count: 1}}")).with(&devices));
    assert_eq!(other[0].to_string(), "no GPU GPU-1 (`gpus`)");
    let line = "registries docker.io, registry.lab/team/*; signed *; images from /srv/images; host paths /srv (read-only), \
                /srv/scratch; networks bridge; capabilities NET_ADMIN; no GPUs; largest cpu 2, memory 1Gi";
    assert_eq!(policy.to_string(), line);
}

const IMAGES: [&str; 6] = [
    "docker.io/library/python",
    "registry.lab/team/app",
    "registry.lab/x",
    "oci:/srv/a/x",
    "docker-archive:/srv/b.tar",
    "ghcr.io/o/r",
];
const PATTERNS: [&str; 6] =
    ["*", "docker.io", "registry.lab", "registry.lab/team/*", "registry.lab/x", "ghcr.io/o/*"];
const PATHS: [&str; 6] = ["/", "/srv", "/srv/a", "/srv/a/b", "/srv/ab", "/etc"];

fn some(of: &'static [&'static str]) -> impl Strategy<Value = BTreeSet<String>> {
    subsequence(of, 0..=of.len()).prop_map(|some| some.into_iter().map(str::to_owned).collect())
}

fn some_patterns() -> impl Strategy<Value = Vec<ImagePattern>> {
    subsequence(&PATTERNS[..], 0..=PATTERNS.len()).prop_map(|some| patterns(&some))
}

fn host_paths() -> impl Strategy<Value = BTreeSet<HostPath>> {
    prop::collection::btree_set((select(&PATHS[..]), any::<bool>()).prop_map(|(path, ro)| at(path, ro)), 0..4)
}

fn network() -> impl Strategy<Value = Network> {
    select(vec![Network::Bridge, Network::Host, Network::None])
}

prop_compose! {
    fn wants()(
        host_image: bool, images in subsequence(&IMAGES[..], 0..3), host_paths in host_paths(), network in network(),
        capabilities in some(&["NET_ADMIN", "SYS_ADMIN"]), cpu in 0u64..4, memory in 0u64..4, gpus in 0u32..3,
        devices in some(&["G1", "G2"])
    ) -> Wants {
        let images = images.into_iter().map(|text| repository(text).unwrap()).collect();
        Wants { host_image, images, host_paths, network, capabilities, cpu: MilliCpu(cpu), memory: Bytes(memory), gpus, devices }
    }
}

prop_compose! {
    fn policy()(
        registries in prop::option::of(some_patterns()), host_image: bool, host_paths in host_paths(),
        image_paths in prop::option::of(some(&PATHS)), networks in prop::collection::btree_set(network(), 0..3),
        capabilities in some(&["NET_ADMIN", "SYS_ADMIN"]),
        gpus in prop_oneof![Just(Gpus::All), Just(Gpus::None), some(&["G1", "G2"]).prop_map(Gpus::These)],
        cpu in prop::option::of(0u64..4), memory in prop::option::of(0u64..4), most in prop::option::of(0u32..3),
        signed in some_patterns()
    ) -> Policy {
        Policy {
            registries, host_image, host_paths: host_paths.into_iter().collect(),
            image_paths: image_paths.map(|paths| paths.into_iter().collect()), networks, capabilities, gpus,
            largest: Largest { cpu: cpu.map(MilliCpu), memory: memory.map(Bytes), gpus: most }, signed,
        }
    }
}

proptest! {
    /// To want less, in whatever way, is refused by no rule that did not refuse more.
    #[test]
    fn less_is_allowed_where_more_is(policy in policy(), wants in wants()) {
        let by = |wants: &Wants| -> BTreeSet<Rule> { policy.refusals(wants).iter().map(|refusal| refusal.rule).collect() };
        let before = by(&wants);
        let mut less = vec![Wants { host_image: false, ..wants.clone() }, wants.clone().coarse()];
        less.extend(wants.images.iter().map(|image| Wants { images: [image.clone()].into(), ..wants.clone() }));
        less.extend(wants.host_paths.iter().map(|path| Wants { host_paths: [path.clone()].into(), ..wants.clone() }));
        less.push(Wants {
            host_paths: wants.host_paths.iter().map(|found| at(&found.path, true)).collect(), ..wants.clone()
        });
        less.push(Wants { capabilities: BTreeSet::new(), devices: BTreeSet::new(), gpus: 0, ..wants.clone() });
        less.push(Wants { cpu: MilliCpu(wants.cpu.0 / 2), memory: Bytes(wants.memory.0 / 2), ..wants });
        for less in less {
            prop_assert!(by(&less).is_subset(&before), "{less:?}");
        }
    }

    /// What is allowed is so by every rule by itself, and what is refused by the rule that is named: without it, it is not.
    #[test]
    fn a_refusal_names_the_rule_that_would_have_to_change(policy in policy(), wants in wants()) {
        for refusal in policy.refusals(&wants) {
            let mut wider = policy.clone();
            match refusal.rule {
                Rule::Registries => wider.registries = None,
                Rule::HostImage => wider.host_image = true,
                Rule::HostPaths => wider.host_paths = wants.host_paths.iter().map(|found| at(&found.path, false)).collect(),
                Rule::ImagePaths => wider.image_paths = None,
                Rule::Networks => drop(wider.networks.insert(wants.network)),
                Rule::Capabilities => wider.capabilities = wants.capabilities.clone(),
                Rule::Gpus => wider.gpus = Gpus::All,
                Rule::Largest => wider.largest = Largest::default(),
                Rule::Signers => wider.signed.clear(),
            }
            prop_assert!(!wider.refusals(&wants).iter().any(|left| left.rule == refusal.rule), "{refusal}");
        }
    }

    /// Whatever stands in a path, only what really lies below what is granted passes.
    #[test]
    fn no_path_leads_out(dir in "/[a-c]{1,2}(/[a-c])?", parts in prop::collection::vec("\\.\\.|\\.|[a-c]|[a-c]{2}| ", 0..6)) {
        let policy = Policy { host_paths: vec![at(&dir, false)], ..Policy::default() };
        let path = format!("/{}", parts.join("/"));
        let mut leads_to: Vec<&str> = Vec::new();
        for part in parts.iter().filter(|part| *part != ".") {
            if part == ".." { leads_to.pop(); } else { leads_to.push(part); }
        }
        let inside = Path::new(&format!("/{}", leads_to.join("/"))).starts_with(&dir);
        prop_assert!(inside || policy.host_path(Path::new(&path)).is_none(), "{path} of {dir}");
    }

    #[test]
    fn patterns_of_any_text(text in "[*a-zA-Z.:/@\\[\\]0-9-]{0,24}|\\PC{0,12}") {
        if let Ok(pattern) = ImagePattern::parse(&text) {
            prop_assert_eq!(ImagePattern::parse(&pattern.to_string()).unwrap(), pattern);
        }
    }

    #[test]
    fn a_policy_travels(policy in policy()) {
        let json = serde_json::to_string(&policy).unwrap();
        prop_assert_eq!(serde_json::from_str::<Policy>(&json).unwrap(), policy);
    }
}
