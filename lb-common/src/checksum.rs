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
