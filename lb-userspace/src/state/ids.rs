//! Numbers below a limit, the lowest free one first, so that tables stay dense.

use std::collections::BTreeSet;

#[derive(Debug, Clone)]
pub(crate) struct IdPool {
    limit: u32,
    /// All numbers from here on are free.
    next: u32,
    /// Free numbers below `next`.
    free: BTreeSet<u32>,
}

impl IdPool {
    /// All of `0..limit` free, but for those in use.
    pub(crate) fn new(limit: u32, used: &BTreeSet<u32>) -> Self {
        let next = used.last().map_or(0, |&last| last + 1);
        Self { limit, next, free: (0..next).filter(|id| !used.contains(id)).collect() }
    }

    /// How many can be had.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + (self.limit.saturating_sub(self.next)) as usize
    }

    pub(crate) fn allocate(&mut self) -> Option<u32> {
        if let Some(id) = self.free.pop_first() {
            return Some(id);
        }
        if self.next >= self.limit {
            return None;
        }
        self.next += 1;
        Some(self.next - 1)
    }

    pub(crate) fn release(&mut self, id: u32) {
        self.free.insert(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_number_comes_first() {
        let mut ids = IdPool::new(5, &BTreeSet::from([1, 3]));
        assert_eq!(ids.available(), 3);
        assert_eq!([ids.allocate(), ids.allocate(), ids.allocate(), ids.allocate()], [Some(0), Some(2), Some(4), None]);
        ids.release(3);
        assert_eq!(ids.allocate(), Some(3));
    }
}
