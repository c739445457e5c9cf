//! Rules of netfilter that see packets which the node forwards.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

use crate::netlink::{DUMP, ask, attributes, is_one_of};

/// Hooks that forwarded packets pass (`enum nf_inet_hooks`).
const PREROUTING: u32 = 0;
const FORWARD: u32 = 2;
const POSTROUTING: u32 = 4;
/// Of `inet` and `netdev`.
const INGRESS: u32 = 5;

/// A base chain of nftables, by which iptables-nft has its rules, too.
#[derive(Debug, Default, PartialEq, Eq)]
struct Chain {
    family: u8,
    table: String,
    name: String,
    hook: Option<u32>,
    drops: bool,
    rules: u32,
}

impl Chain {
    /// `struct nfgenmsg` and attributes (`enum nft_chain_attributes`).
    fn parse(message: &[u8]) -> Option<Self> {
        const TABLE: u16 = 1;
        const NAME: u16 = 3;
        const HOOK: u16 = 4;
        const POLICY: u16 = 5;
        const USE: u16 = 6;
        const HOOK_NUMBER: u16 = 1;
        const DROP: u32 = 0;

        let mut chain = Self { family: *message.first()?, ..Self::default() };
        for (kind, value) in attributes(message.get(4..)?) {
            match kind {
                TABLE => chain.table = text(value),
                NAME => chain.name = text(value),
                HOOK => {
                    chain.hook =
                        attributes(value).find(|(kind, _)| *kind == HOOK_NUMBER).and_then(|(_, hook)| number(hook));
                }
                POLICY => chain.drops = number(value) == Some(DROP),
                USE => chain.rules = number(value).unwrap_or_default(),
                _ => {}
            }
        }
        Some(chain)
    }

    /// Why packets cannot do without it.
    fn reason(&self) -> Option<String> {
        /// `NFPROTO_INET` and so on.
        const FAMILIES: [(u8, &str); 4] = [(1, "inet"), (2, "ip"), (5, "netdev"), (10, "ip6")];
        const NETDEV: u8 = 5;

        let (_, family) = FAMILIES.into_iter().find(|(number, _)| *number == self.family)?;
        let is_passed = matches!(self.hook?, PREROUTING | FORWARD | POSTROUTING | INGRESS) || self.family == NETDEV;
        let what = match self.rules {
            0 if self.drops => "drops what no rule accepts".to_owned(),
            0 => return None,
            1 => "has a rule".to_owned(),
            rules => format!("has {rules} rules"),
        };
        is_passed.then(|| format!("nftables: chain {family} {} {} {what}", self.table, self.name))
    }
}

/// Adds why packets cannot do without the stack.
pub(super) fn nftables(reasons: &mut Vec<String>) -> io::Result<()> {
    /// `NFNL_SUBSYS_NFTABLES` and `NFT_MSG_GETCHAIN`.
    const GET_CHAIN: u16 = 10 << 8 | 4;

    let asked = ask(NETLINK_NETFILTER, GET_CHAIN, DUMP, &[0; 4], |message| {
        reasons.extend(Chain::parse(message).and_then(|chain| chain.reason()));
    });
    match asked {
        // A kernel without.
        Err(error) if is_one_of(&error, &[Errno::EPROTONOSUPPORT, Errno::EINVAL, Errno::EOPNOTSUPP]) => Ok(()),
        asked => asked,
    }
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned()
}

fn number(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_be_bytes)
}

