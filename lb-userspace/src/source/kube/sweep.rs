//! Mark and sweep: which objects are gone when a list has been delivered again.

use std::collections::HashSet;

use crate::model::ObjectName;

/// The names that a server has told of.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    known: HashSet<ObjectName>,
    /// Those of a list that is not complete yet.
    listed: Option<HashSet<ObjectName>>,
}

impl Sweep {
    /// A list begins, the first one or another. One that was not completed is forgotten: it says nothing about what is gone.
    pub(super) fn begin(&mut self) {
        self.listed = Some(HashSet::new());
    }

    /// Whether a list has begun and not ended.
    pub(super) const fn is_listing(&self) -> bool {
        self.listed.is_some()
    }

    /// An object is there.
    pub(super) fn present(&mut self, name: &ObjectName) {
        if let Some(listed) = &mut self.listed {
            listed.insert(name.clone());
        }
        self.known.insert(name.clone());
    }

    /// An object was deleted.
    pub(super) fn absent(&mut self, name: &ObjectName) {
        self.known.remove(name);
    }

    /// The list is complete: what is not in it is gone.
    pub(super) fn end(&mut self) -> Vec<ObjectName> {
        let Some(listed) = self.listed.take() else { return Vec::new() };
        let gone = self.known.difference(&listed).cloned().collect();
        self.known = listed;
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> ObjectName {
        ObjectName::new("default", name)
    }

    fn list(sweep: &mut Sweep, names: &[&str]) -> Vec<ObjectName> {
        sweep.begin();
        names.iter().for_each(|text| sweep.present(&name(text)));
        let mut gone = sweep.end();
        gone.sort();
        gone
    }

    #[test]
    fn what_a_later_list_does_not_contain_is_gone() {
        let mut sweep = Sweep::default();
        assert_eq!(list(&mut sweep, &["a", "b"]), []);
        sweep.present(&name("c"));
        sweep.absent(&name("b"));
        assert_eq!(list(&mut sweep, &["d"]), [name("a"), name("c")]);
        assert_eq!(list(&mut sweep, &["d"]), []);
    }

    #[test]
    fn a_list_that_breaks_off_says_nothing_about_what_is_gone() {
        let mut sweep = Sweep::default();
        list(&mut sweep, &["a", "b"]);
        sweep.begin();
        sweep.present(&name("a"));
        assert!(sweep.is_listing());
        assert_eq!(list(&mut sweep, &["a", "b"]), []);
    }

    #[test]
    fn an_object_of_a_list_that_broke_off_is_gone_when_the_next_does_not_contain_it() {
        let mut sweep = Sweep::default();
        sweep.begin();
        sweep.present(&name("a"));
        assert_eq!(list(&mut sweep, &["b"]), [name("a")]);
    }
}
