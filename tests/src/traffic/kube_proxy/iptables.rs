//! What `kube-proxy --proxy-mode=iptables` gives to iptables-restore.

use std::fmt::Write as _;

use super::{KubeProxyService, endpoint_name, name, pods};
use crate::addresses::Family;

/// Chains that the text does not name keep their rules.
pub(super) const ARGUMENTS: &[&str] = &["-w", "5", "--noflush"];

/// The chains of the table `filter` in the order in which packets get there, but for node ports, which only node's own
/// addresses have.
const FILTER: &str = "*filter
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
";
const FILTER_JUMPS: &str = r#"-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
"#;
const FORWARD: &str = r#"-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"#;
const NAT: &str = "*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
";
const NAT_JUMPS: &str = r#"-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
"#;
const MASQUERADE: &str = r#"-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
"#;
const LAST: &str = r#"-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
"#;

pub(super) fn program(family: Family, variant: &str) -> String {
    format!("{}-{variant}-restore", if family == Family::V4 { "iptables" } else { "ip6tables" })
}

/// Everything; or after a change what every synchronisation writes, and the chains of the service that has changed. The
/// chain that leads to all services is written anew each time.
pub(super) fn rules<'a>(
    family: Family,
    services: impl Iterator<Item = (usize, &'a KubeProxyService)>,
    changed: Option<usize>,
) -> String {
    let (mut chains, mut leading, mut own) = (NAT.to_owned(), String::new(), String::new());
    for (number, service) in services {
        let KubeProxyService { vip, endpoints, .. } = service;
        let (chain, protocol) = (format!("KUBE-SVC-{}", name(number)), service.protocol());
        let at = format!("-m {protocol} -p {protocol} -d {} --dport {}", vip.ip(), vip.port());
        line(
            &mut leading,
            format_args!(
                "-A KUBE-SERVICES -m comment --comment \"default/svc-{number}:port cluster IP\" {at} -j {chain}"
            ),
        );
        if changed.is_some_and(|changed| changed != number) {
            continue;
        }
        line(&mut chains, format_args!(":{chain} - [0:0]"));
        line(&mut own, format_args!("-A {chain} {at} ! -s {} -j KUBE-MARK-MASQ", pods(family)));
        for (index, endpoint) in endpoints.iter().enumerate() {
            let to = format!("KUBE-SEP-{}", endpoint_name(number, endpoint));
            let chance = match endpoints.len() - index {
                1 => String::new(),
                left => format!("-m statistic --mode random --probability {:.10} ", (left as f64).recip()),
            };
            line(&mut chains, format_args!(":{to} - [0:0]"));
            line(&mut own, format_args!("-A {chain} {chance}-j {to}"));
            line(&mut own, format_args!("-A {to} -s {} -j KUBE-MARK-MASQ", endpoint.ip()));
            line(&mut own, format_args!("-A {to} -m {protocol} -p {protocol} -j DNAT --to-destination {endpoint}"));
        }
    }
    let first = |jumps| if changed.is_none() { jumps } else { "" };
    [FILTER, first(FILTER_JUMPS), FORWARD, &chains, first(NAT_JUMPS), MASQUERADE, &own, &leading, LAST].concat()
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("memory");
}
