//! Capabilities by number, for whoever reads them out of a checkpoint or gives them up.

use berth_protocol::job::ContainerSpec;

use super::spec;

/// As linux/capability.h numbers them.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// All that a container's processes may have, as bits.
pub fn bits(container: &ContainerSpec) -> u64 {
    let allowed = spec::capabilities(container);
    numbered(|name| allowed.contains(name))
}

/// Those of these names, as bits.
pub fn named(names: &[&str]) -> u64 {
    numbered(|name| names.contains(&name))
}

fn numbered(has: impl Fn(&str) -> bool) -> u64 {
    NAMES.iter().enumerate().filter(|(_, name)| has(name)).map(|(number, _)| 1 << number).sum()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_default_set_is_dockers() {
        assert_eq!(super::bits(&super::super::testing::container()), 0xa804_25fb);
    }
}
