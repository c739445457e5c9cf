//! How many entries the maps get: what the flags say, and where they are left out, what the memory allows.
//!
//! What grows with traffic follows the memory, and what grows with the cluster only where there is very little. Memory differs a
//! bit from one start to the next (kernel, balloon), sizes must not: they are powers of two, and those that are pinned stay when
//! a tenth more or less memory would make them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use aya::maps::MapInfo;
use aya::util::nr_cpus;
use lb_common::Family;
use procfs::{Current as _, Meminfo};
use tracing::info;

use super::{Pins, Sizes};
use crate::state::Limits;

/// Memory for each entry of the flow table. So there is room for one connection in each 96 KiB, about what kube-proxy allows
/// for (32,768 on each CPU of machines with 4 GiB for each), and all tables of flows, affinity and sockets together take 1 % of
/// the memory at most.
const MEMORY_PER_FLOW: u64 = 48 << 10;
/// The flow table with the least memory, and with any.
const FLOWS: (u64, u64) = (1 << 14, 1 << 21);
/// With less memory than this, and so much for each possible processor, there is room for a quarter of a large cluster: that takes 70 MB, and
/// 10 MB for each processor, whose counters of backends are its own.
const SMALL: (u64, u64) = (2 << 30, 512 << 20);
/// The maps are charged to the cgroup of the agent that makes them: its limit counts as this much memory of a machine, so that
/// they take a third of it at most, twice for the time of a take-over, and the agent has room too.
const MEMORY_PER_LIMIT: u64 = 8;

/// What the flags say; a map whose flag is left out has a size by the machine's memory.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct WantedSizes {
    /// Entries of the flow table of each IP family: two for each connection, 144 bytes each, 192 of IPv6 [default: by memory,
    /// 16384 to 2097152].
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1024..=1 << 26))]
    pub max_flows: Option<u32>,
    /// Entries of the table of half-open flows of each IP family: two for each connection that is being made, and for each
    /// exchange of datagrams that the client has not gone on with. A flood of first packets fills this table only [default: by
    /// memory, 4096 to 524288].
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1024..=1 << 26))]
    pub max_half_open_flows: Option<u32>,
    /// Clients of each IP family that stay with their backend by session affinity, one for each service port that they dial
    /// [default: by memory, 4096 to 524288].
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1024..=1 << 26))]
    pub max_affinity: Option<u32>,
    /// Connections of the host's processes, of each IP family, of which it is known what they have dialled [default: by
    /// memory, 4096 to 524288].
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1024..=1 << 26))]
    pub max_sockets: Option<u32>,
    /// Packets of each IP family that come in fragments, at a time [default: 8192].
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1024..=1 << 24))]
    pub max_fragments: Option<u32>,
    /// Interfaces that lead to pods [default: 8192].
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub max_interfaces: Option<u32>,
    /// Frontends (address, port and protocol) of each IP family that this node can serve [default: 65536; 16384 with
    /// little memory].
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub max_frontends: Option<u32>,
    /// Service ports that this node can serve [default: 16384; 4096 with little memory].
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub max_service_ports: Option<u32>,
    /// Backends of all services together, of each IP family [default: 131072; 32768 with little memory].
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub max_backends: Option<u32>,
    /// Slots of all services together, a power of two: 4 bytes each, 256 for a service with four backends [default: 8388608;
    /// 2097152 with little memory].
    #[arg(long, value_name = "NUMBER", value_parser = power_of_two)]
    pub max_slots: Option<u32>,
}

fn power_of_two(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(number) if number.is_power_of_two() && (1 << 10..=1 << 26).contains(&number) => Ok(number),
        _ => Err("give a power of two from 1024 to 67108864".to_owned()),
    }
}

