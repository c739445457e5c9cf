//! From an entry as one version has it to the same as another has it, by the names of its fields.

use super::types::Layout;

/// How to make a key or value of one layout of one of another. A field that the other does not have, or has in another size,
/// is zero: fields are made so that zero says "not known" or "no".
#[derive(Debug)]
pub(super) struct Translation {
    /// From where, to where, how many bytes.
    copies: Vec<(usize, usize, usize)>,
    /// Fields that may not have any value: offset, bytes, and the values.
    checks: Vec<(usize, usize, Vec<u64>)>,
    sizes: (usize, usize),
    is_identity: bool,
}

impl Translation {
    pub(super) fn between(from: &Layout, to: &Layout) -> Self {
        let mut copies: Vec<(usize, usize, usize)> = Vec::new();
        for field in &to.fields {
            let same = from.fields.iter().find(|other| (&other.path, other.size) == (&field.path, field.size));
            let Some(same) = same else { continue };
            match copies.last_mut() {
                Some((from, to, size)) if (*from + *size, *to + *size) == (same.offset, field.offset) => {
                    *size += field.size
                }
                _ => copies.push((same.offset, field.offset, field.size)),
            }
        }
        let checks = to.fields.iter().filter_map(|field| Some((field.offset, field.size, field.values.clone()?)));
        Self { copies, checks: checks.collect(), sizes: (from.size, to.size), is_identity: from == to }
    }

    /// Whether both layouts are the same.
    pub(super) const fn is_identity(&self) -> bool {
        self.is_identity
    }

    /// Bytes before and after.
    pub(super) const fn sizes(&self) -> (usize, usize) {
        self.sizes
    }

    /// False when the result makes no sense in the new layout.
    pub(super) fn apply(&self, from: &[u8], to: &mut [u8]) -> bool {
        to.fill(0);
        for &(source, target, size) in &self.copies {
            to[target..target + size].copy_from_slice(&from[source..source + size]);
        }
        self.checks.iter().all(|(offset, size, values)| {
            let value = to[*offset..offset + size].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
            values.contains(&value)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::carry::types::Field;

    fn layout<const N: usize>(fields: [(&str, usize, Option<Vec<u64>>); N]) -> Layout {
        let mut layout = Layout::default();
        for (path, size, values) in fields {
            layout.fields.push(Field { path: path.to_owned(), offset: layout.size, size, values });
            layout.size += size;
        }
        layout
    }

    #[test]
    fn fields_find_their_new_places_by_name() {
        let old = layout([("a", 2, None), ("b", 1, None), ("gone", 1, None), ("wider", 2, None)]);
        let new = layout([("wider", 4, None), ("b", 1, None), ("new", 1, None), ("a", 2, None)]);
        let mut entry = [0xff; 8];
        assert!(Translation::between(&old, &new).apply(&[1, 2, 3, 4, 5, 6], &mut entry));
        assert_eq!(entry, [0, 0, 0, 0, 3, 0, 1, 2]);
        let mut back = [0xff; 6];
        assert!(Translation::between(&new, &old).apply(&entry, &mut back));
        assert_eq!(back, [1, 2, 3, 0, 0, 0]);
    }

    #[test]
    fn a_value_that_the_new_layout_does_not_have_makes_no_sense() {
        let old = layout([("protocol", 1, None), ("port", 2, None)]);
        let new = layout([("port", 2, None), ("protocol", 1, Some(vec![6, 17]))]);
        let translation = Translation::between(&old, &new);
        let mut entry = [0; 3];
        assert!(translation.apply(&[17, 1, 2], &mut entry));
        assert_eq!(entry, [1, 2, 17]);
        assert!(!translation.apply(&[47, 1, 2], &mut entry));
        assert!(!Translation::between(&layout([("port", 2, None)]), &new).apply(&[1, 2], &mut entry), "no protocol");
    }

    #[test]
    fn equal_layouts_are_copied_at_once() {
        let layout = layout([("a", 2, None), ("b", 4, None)]);
        let translation = Translation::between(&layout, &layout.clone());
        assert!(translation.is_identity());
        assert_eq!(translation.copies, [(0, 0, 6)]);
    }
}
