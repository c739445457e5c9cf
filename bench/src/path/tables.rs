//! The tables of flows, those of the programs and those of the floor, whatever the family.

use std::collections::HashMap;
use std::net::SocketAddr;

use anyhow::Result;
use lb_common::abi::{Flow, Hook};
use lb_common::{Address, Address4, Address6, Family, Tuple};
use lb_userspace::dataplane::{Entry, Pins, Table};

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Flows that both sides want.
    Flows,
    /// Those of which that is not known yet.
    HalfOpen,
}

/// A table of one family, pinned.
pub struct Flows<'a> {
    pins: &'a Pins,
    family: Family,
    which: Which,
}

impl<'a> Flows<'a> {
    /// The table that is pinned there.
    #[must_use]
    pub const fn new(pins: &'a Pins, family: Family, which: Which) -> Self {
        Self { pins, family, which }
    }

    /// Where packets of clients lead: from source and destination to source and destination.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn clients(&self) -> Result<HashMap<Ends, Ends>> {
        match self.family {
            Family::V4 => clients(&self.open::<Address4>()?),
            Family::V6 => clients(&self.open::<Address6>()?),
        }
    }

    /// How many entries there are.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn count(&self) -> Result<usize> {
        match self.family {
            Family::V4 => self.open::<Address4>()?.count(),
            Family::V6 => self.open::<Address6>()?.count(),
        }
    }

    /// Removes all entries.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn clear(&self) -> Result<()> {
        match self.family {
            Family::V4 => clear(&self.open::<Address4>()?),
            Family::V6 => clear(&self.open::<Address6>()?),
        }
    }

    /// Adds the entries of another table.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn copy_from(&self, other: &Self) -> Result<()> {
        match self.family {
            Family::V4 => copy(&other.open::<Address4>()?, &self.open()?),
            Family::V6 => copy(&other.open::<Address6>()?, &self.open()?),
        }
    }

    fn open<A>(&self) -> Result<Table<Tuple<A>, Flow<A>>>
    where
        Tuple<A>: Entry,
        Flow<A>: Entry,
    {
        let name = match (self.which, self.family) {
            (Which::Flows, Family::V4) => "FLOWS_4",
            (Which::Flows, Family::V6) => "FLOWS_6",
            (Which::HalfOpen, Family::V4) => "HALF_OPEN_4",
            (Which::HalfOpen, Family::V6) => "HALF_OPEN_6",
        };
        Table::open(self.pins, name)
    }
}

/// Source and destination of a packet.
pub type Ends = (SocketAddr, SocketAddr);

fn clients<A: Address>(table: &Table<Tuple<A>, Flow<A>>) -> Result<HashMap<Ends, Ends>>
where
    Tuple<A>: Entry,
    Flow<A>: Entry,
{
    let entries = table.entries()?.into_iter().filter(|(_, flow)| flow.hook == Hook::FromPod);
    Ok(entries.map(|(key, flow)| (ends(&key), ends(&flow.to))).collect())
}

fn ends<A: Address>(tuple: &Tuple<A>) -> Ends {
    let source = SocketAddr::new(tuple.source.ip(), tuple.source_port);
    (source, SocketAddr::new(tuple.destination.ip(), tuple.destination_port))
}

fn clear<A>(table: &Table<Tuple<A>, Flow<A>>) -> Result<()>
where
    Tuple<A>: Entry,
    Flow<A>: Entry,
{
    table.entries()?.iter().try_for_each(|(key, _)| table.remove(key))
}

fn copy<A>(from: &Table<Tuple<A>, Flow<A>>, to: &Table<Tuple<A>, Flow<A>>) -> Result<()>
where
    Tuple<A>: Entry,
    Flow<A>: Entry,
{
    from.entries()?.iter().try_for_each(|(key, flow)| to.insert(key, flow))
}
