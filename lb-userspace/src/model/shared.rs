//! Values that many objects have in common, each kept once.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

/// Values by themselves. Those that nothing else holds any more go when the set has doubled since they were last looked
/// for, so that a change never costs more than it brings.
#[derive(Debug)]
pub(super) struct Shared<T: ?Sized> {
    known: HashSet<Arc<T>>,
    sweep_at: usize,
}

impl<T: ?Sized> Default for Shared<T> {
    fn default() -> Self {
        Self { known: HashSet::new(), sweep_at: Self::FEW }
    }
}

impl<T: ?Sized> Shared<T> {
    /// Not worth a search for what is unused.
    const FEW: usize = 64;
}

impl<T: ?Sized + Eq + Hash> Shared<T> {
    /// Replaces `value` by the equal one that is there already, if there is one.
    pub(super) fn share(&mut self, value: &mut Arc<T>) {
        if let Some(known) = self.known.get(&**value) {
            value.clone_from(known);
            return;
        }
        if self.known.len() >= self.sweep_at {
            self.known.retain(|known| Arc::strong_count(known) > 1);
            self.known.shrink_to(2 * self.known.len());
            self.sweep_at = (2 * self.known.len()).max(Self::FEW);
        }
        self.known.insert(value.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_kept_once_and_unused_ones_go_in_time() {
        let mut shared = Shared::<str>::default();
        let (mut a, mut b): (Arc<str>, Arc<str>) = ("web".into(), "web".into());
        shared.share(&mut a);
        shared.share(&mut b);
        assert!(Arc::ptr_eq(&a, &b));
        (0..10_000).for_each(|i| shared.share(&mut format!("{i}").into()));
        assert!(shared.known.len() <= Shared::<str>::FEW, "{}", shared.known.len());
        let mut c: Arc<str> = "web".into();
        shared.share(&mut c);
        assert!(Arc::ptr_eq(&a, &c), "what is in use stays");
    }
}