impl WantedSizes {
    /// The sizes on this machine, where these maps may be pinned already.
    ///
    /// # Errors
    /// When it cannot be read how much memory there is.
    pub fn here(&self, pins: &Pins, unserved: Option<Family>) -> Result<Sizes> {
        let memory = memory()?;
        let latest = pins.datapaths().pop().map(|datapath| pins.within(datapath.name()));
        let pinned = |names: &[&str]| {
            let infos = names.iter().filter_map(|name| MapInfo::from_pin(latest.as_ref()?.map(name)).ok());
            // That of a family which is not served has one.
            infos.map(|info| info.max_entries()).max()
        };
        let cpus = nr_cpus().map_err(|(_, error)| error).context("cannot tell how many processors there may be")?;
        let sizes = self.with((memory, cpus as u64), pinned, unserved);
        let Limits { frontends, service_ports, backends, slots } = sizes.limits;
        let Sizes { flows, half_open, affinity, sockets, .. } = sizes;
        let memory_mib = memory >> 20;
        info!(
            memory_mib,
            possible_processors = cpus,
            flows,
            half_open,
            affinity,
            sockets,
            frontends,
            service_ports,
            backends,
            slots,
            "sizes of the maps"
        );
        Ok(sizes)
    }

    /// The sizes with so much memory and so many processors. `pinned` tells the entries of the largest of some maps.
    fn with(
        &self,
        (memory, cpus): (u64, u64),
        pinned: impl Fn(&[&str]) -> Option<u32>,
        unserved: Option<Family>,
    ) -> Sizes {
        let size = |wanted: Option<u32>, maps: &[&str], by: &dyn Fn(u64) -> u32| {
            wanted.unwrap_or_else(|| {
                let stays = |&size: &u32| [by(memory / 10 * 9), by(memory / 10 * 11)].contains(&size);
                pinned(maps).filter(stays).unwrap_or_else(|| by(memory))
            })
        };
        let fourth = |memory| flows(memory) / 4;
        let of_cluster =
            |entries: u32| move |memory| if memory < SMALL.0 + SMALL.1 * cpus { entries / 4 } else { entries };
        Sizes {
            limits: Limits {
                frontends: size(self.max_frontends, &["FRONTENDS_4", "FRONTENDS_6"], &of_cluster(1 << 16)),
                service_ports: size(self.max_service_ports, &["SERVICE_PORTS"], &of_cluster(1 << 14)),
                backends: size(self.max_backends, &["BACKENDS_4", "BACKENDS_6"], &of_cluster(1 << 17)),
                // Entries are pairs.
                slots: 2 * size(self.max_slots.map(|slots| slots / 2), &["SLOTS"], &of_cluster(1 << 22)),
            },
            flows: size(self.max_flows, &["FLOWS_4", "FLOWS_6"], &flows),
            half_open: size(self.max_half_open_flows, &["HALF_OPEN_4", "HALF_OPEN_6"], &fourth),
            affinity: size(self.max_affinity, &["AFFINITY_4", "AFFINITY_6"], &fourth),
            sockets: size(self.max_sockets, &["SOCKETS_4", "SOCKETS_6"], &fourth),
            fragments: self.max_fragments.unwrap_or(Sizes::FRAGMENTS),
            interfaces: self.max_interfaces.unwrap_or(Sizes::INTERFACES),
            unserved,
        }
    }
}

/// Entries of a flow table.
fn flows(memory: u64) -> u32 {
    1 << (memory / MEMORY_PER_FLOW).clamp(FLOWS.0, FLOWS.1).ilog2()
}

/// What the maps may be sized by, bytes.
fn memory() -> Result<u64> {
    let machine = Meminfo::current().context("cannot read /proc/meminfo")?.mem_total;
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    Ok(within(machine, limit(Path::new("/sys/fs/cgroup"), &own)))
}

fn within(machine: u64, limit: Option<u64>) -> u64 {
    machine.min(limit.map_or(u64::MAX, |limit| limit.saturating_mul(MEMORY_PER_LIMIT)))
}

