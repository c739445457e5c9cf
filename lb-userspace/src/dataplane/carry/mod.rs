//! A datapath takes over from what an agent before has left: from the same one, or from one of another layout or of other
//! sizes, older or newer, without losing a packet.
//!
//! The new maps are made in a folder of their own and filled; then it gets its name, with a number above all others, and
//! counts: whoever comes after an agent that was killed in the middle finds by the numbers which datapath is the latest, takes
//! that one or makes another, and goes on from whatever is attached. Nothing else is remembered of how far it came.
//!
//! In this order, so that each packet finds the notes that it needs:
//!
//! 1. *The new answering programs are attached beside the old ones.* From here on an answer is turned back by either's notes.
//! 2. *What the old programs have noted meanwhile is carried.*
//! 3. *The opening programs are swapped,* each atomically. A flow that was opened between 2 and 3 is not known to them: its
//!    next packet selects again, by the same hash from the same slots, and so the same backend.
//! 4. *Once no old opening program runs any more, what was left behind is carried.*
//! 5. *The old answering programs make room for the new ones.* The old datapath is removed.
//!
//! With the answering programs first and in place, a flow that is opened by an old program just then would get no answer; with
//! the opening ones first, no new flow would.

mod entries;
mod translate;
mod types;

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use aya::maps::MapInfo;
use lb_common::abi::{Family, LAYOUT};
use tracing::{debug, info};

use self::entries::{Carried, Carrier, Which};
use self::translate::Translation;
use self::types::Types;
use super::attach::moving::{self, Role};
use super::pins::{NEW, OLD};
use super::{
    BITS, Datapath, Maps, OBJECT, Object, Pins, Settings, Sizes, TurnedAway, test_hooks, wait_for_grace_period,
};

/// Loads the programs, with the maps that are pinned if they fit, or with others that what is pinned is carried over to.
///
/// # Errors
/// When the kernel refuses something, or what there is does not fit into maps of these sizes. The datapath goes on, and the next
/// agent tries again.
pub fn take_over(pins: &Pins, sizes: &Sizes, settings: Settings) -> Result<Object> {
    let start = Instant::now();
    for leftover in pins.leftovers() {
        remove_tree(&leftover)?;
    }
    let types = Types::of_object(OBJECT)?;
    let mut others = pins.datapaths();
    let latest = others.last().cloned();
    let fitting = others.pop_if(|latest| fits(&pins.within(latest.name()), latest.layout, &types, sizes));
    if let (Some(ours), true) = (&fitting, others.is_empty()) {
        let object = load(&pins.within(ours.name()), sizes, settings)?;
        drop_number(pins, ours)?;
        return Ok(object);
    }
    let mut carried = Carried::default();
    let (ours, mut object) = match fitting {
        Some(ours) => {
            let object = load(&pins.within(ours.name()), sizes, settings)?;
            (ours, object)
        }
        None => {
            let number = latest.as_ref().map_or(0, |latest| latest.number + 1);
            let ours = Datapath { number, layout: LAYOUT };
            let knows = |latest: &Datapath| BITS.iter().all(|name| pins.within(latest.name()).map(name).exists());
            if !latest.as_ref().is_none_or(knows) {
                info!(
                    "which addresses flows have had was not noted: until the node boots again no packet passes without a look-up"
                );
            }
            let pins_new = pins.within(ours.name() + NEW);
            let object = load(&pins_new, sizes, settings)?;
            test_hooks::step();
            if let Some(latest) = &latest {
                let from = pins.within(latest.name());
                let old = types_of(&from, latest.layout, &types)?;
                Carrier::open((&from, &old), (&pins_new, &types), sizes)?.carry(Which::All, &mut carried)?;
                check_room(&pins_new, sizes, &carried)?;
                if let Err(error) = TurnedAway::carry(&from, &pins_new) {
                    debug!("it is not carried over which maps are full: {error:#}");
                }
            }
            rename(&pins_new.layout(), &pins.root().join(ours.name()))?;
            (ours, object)
        }
    };
    let target = pins.within(ours.name());
    if !others.is_empty() {
        move_over(&mut object, pins, &others, &target, (&types, sizes), &mut carried)?;
    }
    drop_number(pins, &ours)?;
    if let Some(latest) = latest {
        log(&latest, &ours, &carried, start);
    }
    Ok(object)
}

/// The number has served when there are no others: it says which of several is the latest.
fn drop_number(pins: &Pins, datapath: &Datapath) -> Result<()> {
    let name = Datapath { number: 0, layout: datapath.layout }.name();
    if name == datapath.name() { Ok(()) } else { rename(&pins.root().join(datapath.name()), &pins.root().join(name)) }
}

/// Loads the programs and pins them, with their maps.
fn load(pins: &Pins, sizes: &Sizes, settings: Settings) -> Result<Object> {
    pins.create()?;
    let mut object = Object::load(OBJECT, pins, sizes, settings)?;
    object.pin(pins)?;
    if Types::pinned(pins)?.is_none() {
        Types::pin(OBJECT, pins)?;
    }
    Ok(object)
}

