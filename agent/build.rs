//! Links the agent at a fixed address. A program that may lie anywhere has the addresses in its tables written at every
//! start, which makes 700 KiB of each shim's memory its own and a megabyte of the file; at a fixed one all shims share
//! them with the file. And leaves one of functions that came out the same, another 0.7 MiB of the file.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let target = |name: &str| std::env::var(name).unwrap_or_default();
    if target("CARGO_CFG_TARGET_ENV") == "gnu" && target("PROFILE") == "release" {
        println!("cargo::rustc-link-arg-bin=berth-agent=-no-pie");
        if target("CARGO_CFG_TARGET_ARCH") == "x86_64" {
            // rustc links by lld here, elsewhere by what cannot do that.
            println!("cargo::rustc-link-arg-bin=berth-agent=-Wl,--icf=all");
        }
    }
}
