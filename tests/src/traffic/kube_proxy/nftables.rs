//! What `kube-proxy --proxy-mode=nftables` gives to `nft`, as one transaction.

use std::fmt::Write as _;

use super::{KubeProxyService, endpoint_name, name, pods};
use crate::addresses::Family;

pub(super) const ARGUMENTS: &[&str] = &["-f", "-"];

/// What is there whatever the services are. A connection's first packet passes all of it, a later one the hooks only.
const BASE: &str = r#"add table TABLE { comment "rules for kube-proxy" ; }
add set TABLE cluster-ips { type ADDRESS ; comment "Active ClusterIPs" ; }
add set TABLE nodeport-ips { type ADDRESS ; comment "IPs that accept NodePort traffic" ; }
add map TABLE firewall-ips { type ADDRESS . inet_proto . inet_service : verdict ; }
add map TABLE no-endpoint-nodeports { type inet_proto . inet_service : verdict ; }
add map TABLE no-endpoint-services { type ADDRESS . inet_proto . inet_service : verdict ; }
add map TABLE service-ips { type ADDRESS . inet_proto . inet_service : verdict ; }
add map TABLE service-nodeports { type inet_proto . inet_service : verdict ; }
add chain TABLE cluster-ips-check
add chain TABLE filter-prerouting-pre-dnat { type filter hook prerouting priority -110 ; }
add chain TABLE filter-output-pre-dnat { type filter hook output priority -110 ; }
add chain TABLE filter-forward { type filter hook forward priority 0 ; }
add chain TABLE filter-input { type filter hook input priority 0 ; }
add chain TABLE filter-output { type filter hook output priority 0 ; }
add chain TABLE firewall-check
add chain TABLE mark-for-masquerade
add chain TABLE masquerading
add chain TABLE nat-output { type nat hook output priority -100 ; }
add chain TABLE nat-postrouting { type nat hook postrouting priority 100 ; }
add chain TABLE nat-prerouting { type nat hook prerouting priority -100 ; }
add chain TABLE nodeport-endpoints-check
add chain TABLE reject-chain
add chain TABLE services
add chain TABLE service-endpoints-check
add rule TABLE cluster-ips-check IP daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"
add rule TABLE cluster-ips-check IP daddr { RANGE } drop comment "Drop traffic to unallocated ClusterIPs"
add rule TABLE filter-prerouting-pre-dnat ct state new jump firewall-check
add rule TABLE filter-forward ct state new jump service-endpoints-check
add rule TABLE filter-forward ct state new jump cluster-ips-check
add rule TABLE filter-input ct state new jump nodeport-endpoints-check
add rule TABLE filter-input ct state new jump service-endpoints-check
add rule TABLE filter-output ct state new jump service-endpoints-check
add rule TABLE filter-output ct state new jump cluster-ips-check
add rule TABLE filter-output-pre-dnat ct state new jump firewall-check
add rule TABLE firewall-check IP daddr . meta l4proto . th dport vmap @firewall-ips
add rule TABLE mark-for-masquerade mark set mark or 0x4000
add rule TABLE masquerading mark and 0x4000 == 0 return
add rule TABLE masquerading mark set mark xor 0x4000
add rule TABLE masquerading masquerade fully-random
add rule TABLE nat-output jump services
add rule TABLE nat-postrouting jump masquerading
add rule TABLE nat-prerouting jump services
add rule TABLE nodeport-endpoints-check IP daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule TABLE reject-chain reject
add rule TABLE service-endpoints-check IP daddr . meta l4proto . th dport vmap @no-endpoint-services
add rule TABLE services IP daddr . meta l4proto . th dport vmap @service-ips
add rule TABLE services IP daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
"#;

/// Everything; or the chains of the one service that has changed.
pub(super) fn rules<'a>(
    family: Family,
    services: impl Iterator<Item = (usize, &'a KubeProxyService)>,
    changed: Option<usize>,
) -> String {
    let (ip, address, range) = match family {
        Family::V4 => ("ip", "ipv4_addr", "10.96.0.0/12"),
        Family::V6 => ("ip6", "ipv6_addr", "fd00:10:96::/108"),
    };
    let table = format!("{ip} kube-proxy");
    let base = BASE.replace("TABLE", &table).replace("ADDRESS", address).replace("IP daddr", &format!("{ip} daddr"));
    let mut rules = if changed.is_none() { base.replace("RANGE", range) } else { String::new() };
    let mut add = |what: std::fmt::Arguments<'_>| writeln!(rules, "{what}").expect("memory");
    for (number, service) in services {
        if changed.is_some_and(|changed| changed != number) {
            continue;
        }
        let KubeProxyService { vip, endpoints, .. } = service;
        let protocol = service.protocol();
        let of_service = format!("default/svc-{number}/{protocol}/port");
        let chain = format!("service-{}-{of_service}", &name(number)[8..]);
        let to_endpoint = |endpoint| format!("endpoint-{}-{of_service}", endpoint_name(number, endpoint));
        for endpoint in endpoints {
            let (chain, address) = (to_endpoint(endpoint), endpoint.ip());
            add(format_args!("add chain {table} {chain}\nflush chain {table} {chain}"));
            add(format_args!("add rule {table} {chain} {ip} saddr {address} jump mark-for-masquerade"));
            add(format_args!("add rule {table} {chain} meta l4proto {protocol} dnat to {endpoint}"));
        }
        let (address, port, pods) = (vip.ip(), vip.port(), pods(family));
        add(format_args!("add chain {table} {chain}\nflush chain {table} {chain}"));
        add(format_args!(
            "add rule {table} {chain} {ip} daddr {address} {ip} saddr != {pods} jump mark-for-masquerade"
        ));
        let slots =
            endpoints.iter().enumerate().map(|(slot, endpoint)| format!("{slot} : goto {}", to_endpoint(endpoint)));
        let slots = slots.collect::<Vec<_>>().join(", ");
        add(format_args!("add rule {table} {chain} numgen random mod {} vmap {{ {slots} }}", endpoints.len()));
        if changed.is_none() {
            add(format_args!("add element {table} cluster-ips {{ {address} }}"));
            add(format_args!("add element {table} service-ips {{ {address} . {protocol} . {port} : goto {chain} }}"));
        }
    }
    rules
}