/// Whether the maps of a datapath are as this version makes them. Missing ones will be made, but for those of bits, in which the flows
/// that are there belong.
fn fits(pins: &Pins, layout: u32, types: &Types, sizes: &Sizes) -> bool {
    let is_same = |old: Types| {
        old.0.iter().all(|(name, (key, value))| {
            types.0.get(name).is_none_or(|(new_key, new_value)| {
                Translation::between(key, new_key).is_identity() && Translation::between(value, new_value).is_identity()
            })
        })
    };
    layout == LAYOUT
        && sizes.shapes().iter().all(|shape| {
            let path = pins.map(shape.name);
            if path.exists() {
                MapInfo::from_pin(path).is_ok_and(|map| shape.is_that_of(&map))
            } else {
                !BITS.contains(&shape.name)
            }
        })
        && Types::pinned(pins).is_ok_and(|old| old.is_none_or(is_same))
}

fn types_of(pins: &Pins, layout: u32, ours: &Types) -> Result<Types> {
    match Types::pinned(pins)? {
        Some(types) => Ok(types),
        None if layout == LAYOUT => Ok(ours.clone()),
        None => bail!(
            "the maps in {} have layout {layout}, of a viaduct that did not say what its maps hold: nothing can be carried \
             over; run `viaduct cleanup --bpffs {}` first, which drops the state of all connections",
            pins.layout().display(),
            pins.root().display()
        ),
    }
}

fn move_over(
    object: &mut Object,
    pins: &Pins,
    others: &[Datapath],
    target: &Pins,
    (types, sizes): (&Types, &Sizes),
    carried: &mut Carried,
) -> Result<()> {
    // The latest first: its entries count where times are equal.
    let sources: Vec<_> = others.iter().rev().map(|other| (pins.within(other.name()), other.layout)).collect();
    let mut carriers = Vec::new();
    for (source, layout) in &sources {
        let old = types_of(source, *layout, types)?;
        carriers.push(Carrier::open((source, &old), (target, types), sizes)?);
    }
    let mut carry = |which| carriers.iter_mut().try_for_each(|carrier| carrier.carry(which, carried));

    // This takes the longest, and leaves little to do for the next time.
    carry(Which::Remembered)?;
    for (source, _) in &sources {
        moving::stand_beside(object, source, target)?;
    }
    carry(Which::Remembered)?;
    for (source, _) in &sources {
        moving::swap(object, Role::Opening, source, target)?;
    }
    wait_for_grace_period();
    carry(Which::LeftBehind)?;
    for (source, _) in &sources {
        moving::swap(object, Role::Answering, source, target)?;
    }
    moving::leave(target)?;
    for (source, _) in &sources {
        // What this version does not attach, or what stood beside in an attempt before.
        moving::take_off(source)?;
        let old = format!("{}{OLD}", source.layout().display());
        rename(&source.layout(), Path::new(&old))?;
        remove_tree(Path::new(&old))?;
    }
    Ok(())
}

/// Checks that all that is served has come into the new maps.
fn check_room(pins: &Pins, sizes: &Sizes, carried: &Carried) -> Result<()> {
    let maps = Maps::open(pins, false)?;
    let found = maps.read()?;
    let limits = sizes.limits;
    let backends = |family| if family == Family::V4 { maps.v4.backends_len() } else { maps.v6.backends_len() };
    let has_room = found.service_ports.iter().all(|(_, name, port)| {
        let slots = port.slots;
        sizes.unserved == Some(name.family)
            || slots.start.checked_add(slots.len).is_some_and(|end| end <= limits.slots)
                && maps.slots(slots).iter().all(|&backend| backend < backends(name.family))
    });
    let is_known = |(_, service_port): &(_, u32)| *service_port < limits.service_ports;
    if has_room && found.frontends.iter().all(is_known) {
        return Ok(());
    }
    bail!(
        "what is served does not fit into maps of these sizes ({} entries are beyond their ends): start with larger ones, see \
         --max-service-ports, --max-backends and --max-slots; the datapath goes on as it was",
        carried.without_room
    );
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))?;
    test_hooks::step();
    Ok(())
}

fn remove_tree(folder: &Path) -> Result<()> {
    fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    test_hooks::step();
    Ok(())
}

fn log(from: &Datapath, to: &Datapath, carried: &Carried, start: Instant) {
    let entries = carried.entries.iter().filter(|(_, entries)| **entries > 0);
    let entries: Vec<_> = entries.map(|(map, entries)| format!("{map} {entries}")).collect();
    let Carried { not_understood, without_room, .. } = carried;
    info!(
        from_layout = from.layout,
        to_layout = to.layout,
        entries = entries.join(", "),
        not_understood,
        without_room,
        duration_ms = start.elapsed().as_millis(),
        "taken over from another datapath"
    );
}
