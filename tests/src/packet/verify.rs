//! Checks checksums, by code that shares nothing with what builds packets.

use anyhow::{Context, Result, bail, ensure};

use super::{ICMP, ICMPV6, TCP, UDP};

const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];

/// Checks every checksum of an Ethernet frame: IPv4 header, TCP, UDP, ICMP, and those in the packet that an ICMP error
/// quotes as far as it quotes what they cover. An error names the first that is wrong.
pub fn verify_checksums(frame: &[u8]) -> Result<()> {
    let kind = frame.get(12..14).context("shorter than an Ethernet header")?;
    if kind == IPV4 || kind == IPV6 {
        ensure!((frame[14] >> 4 == 4) == (kind == IPV4), "Ethernet and IP differ about the version");
        verify_packet(&frame[14..], true)?;
    }
    Ok(())
}

/// An IP packet from the version on. Of one that is not `whole` the end may be missing.
fn verify_packet(packet: &[u8], whole: bool) -> Result<()> {
    let cut = "the IP packet is cut";
    let is_ipv4 = packet.first().context(cut)? >> 4 == 4;
    let (protocol, addresses, start, end) = if is_ipv4 {
        let header_length = usize::from(packet[0] & 0x0f) * 4;
        let header = packet.get(..header_length).context(cut)?;
        ensure!(header_length >= 20, "the IPv4 header's length is {header_length}");
        ensure!(sum(header) == 0xffff, "the checksum of the IPv4 header is wrong");
        if word(header, 6).context(cut)? & 0x3fff != 0 {
            // A fragment: the L4 checksum covers the whole datagram, of which this is a part.
            return Ok(());
        }
        (header[9], &header[12..20], header_length, usize::from(word(packet, 2).context(cut)?))
    } else {
        let end = 40 + usize::from(word(packet, 4).context(cut)?);
        let addresses = packet.get(8..40).context(cut)?;
        let Some((protocol, start)) = behind_extensions(packet)? else { return Ok(()) };
        (protocol, addresses, start, end)
    };
    let Some(transport) = packet.get(start..end) else {
        ensure!(!whole, "{cut}");
        return Ok(());
    };
    let (name, checksum_at) = match protocol {
        TCP => ("TCP", 16),
        UDP => ("UDP", 6),
        ICMP | ICMPV6 => ("ICMP", 2),
        _ => return Ok(()),
    };
    let checksum = word(transport, checksum_at).with_context(|| format!("the {name} header is cut"))?;
    if protocol == UDP && checksum == 0 {
        ensure!(is_ipv4, "UDP over IPv6 without a checksum");
        return Ok(());
    }
    // The pseudo header: addresses, length, protocol. ICMP for IPv4 has none.
    let mut covered = Vec::new();
    if protocol != ICMP {
        covered.extend_from_slice(addresses);
        covered.extend_from_slice(&u32::try_from(transport.len())?.to_be_bytes());
        covered.extend_from_slice(&[0, 0, 0, protocol]);
    }
    covered.extend_from_slice(transport);
    if sum(&covered) != 0xffff {
        bail!("the {name} checksum is wrong ({checksum:#06x})");
    }
    let is_error = match protocol {
        ICMP => matches!(transport[0], 3 | 11 | 12),
        ICMPV6 => transport[0] < 128,
        _ => false,
    };
    if is_error {
        verify_packet(&transport[8..], false).context("in the quoted packet")?;
    }
    Ok(())
}

/// The transport protocol of an IPv6 packet and where its header begins; nothing for a fragment.
fn behind_extensions(packet: &[u8]) -> Result<Option<(u8, usize)>> {
    let (mut next, mut at) = (packet[6], 40);
    loop {
        match next {
            0 | 43 | 60 => {
                let header = packet.get(at..at + 2).context("an extension header is cut")?;
                (next, at) = (header[0], at + 8 + usize::from(header[1]) * 8);
            }
            44 => {
                let header = packet.get(at..at + 8).context("the fragment header is cut")?;
                if word(header, 2).is_some_and(|offset_and_more| offset_and_more & 0xfff9 != 0) {
                    return Ok(None);
                }
                (next, at) = (header[0], at + 8);
            }
            transport => return Ok(Some((transport, at))),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// The ones' complement sum (RFC 1071): 0xffff over data that includes its own right checksum.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    words.fold(0, |sum: u16, word| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

#[cfg(test)]
mod tests {
    use super::sum;

    #[test]
    fn a_checksum_from_the_rfc_is_right() {
        // RFC 1071, section 3: the sum of these bytes is ddf2.
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
    }
}
