//! What is in a package is what its programs say is in them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

fn ran(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Whether packages can be made and read here; says so where `make test` counts.
fn possible() -> bool {
    let found = |tool: &str| {
        std::env::var("PATH").unwrap_or_default().split(':').any(|dir| Path::new(dir).join(tool).exists())
    };
    let missing = ["python3", "dpkg-deb", "objcopy"].into_iter().find(|tool| !found(tool));
    let Some(missing) = missing else { return true };
    let line = format!("SKIPPED: what is in packages: {missing} is missing; make setup installs it\n");
    eprint!("{line}");
    let counted = std::fs::File::options().create(true).append(true).open(checkout().join("target/skipped"));
    let _ = counted.and_then(|mut file| std::io::Write::write_all(&mut file, line.as_bytes()));
    false
}

/// A package with one program that names `crates` as cargo auditable has it, or nothing.
fn package(dir: &Path, crates: Option<Value>) -> PathBuf {
    let tree = dir.join("tree");
    std::fs::create_dir_all(tree.join("DEBIAN")).expect("a directory");
    std::fs::create_dir_all(tree.join("usr/bin")).expect("a directory");
    let control =
        "Package: tool\nVersion: 1.2-3\nArchitecture: amd64\nMaintainer: none\nDescription: a tool\n";
    std::fs::write(tree.join("DEBIAN/control"), control).expect("a file");
    let program = tree.join("usr/bin/tool");
    std::fs::copy("/bin/true", &program).expect("a program");
    if let Some(crates) = crates {
        let packed = dir.join("packed");
        let pack = "import sys, zlib; open(sys.argv[1], 'wb').write(zlib.compress(sys.argv[2].encode()))";
        ran(Command::new("python3").args(["-c", pack]).arg(&packed).arg(crates.to_string()));
        let section = format!(".dep-v0={}", packed.display());
        ran(Command::new("objcopy").arg("--add-section").arg(section).arg(&program));
    }
    let made = dir.join("tool.deb");
    ran(Command::new("dpkg-deb").args(["--root-owner-group", "--build"]).arg(&tree).arg(&made));
    made
}

fn bill(package: &Path) -> Command {
    let mut command = Command::new(checkout().join("systemd/sbom"));
    command.arg(package).arg("libseccomp-dev=2.5.4-1+deb12u1").env("SOURCE_DATE_EPOCH", "86400");
    command
}

/// The version and the digest that Cargo.lock has of a crate.
fn locked(name: &str) -> (String, String) {
    let lock = std::fs::read_to_string(checkout().join("Cargo.lock")).expect("Cargo.lock");
    let entry = lock.split("[[package]]").find(|entry| entry.contains(&format!("name = \"{name}\"\n")));
    let entry = entry.unwrap_or_else(|| panic!("{name} is in Cargo.lock"));
    let field = |name: &str| {
        let line = entry.lines().find_map(|line| line.strip_prefix(&format!("{name} = ")));
        line.expect(name).trim_matches('"').to_owned()
    };
    (field("version"), field("checksum"))
}

#[test]
fn a_bill_has_what_the_programs_name() {
    if !possible() {
        return;
    }
    let (clap, digest) = locked("clap");
    let (pkg_config, _) = locked("pkg-config");
    let crates = json!({"packages": [
        {"name": "berth-agent", "version": "0.1.0", "source": "local", "root": true, "dependencies": [1, 2, 3]},
        {"name": "berth-protocol", "version": "0.1.0", "source": "local"},
        {"name": "clap", "version": clap, "source": "crates.io"},
        {"name": "pkg-config", "version": pkg_config, "source": "crates.io", "kind": "build"},
    ]});
    let dir = tempfile::tempdir().expect("a directory");
    let package = package(dir.path(), Some(crates));
    let output = ran(&mut bill(&package)).stdout;
    assert_eq!(output, ran(&mut bill(&package)).stdout, "the same package, the same bill");

    let bill: Value = serde_json::from_slice(&output).expect("JSON");
    assert_eq!(bill["bomFormat"], "CycloneDX");
    assert_eq!(bill["metadata"]["timestamp"], "1970-01-02T00:00:00Z");
    let whole = &bill["metadata"]["component"];
    assert_eq!((&whole["name"], &whole["version"]), (&json!("tool"), &json!("1.2-3")));
    let sum = ran(Command::new("sha256sum").arg(&package)).stdout;
    let sum = String::from_utf8_lossy(&sum);
    assert_eq!(whole["hashes"][0]["content"].as_str(), sum.split(' ').next());
    assert_eq!(whole["components"][0]["name"], "/usr/bin/tool");

    let component = |name: &str| {
        let all = bill["components"].as_array().expect("components");
        all.iter().find(|one| one["name"] == name).unwrap_or_else(|| panic!("{name} is in {all:#?}"))
    };
    assert_eq!(component("clap")["purl"], format!("pkg:cargo/clap@{clap}"));
    assert_eq!(component("clap")["hashes"][0]["content"], digest);
    assert_eq!(component("clap")["licenses"][0]["expression"], "MIT OR Apache-2.0");
    // Nobody is to look for it where somebody else may have put one of that name.
    assert_eq!(component("berth-protocol")["purl"], Value::Null);
    assert_eq!(component("pkg-config")["scope"], "excluded");
    let debian = "pkg:deb/debian/libseccomp-dev@2.5.4-1%2Bdeb12u1?arch=amd64";
    assert_eq!(component("libseccomp-dev")["purl"], debian);
    component("rust-std");
    let needs = bill["dependencies"].as_array().expect("dependencies");
    let needs = needs.iter().find(|one| one["ref"] == "tool").expect("what the tool needs");
    let on = needs["dependsOn"].as_array().expect("a list");
    assert!(on.contains(&json!(format!("clap@{clap}"))), "{needs}");
}

#[test]
fn no_bill_of_a_program_that_names_nothing() {
    if !possible() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let output = bill(&package(dir.path(), None)).output().expect("systemd/sbom starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.stdout.is_empty(), "{said}");
    assert!(said.contains("/usr/bin/tool does not name its dependencies"), "{said}");
}