/// Adds that connections are tracked. Of one that goes on past the stack, tracking would not see the end.
pub(super) fn conntrack(reasons: &mut Vec<String>) -> io::Result<()> {
    match fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count") {
        Ok(count) if count.trim() == "0" => {}
        Ok(_) => reasons.push("conntrack: connections are tracked (conntrack -L)".to_owned()),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

/// `struct ipt_getinfo`, which is that of IPv6 too.
#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout)]
struct Table {
    name: [u8; 32],
    hooks: u32,
    first: [u32; 5],
    last: [u32; 5],
    count: u32,
    size: u32,
}

/// A family of legacy tables.
struct Legacy {
    command: &'static str,
    names: &'static str,
    sockets: AddressFamily,
    level: libc::c_int,
    /// Where an entry says where its target is: in `struct ipt_entry`, `struct ip6t_entry`.
    target_offset: usize,
}

const LEGACY: [Legacy; 2] = [
    Legacy {
        command: "iptables-legacy",
        names: "/proc/net/ip_tables_names",
        sockets: AddressFamily::Inet,
        level: libc::IPPROTO_IP,
        target_offset: 88,
    },
    Legacy {
        command: "ip6tables-legacy",
        names: "/proc/net/ip6_tables_names",
        sockets: AddressFamily::Inet6,
        level: libc::IPPROTO_IPV6,
        target_offset: 140,
    },
];

/// Adds why packets cannot do without the stack. The tables are those that somebody has used; asking for another would make it.
pub(super) fn iptables_legacy(reasons: &mut Vec<String>) -> io::Result<()> {
    for family in LEGACY {
        let names = match fs::read_to_string(family.names) {
            // Nobody has used any.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            names => names?,
        };
        for name in names.lines() {
            if family.has_rules(name)? {
                let command = family.command;
                reasons.push(format!("{command}: table {name} has rules ({command} -t {name} -S)"));
            }
        }
    }
    Ok(())
}

impl Legacy {
    /// Whether forwarded packets pass rules of this table, or a chain that does not accept them.
    fn has_rules(&self, name: &str) -> io::Result<bool> {
        /// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO`, `IPT_SO_GET_ENTRIES` and `IP6T_SO_GET_ENTRIES`.
        const GET_INFO: libc::c_int = 64;
        const GET_ENTRIES: libc::c_int = 65;
        /// `struct ipt_get_entries` before the entries: name, size, and space up to the next eight bytes.
        const HEAD: usize = 40;

        let mut table = Table { name: [0; 32], hooks: 0, first: [0; 5], last: [0; 5], count: 0, size: 0 };
        let length = name.len().min(table.name.len() - 1);
        table.name[..length].copy_from_slice(&name.as_bytes()[..length]);
        self.ask(GET_INFO, table.as_mut_bytes())?;
        let hooks: Vec<usize> = [PREROUTING, FORWARD, POSTROUTING]
            .into_iter()
            .filter(|hook| table.hooks & 1 << hook != 0)
            .map(|hook| hook as usize)
            .collect();
        if hooks.iter().any(|&hook| table.first[hook] != table.last[hook]) {
            return Ok(true);
        }
        let mut entries = vec![0; HEAD + table.size as usize];
        entries[..table.name.len()].copy_from_slice(&table.name);
        entries[table.name.len()..][..4].copy_from_slice(&table.size.to_ne_bytes());
        self.ask(GET_ENTRIES, &mut entries)?;
        let policy =
            |hook: usize| entries.get(HEAD + table.last[hook] as usize..).and_then(|entry| self.accepts(entry));
        Ok(hooks.into_iter().any(|hook| policy(hook) != Some(true)))
    }

    /// Whether an entry, as the policy of a chain is one, accepts what comes to it.
    fn accepts(&self, entry: &[u8]) -> Option<bool> {
        /// In `struct xt_standard_target`; `-NF_ACCEPT - 1`.
        const VERDICT: usize = 32;
        const ACCEPT: i32 = -2;

        let (target, _) = u16::read_from_prefix(entry.get(self.target_offset..)?).ok()?;
        let (verdict, _) = i32::read_from_prefix(entry.get(usize::from(target) + VERDICT..)?).ok()?;
        Some(verdict == ACCEPT)
    }

    fn ask(&self, option: libc::c_int, answer: &mut [u8]) -> io::Result<()> {
        let socket = socket(self.sockets, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        let mut size = libc::socklen_t::try_from(answer.len()).map_err(io::Error::other)?;
        // SAFETY: the kernel writes no more bytes than there are.
        let result = unsafe {
            libc::getsockopt(socket.as_raw_fd(), self.level, option, answer.as_mut_ptr().cast(), &raw mut size)
        };
        Errno::result(result)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(family: u8, hook: u32, rules: u32, drops: bool) -> Chain {
        Chain { family, table: "t".to_owned(), name: "c".to_owned(), hook: Some(hook), drops, rules }
    }

    #[test]
    fn a_chain_is_a_reason_when_forwarded_packets_meet_rules_in_it() {
        let reason = |family, hook, rules, drops| chain(family, hook, rules, drops).reason();
        assert_eq!(reason(2, FORWARD, 2, false).unwrap(), "nftables: chain ip t c has 2 rules");
        assert_eq!(reason(1, POSTROUTING, 1, true).unwrap(), "nftables: chain inet t c has a rule");
        assert_eq!(reason(10, FORWARD, 0, true).unwrap(), "nftables: chain ip6 t c drops what no rule accepts");
        assert_eq!(reason(2, FORWARD, 0, false), None, "as iptables-nft leaves them");
        assert_eq!(reason(2, 1, 5, true), None, "input");
        assert_eq!(reason(3, 0, 5, true), None, "ARP");
        assert!(reason(5, 0, 1, false).is_some(), "of an interface");
        assert_eq!(Chain { hook: None, ..chain(1, 0, 5, false) }.reason(), None, "one that others jump to");
    }

    #[test]
    fn a_chain_is_read_as_the_kernel_writes_it() {
        let message = [
            &[2, 0, 0, 0][..],
            &[6, 0, 1, 0, b't', 0, 0, 0],
            &[6, 0, 3, 0, b'c', 0, 0, 0],
            &[20, 0, 4, 0x80, 8, 0, 1, 0, 0, 0, 0, 2, 8, 0, 2, 0, 0, 0, 0, 0],
            &[8, 0, 5, 0, 0, 0, 0, 0],
            &[8, 0, 6, 0, 0, 0, 0, 7],
        ];
        assert_eq!(Chain::parse(&message.concat()).unwrap(), chain(2, FORWARD, 7, true));
    }
}
