//! Which parts of the slot table are in use: a buddy allocator, since every range has a power of two as its length.

use std::collections::BTreeSet;

use lb_common::abi::SlotRange;

/// Ranges are aligned to their length, so that a freed one finds its buddy by flipping one bit.
#[derive(Debug, Clone)]
pub(crate) struct SlotAllocator {
    /// Start of each free range, by the binary logarithm of its length.
    free: Vec<BTreeSet<u32>>,
}

impl SlotAllocator {
    /// All of `0..len` free; `len` is a power of two.
    pub(crate) fn new(len: u32) -> Self {
        let orders = len.ilog2() as usize + 1;
        let mut free = vec![BTreeSet::new(); orders];
        free[orders - 1].insert(0);
        Self { free }
    }

    /// How many slots are free.
    pub(crate) fn available(&self) -> usize {
        self.free.iter().enumerate().map(|(order, ranges)| ranges.len() << order).sum()
    }

    /// The lowest free range of this length, a power of two.
    pub(crate) fn allocate(&mut self, len: u32) -> Option<SlotRange> {
        let order = order(len);
        let found = (order..self.free.len()).find(|&order| !self.free[order].is_empty())?;
        let start = self.free[found].pop_first()?;
        for order in order..found {
            self.free[order].insert(start + (1 << order));
        }
        Some(SlotRange { start, len })
    }

    /// Takes a particular range; false when any of it is taken already, or when it is none that `allocate` could give.
    pub(crate) fn reserve(&mut self, range: SlotRange) -> bool {
        if !range.len.is_power_of_two() || !range.start.is_multiple_of(range.len) {
            return false;
        }
        let order = order(range.len);
        let holder = (order..self.free.len()).find_map(|order| {
            let start = range.start >> order << order;
            self.free[order].remove(&start).then_some((order, start))
        });
        let Some((held, mut start)) = holder else { return false };
        for order in (order..held).rev() {
            let upper = start + (1 << order);
            if range.start < upper {
                self.free[order].insert(upper);
            } else {
                self.free[order].insert(start);
                start = upper;
            }
        }
        true
    }

    /// Gives a range back that was allocated or reserved.
    pub(crate) fn release(&mut self, range: SlotRange) {
        let mut start = range.start;
        let mut order = order(range.len);
        while order + 1 < self.free.len() && self.free[order].remove(&(start ^ 1 << order)) {
            start &= !(1 << order);
            order += 1;
        }
        self.free[order].insert(start);
    }
}

fn order(len: u32) -> usize {
    len.trailing_zeros() as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_whole_table_can_be_given_out_and_comes_back_whole() {
        let mut slots = SlotAllocator::new(8);
        let ranges: Vec<_> = (0..8).map(|_| slots.allocate(1).unwrap()).collect();
        assert_eq!(slots.allocate(1), None);
        ranges.into_iter().for_each(|range| slots.release(range));
        assert_eq!(slots.allocate(8), Some(SlotRange { start: 0, len: 8 }));
    }

    #[test]
    fn a_reserved_range_is_not_given_out() {
        let mut slots = SlotAllocator::new(8);
        assert!(slots.reserve(SlotRange { start: 4, len: 2 }));
        assert_eq!(slots.available(), 6);
        assert!(!slots.reserve(SlotRange { start: 4, len: 4 }));
        assert!(!slots.reserve(SlotRange { start: 5, len: 1 }));
        assert!(!slots.reserve(SlotRange { start: 1, len: 2 }), "not aligned");
        assert!(!slots.reserve(SlotRange { start: 8, len: 1 }), "outside of the table");
        assert_eq!(slots.allocate(4), Some(SlotRange { start: 0, len: 4 }));
        assert_eq!(slots.allocate(4), None);
        assert_eq!(slots.allocate(2), Some(SlotRange { start: 6, len: 2 }));
    }

    proptest! {
        #[test]
        fn ranges_in_use_never_overlap(steps in prop::collection::vec((0_u32..5, any::<prop::sample::Index>(), any::<bool>()), 1..200)) {
            let mut slots = SlotAllocator::new(64);
            let mut used: Vec<SlotRange> = Vec::new();
            for (order, pick, release) in steps {
                if release && !used.is_empty() {
                    let range = used.swap_remove(pick.index(used.len()));
                    slots.release(range);
                } else if let Some(range) = slots.allocate(1 << order) {
                    prop_assert!(range.start + range.len <= 64);
                    for other in &used {
                        prop_assert!(range.start + range.len <= other.start || other.start + other.len <= range.start);
                    }
                    used.push(range);
                }
            }
            let mut again = SlotAllocator::new(64);
            for range in &used {
                prop_assert!(again.reserve(*range));
            }
            used.into_iter().for_each(|range| slots.release(range));
            prop_assert_eq!(slots.allocate(64), Some(SlotRange { start: 0, len: 64 }));
        }
    }
}
