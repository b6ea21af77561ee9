//! Rules that a program can check: layering, bounds on files, what stands at the top.

use std::path::{Path, PathBuf};
use std::process::Command;

const LINES_MAX: usize = 500;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

fn git_files() -> Vec<String> {
    let output = Command::new("git").args(["ls-files"]).current_dir(root()).output().expect("git runs");
    assert!(output.status.success(), "git ls-files");
    let files = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect::<Vec<_>>();
    files.into_iter().filter(|file| root().join(file).exists()).collect()
}

/// A source file up to its tests.
fn production(file: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    let code = text.lines().take_while(|line| !line.trim_start().starts_with("#[cfg(test)]"));
    code.map(str::to_owned).collect()
}

fn sources() -> Vec<String> {
    let is_test =
        |file: &String| file.contains("/tests/") || file.contains("/fuzz/") || file.ends_with("tests.rs");
    git_files().into_iter().filter(|file| file.ends_with(".rs") && !is_test(file)).collect()
}

/// Every line of `files` that names one of `words`, but in comments.
fn naming(files: impl Iterator<Item = String>, words: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files {
        for (number, line) in production(&file).iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if let Some(word) = words.iter().find(|word| code.contains(**word)) {
                found.push(format!("{file}:{}: names {word}", number + 1));
            }
        }
    }
    found
}

#[test]
fn cores_touch_no_world() {
    let cores = sources().into_iter().filter(|file| file.contains("/core/"));
    let banned = [
        "tokio",
        "rumqttc",
        "rmqtt",
        "rusqlite",
        "std::fs",
        "std::net",
        "std::process",
        "std::thread",
        "async fn",
        "Instant::now",
        "SystemTime",
        "rand::",
        "HashMap",
        "HashSet",
        "crate::io",
    ];
    // The crate cel takes a map's entries as a HashMap, which nothing iterates over.
    let cel = |line: &String| {
        line.starts_with("controller/src/core/schedule/rulebook.rs") && line.ends_with("HashMap")
    };
    let found: Vec<String> = naming(cores, &banned).into_iter().filter(|line| !cel(line)).collect();
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn only_the_shim_knows_libcontainer() {
    let others = sources().into_iter().filter(|file| !file.starts_with("agent/src/shim/"));
    let found = naming(others, &["libcontainer::", "libcgroups::"]);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn only_a_process_of_its_own_loads_libcuda() {
    let others = sources().into_iter().filter(|file| file != "agent/src/cuda/library.rs");
    let found = naming(others, &["libloading"]);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn agent_and_controller_do_not_know_each_other_and_protocol_has_no_runtime() {
    let tree = |package: &str, absent: &str| {
        let output = Command::new(env!("CARGO"))
            .args(["tree", "--offline", "-p", package, "-e", "normal", "--prefix", "none"])
            .current_dir(root())
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let tree = String::from_utf8_lossy(&output.stdout).into_owned();
        let found = tree.lines().any(|line| line.split(' ').next() == Some(absent));
        assert!(!found, "{package} depends on {absent}");
    };
    tree("berth-agent", "berth-controller");
    tree("berth-controller", "berth-agent");
    for absent in ["tokio", "rumqttc", "nix"] {
        tree("berth-protocol", absent);
    }
}

/// By them rumqttc reads PEM, with a crate that nobody maintains any more: what deny.toml lets pass rests on this.
#[test]
fn rumqttc_is_given_tls_ready_made() {
    let unused = ["TlsConfiguration::Simple", "Transport::tls(", "tls_with_default_config", "Transport::wss"];
    let found = naming(sources().into_iter(), &unused);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn files_stay_readable() {
    let long: Vec<String> = sources()
        .iter()
        .map(|file| (file, production(file).len()))
        .filter(|(_, lines)| *lines > LINES_MAX)
        .map(|(file, lines)| format!("{file}: {lines} lines, at most {LINES_MAX}"))
        .collect();
    assert!(long.is_empty(), "{long:#?}");
}

#[test]
fn nothing_is_unfinished_or_silenced() {
    // Spelled apart, so that this file does not name them.
    let words = ["TO DO", "FIX ME", "XX X", "todo !", "unimplemented !", "#[ignore", "dbg !"]
        .map(|w| w.replace(' ', ""));
    let words: Vec<&str> = words.iter().map(String::as_str).filter(|word| *word != "XXX").collect();
    let mut found = Vec::new();
    for file in git_files().iter().filter(|file| file.ends_with(".rs") && !file.ends_with("tidy.rs")) {
        let text = std::fs::read_to_string(root().join(file)).expect("a source file is text");
        for (number, line) in text.lines().enumerate() {
            if words.iter().any(|word| line.contains(word)) {
                found.push(format!("{file}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn modules_say_what_they_own() {
    let silent: Vec<String> = sources()
        .into_iter()
        .filter(|file| !production(file).first().is_some_and(|line| line.starts_with("//!")))
        .collect();
    assert!(silent.is_empty(), "no `//!` at the top: {silent:#?}");
}

#[test]
fn nothing_else_stands_at_the_top() {
    let allowed = [
        "Cargo.toml",
        "Cargo.lock",
        "agent",
        "controller",
        "protocol",
        "systemd",
        "tests",
        "docs",
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "clippy.toml",
        "rustfmt.toml",
        "deny.toml",
        "rust-toolchain.toml",
    ];
    let other: Vec<String> = git_files()
        .iter()
        .filter_map(|file| file.split('/').next().map(str::to_owned))
        .filter(|top| !top.starts_with('.') && !allowed.contains(&top.as_str()))
        .collect();
    assert!(other.is_empty(), "{other:#?}");
}
