//! The interfaces that lead to pods, found by their names.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::{Handle, MulticastGroup, new_multicast_connection};
use tokio::time::{Instant, sleep_until};
use wildmatch::WildMatch;

/// How often interfaces are listed without any sign of change: the kernel drops notices when too many are unread.
const RELIST: Duration = Duration::from_secs(30);

/// Interfaces by index.
pub type Present = BTreeMap<u32, Interface>;

/// An interface as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// The network namespace of its peer, by the number that this one has for it; none for one that has no peer elsewhere.
    pub netns_id: Option<i32>,
}

/// Watches the interfaces of the network namespace that this process runs in.
pub struct Interfaces {
    patterns: Vec<WildMatch>,
    handle: Handle,
    notices: Box<dyn futures_util::Stream<Item = ()> + Unpin>,
    next_relist: Instant,
}

impl Interfaces {
    /// Begins to watch. `patterns` may hold `*` and `?`. Call it within a tokio runtime.
    ///
    /// # Errors
    /// When there is no netlink socket to be had.
    pub fn watch(patterns: &[String]) -> Result<Self> {
        let (connection, handle, messages) =
            new_multicast_connection(&[MulticastGroup::Link]).context("cannot open a netlink socket")?;
        tokio::spawn(connection);
        Ok(Self {
            patterns: patterns.iter().map(|pattern| WildMatch::new(pattern)).collect(),
            handle,
            notices: Box::new(messages.map(|_| ())),
            next_relist: Instant::now() + RELIST,
        })
    }

    /// Waits until the interfaces should be listed again.
    pub async fn changed(&mut self) {
        tokio::select! {
            _ = self.notices.next() => {}
            () = sleep_until(self.next_relist) => {}
        }
        // One list answers all notices that are waiting.
        while let Some(Some(())) = self.notices.next().now_or_never() {}
        self.next_relist = Instant::now() + RELIST;
    }

    /// The interfaces that match now.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub async fn list(&self) -> Result<Present> {
        let links: Vec<_> =
            self.handle.link().get().execute().try_collect().await.context("cannot list network interfaces")?;
        Ok(links
            .into_iter()
            .filter_map(|link| {
                let (mut name, mut netns_id) = (None, None);
                for attribute in link.attributes {
                    match attribute {
                        LinkAttribute::IfName(is) => name = Some(is),
                        LinkAttribute::LinkNetNsId(id) => netns_id = Some(id),
                        _ => {}
                    }
                }
                let name = name.filter(|name| self.patterns.iter().any(|pattern| pattern.matches(name)))?;
                Some((link.header.index, Interface { name, netns_id }))
            })
            .collect())
    }
}
