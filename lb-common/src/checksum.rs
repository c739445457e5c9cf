//! The Internet checksum, kept up to date when a header changes (RFC 1071, RFC 1624).

/// Folds a sum of 16-bit words into 16 bits with end-around carry.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "folded")]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The checksum after a 32-bit word that it covers changed from `old` to `new`: `~(~check + ~old + new)`, RFC 1624
/// equation 3. All three as they lie in the packet, whatever the machine's byte order.
#[inline(always)]
#[must_use]
pub const fn replace(check: u16, old: u32, new: u32) -> u16 {
    !fold(!check as u64 + !old as u64 + new as u64)
}

/// A sum of words in one's complement. They are taken as they lie in the packet, whatever the machine's byte order.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// Of nothing.
    pub const NONE: Self = Self(0);

    /// Of the pseudo-header of a transport protocol (RFC 9293 section 3.1, RFC 8200 section 8.1). `len` is that of header and
    /// data, bytes.
    #[inline(always)]
    #[must_use]
    pub fn pseudo_header(source: &[u32], destination: &[u32], protocol: u8, len: u32) -> Self {
        Self::NONE.words(source).words(destination).word(u32::from(protocol).to_be()).word(len.to_be())
    }

    /// With another 32-bit word. A 16-bit one counts as such, too.
    #[inline(always)]
    #[must_use]
    pub const fn word(self, word: u32) -> Self {
        Self(self.0 + word as u64)
    }

    /// With more words.
    #[inline(always)]
    #[must_use]
    pub fn words(self, words: &[u32]) -> Self {
        words.iter().fold(self, |sum, &word| sum.word(word))
    }

    /// In 16 bits.
    #[inline(always)]
    #[must_use]
    pub const fn fold(self) -> u16 {
        fold(self.0)
    }
}

/// What changes of words do to a sum over them, in one's complement: the sum of all `~old + new`.
///
/// Words are taken as they lie in the packet, whatever the machine's byte order, and begin at even offsets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Difference(u64);

impl Difference {
    /// No change.
    pub const NONE: Self = Self(0);

    /// A 32-bit word changed. A 16-bit one counts as such, too.
    #[inline(always)]
    #[must_use]
    pub const fn word(self, old: u32, new: u32) -> Self {
        Self(self.0 + !old as u64 + new as u64)
    }

    /// Words changed.
    #[inline(always)]
    #[must_use]
    pub fn words(self, old: &[u32], new: &[u32]) -> Self {
        old.iter().zip(new).fold(self, |sum, (&old, &new)| sum.word(old, new))
    }

    /// This and another change.
    #[inline(always)]
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// As the kernel's helpers want it (`__wsum`).
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "folded")]
    pub const fn sum(self) -> u32 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((sum & 0xffff_ffff) + (sum >> 32)) as u32
    }

    /// The checksum after the change.
    #[inline(always)]
    #[must_use]
    pub const fn apply(self, check: u16) -> u16 {
        !fold(!check as u64 + self.0)
    }
}

/// The checksum of `bytes` from nothing, in network byte order as a number. For tests and for building packets.
#[must_use]
pub fn of(bytes: &[u8]) -> u16 {
    let mut words = bytes.chunks_exact(2);
    let sum: u64 = words.by_ref().map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let last = words.remainder().first().map_or(0, |&byte| u64::from(byte) << 8);
    !fold(sum + last)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn replacing_a_word_equals_computing_anew(mut header: [u8; 20], at in 0_usize..4, new: [u8; 4]) {
            // The checksum of a header of zeroes is ambiguous (0 and 0xffff mean the same), and no IP header is zero.
            header[0] = 0x45;
            header[10..12].fill(0);
            let check = of(&header);
            let at = at * 4 + if at >= 2 { 4 } else { 0 };
            prop_assume!(at != 0);
            let old: [u8; 4] = header[at..at + 4].try_into().unwrap();
            header[at..at + 4].copy_from_slice(&new);

            let updated = replace(u16::from_ne_bytes(check.to_be_bytes()), u32::from_ne_bytes(old), u32::from_ne_bytes(new));

            prop_assert_eq!(u16::from_be_bytes(updated.to_ne_bytes()), of(&header));
        }
    }

    #[test]
    fn the_example_of_rfc_1071_is_met() {
        assert_eq!(of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
