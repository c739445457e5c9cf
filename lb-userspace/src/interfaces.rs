//! The interfaces that lead to pods, found by their names.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo};
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
    /// What else there is to know of it.
    pub link: Link,
}

/// How an interface is made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Whether it is one end of a veth pair.
    pub is_veth: bool,
    /// Whether another interface has it, such as a bridge.
    pub has_controller: bool,
    /// The queueing discipline of what it sends.
    pub queueing: Option<String>,
}

/// Watches the interfaces of the network namespace that this process runs in.
pub struct Interfaces {
    patterns: Vec<WildMatch>,
    handle: Handle,
    /// Each with the index of an interface that was deleted, or none.
    notices: Box<dyn futures_util::Stream<Item = Option<u32>> + Unpin>,
    deleted: BTreeSet<u32>,
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
            notices: Box::new(messages.map(|(message, _)| deleted(&message.payload))),
            deleted: BTreeSet::new(),
            next_relist: Instant::now() + RELIST,
        })
    }

    /// Waits until the interfaces should be listed again.
    ///
    /// # Panics
    /// When the task that reads from netlink has ended: nothing can be listed any more.
    pub async fn changed(&mut self) {
        tokio::select! {
            notice = self.notices.next() => match notice {
                Some(index) => self.deleted.extend(index),
                None => panic!("the connection to netlink has ended: the next agent opens another"),
            },
            () = sleep_until(self.next_relist) => {}
        }
        // One list answers all notices that are waiting.
        while let Some(Some(notice)) = self.notices.next().now_or_never() {
            self.deleted.extend(notice);
        }
        self.next_relist = Instant::now() + RELIST;
    }

    /// The indices of those that were deleted since this was asked last. Others may have them by now, even under the same name.
    pub fn deleted(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.deleted)
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
                let (mut name, mut netns_id, mut found) = (None, None, Link::default());
                for attribute in link.attributes {
                    match attribute {
                        LinkAttribute::IfName(is) => name = Some(is),
                        LinkAttribute::LinkNetNsId(id) => netns_id = Some(id),
                        LinkAttribute::LinkInfo(infos) => {
                            found.is_veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth))
                        }
                        LinkAttribute::Controller(index) => found.has_controller = index != 0,
                        LinkAttribute::Qdisc(name) => found.queueing = Some(name),
                        _ => {}
                    }
                }
                let name = name.filter(|name| self.patterns.iter().any(|pattern| pattern.matches(name)))?;
                Some((link.header.index, Interface { name, netns_id, link: found }))
            })
            .collect())
    }
}

fn deleted(payload: &NetlinkPayload<RouteNetlinkMessage>) -> Option<u32> {
    match payload {
        // One that leaves a bridge is told of in the same way, and met again where it was.
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) => Some(link.header.index),
        _ => None,
    }
}