/// The lowest limit of memory of this process's cgroups, of either version: `own` is /proc/self/cgroup, `mounted` where they
/// are. In a container that may be its own cgroup, whatever path it is told to have.
fn limit(mounted: &Path, own: &str) -> Option<u64> {
    let limits = own.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let (tree, file) = match controllers {
            "" => (mounted.to_owned(), "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                (mounted.join("memory"), "memory.limit_in_bytes")
            }
            _ => return None,
        };
        let folder = tree.join(path.trim_start_matches('/'));
        let folders = folder.ancestors().take_while(|folder| folder.starts_with(&tree));
        folders.filter_map(|folder| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok()).min()
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn sizes(memory: u64) -> Sizes {
        WantedSizes::default().with((memory, 2), |_| None, None)
    }

    #[test]
    fn sizes_follow_the_memory_as_documented() {
        // docs/operations.md has this table.
        for (mib, flows, fourth, is_small) in [
            (500, 16_384, 4_096, true),
            (1_950, 32_768, 8_192, true),
            (3_900, 65_536, 16_384, false),
            (7_900, 131_072, 32_768, false),
            (15_900, 262_144, 65_536, false),
            (32_000, 524_288, 131_072, false),
            (64_300, 1_048_576, 262_144, false),
            (128_000, 2_097_152, 524_288, false),
            (4_000_000, 2_097_152, 524_288, false),
        ] {
            let sizes = sizes(mib << 20);
            assert_eq!((sizes.flows, sizes.half_open, sizes.affinity, sizes.sockets), (flows, fourth, fourth, fourth));
            assert_eq!(sizes.limits.backends, if is_small { 32_768 } else { 131_072 }, "{mib} MiB");
            assert_eq!(sizes.limits.slots, if is_small { 1 << 21 } else { 1 << 23 }, "{mib} MiB");
        }
    }

    #[test]
    fn a_little_more_or_less_memory_changes_no_size_and_a_flag_wins() {
        let wanted = WantedSizes { max_affinity: Some(5000), ..WantedSizes::default() };
        let (before, mut memory) = (wanted.with((12 * GIB, 2), |_| None, None), 12 * GIB);
        assert_eq!((before.flows, before.affinity), (262_144, 5000));
        let pinned = |names: &[&str]| match names[0] {
            "FLOWS_4" => Some(before.flows),
            "SLOTS" => Some(before.limits.slots / 2),
            _ => None,
        };
        for change in [-1, 1, -1_000_000_000, 1_000_000_000] {
            memory = memory.saturating_add_signed(change);
            assert_eq!(wanted.with((memory, 2), pinned, None).flows, before.flows, "{memory}");
        }
        assert_eq!(wanted.with((9 * GIB, 2), pinned, None).flows, 131_072, "much less is another machine");
        assert_eq!(wanted.with((48 * GIB, 2), pinned, None).flows, 1_048_576);
        // What somebody has asked for before is no default.
        assert_eq!(wanted.with((12 * GIB, 2), |_| Some(100_000), None).flows, 262_144);
        assert_eq!(wanted.with((3 * GIB - 1, 2), pinned, None).limits.slots, before.limits.slots);
        assert_eq!(wanted.with((12 * GIB, 64), |_| None, None).limits.slots, before.limits.slots / 4);
    }

    #[test]
    fn the_lowest_limit_of_the_cgroups_counts() {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let limit = |own| limit(folder.path(), own);
        assert_eq!(limit("0::/kubepods/pod/agent\n"), None);
        write("kubepods/pod/memory.max", "268435456\n");
        write("kubepods/pod/agent/memory.max", "max\n");
        write("kubepods/memory.max", "8589934592\n");
        assert_eq!(limit("0::/kubepods/pod/agent\n"), Some(256 << 20));
        assert_eq!(limit("0::/other\n"), None);
        // A container sees its own at the root.
        write("memory/memory.limit_in_bytes", "134217728\n");
        assert_eq!(limit("5:cpu,cpuacct:/a\n4:memory:/docker/1234\n0::/\n"), Some(128 << 20));
        assert_eq!(within(64 * GIB, Some(128 << 20)), GIB);
        assert_eq!(within(GIB, Some(i64::MAX as u64)), GIB);
        assert_eq!(within(GIB, None), GIB);
    }
}
