//! What pods on a bridge cannot reach: the node's own services, those of other agents and controllers on it among them,
//! and the addresses at which clouds give a machine its keys. On both families: a bridge and its pods have link-local
//! addresses of IPv6, whoever gave them none.

use std::path::Path;

use super::{BridgeError, DNS, METADATA_V4, METADATA_V6, Reach, run};

/// Sets the rules for a bridge by nftables, in one step, or else by iptables.
pub(super) fn set_up(bridge: &str, reach: &Reach) -> Result<(), BridgeError> {
    let Err(nft) = run("nft", &["-f", "-"], &table(bridge, reach)) else { return Ok(()) };
    let chains = |program| by_iptables(program, bridge, reach);
    let v6 = Path::new("/proc/sys/net/ipv6").exists();
    let done = chains("iptables").and_then(|()| if v6 { chains("ip6tables") } else { Ok(()) });
    done.map_err(|iptables| BridgeError::Guard { nft, iptables })
}

pub(super) fn take_away(bridge: &str) {
    let _ = run("nft", &["delete", "table", "inet", bridge], "");
    for program in ["iptables", "ip6tables"] {
        for (hook, chain) in chains(bridge) {
            let _ = run(program, &["-w", "-D", hook, "-i", bridge, "-j", &chain], "");
            let _ = run(program, &["-w", "-F", &chain], "");
            let _ = run(program, &["-w", "-X", &chain], "");
        }
    }
}

fn table(bridge: &str, reach: &Reach) -> String {
    let ports = |port: &u16| format!("  tcp dport {port} accept\n");
    let ports: String = reach.node_ports.iter().map(ports).collect();
    let metadata = match reach.metadata {
        true => String::new(),
        false => format!("  ip daddr {{ {METADATA_V4} }} reject\n  ip6 daddr {{ {METADATA_V6} }} reject\n"),
    };
    let dns = format!("  udp dport {DNS} accept\n  tcp dport {DNS} accept\n");
    format!(
        "table inet {bridge}\ndelete table inet {bridge}\ntable inet {bridge} {{\n chain node {{\n  \
         type filter hook input priority 0;\n  iifname != \"{bridge}\" accept\n  \
         ct state established,related accept\n  meta l4proto {{ icmp, ipv6-icmp }} accept\n{dns}{ports}  reject\n }}\n \
         chain beyond {{\n  type filter hook forward priority 0;\n  iifname != \"{bridge}\" accept\n{dns}{metadata} }}\n}}\n"
    )
}

/// Each with the hook that leads to it.
fn chains(bridge: &str) -> [(&'static str, String); 2] {
    [("INPUT", format!("{bridge}-node")), ("FORWARD", format!("{bridge}-beyond"))]
}

fn by_iptables(program: &str, bridge: &str, reach: &Reach) -> Result<(), String> {
    let iptables = |args: &str| run(program, &args.split(' ').collect::<Vec<_>>(), "");
    let (icmp, metadata) = match program {
        "iptables" => ("icmp", METADATA_V4),
        _ => ("ipv6-icmp", METADATA_V6),
    };
    for (hook, chain) in chains(bridge) {
        // There already, perhaps; and emptied, nothing passes by it while the way to it is open.
        let _ = iptables(&format!("-w -N {chain}"));
        let mut rules: Vec<String> =
            ["udp", "tcp"].map(|protocol| format!("-p {protocol} --dport {DNS} -j RETURN")).into();
        match hook {
            "INPUT" => {
                rules.push("-m conntrack --ctstate RELATED,ESTABLISHED -j RETURN".to_owned());
                rules.push(format!("-p {icmp} -j RETURN"));
                rules.extend(reach.node_ports.iter().map(|port| format!("-p tcp --dport {port} -j RETURN")));
                rules.push("-j REJECT".to_owned());
            }
            _ if reach.metadata => {}
            _ => rules.push(format!("-d {metadata} -j REJECT")),
        }
        iptables(&format!("-w -F {chain}"))?;
        rules.iter().try_for_each(|rule| iptables(&format!("-w -A {chain} {rule}")))?;
        // First, whatever has come before it since.
        let _ = iptables(&format!("-w -D {hook} -i {bridge} -j {chain}"));
        iptables(&format!("-w -I {hook} -i {bridge} -j {chain}"))?;
    }
    Ok(())
}
