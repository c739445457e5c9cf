//! Frames made of other frames: cut into fragments, or with extension headers put in.

use etherparse::{IpNumber, Ipv4Header, Ipv6FragmentHeader, Ipv6Header};

/// Ethernet's header, which every frame here begins with.
const ETHERNET: usize = 14;
/// Hop-by-hop options, an extension header of IPv6.
pub const HOP_BY_HOP: u8 = 0;
/// A routing header, an extension header of IPv6.
pub const ROUTING: u8 = 43;
/// Destination options, an extension header of IPv6.
pub const DESTINATION_OPTIONS: u8 = 60;

/// The fragments of a frame, in order: each carries `size` bytes (a multiple of 8) of what follows the IP header, the last
/// one the rest. Their lengths, and the checksums of IPv4 headers, are right.
///
/// # Panics
///
/// When the frame is no IP packet, or `size` no multiple of 8.
#[must_use]
pub fn fragments(frame: &[u8], identification: u32, size: usize) -> Vec<Vec<u8>> {
    assert!(size > 0 && size.is_multiple_of(8), "{size} is no multiple of 8");
    let (ethernet, packet) = frame.split_at(ETHERNET);
    let is_ipv4 = packet[0] >> 4 == 4;
    let header_length = if is_ipv4 { usize::from(packet[0] & 0x0f) * 4 } else { 40 };
    let payload = &packet[header_length..];
    let fragment = |(index, piece): (usize, &[u8])| {
        let more = (index + 1) * size < payload.len();
        let offset = u16::try_from(index * size / 8).ok().and_then(|offset| offset.try_into().ok());
        let offset = offset.expect("an offset within a packet");
        let mut out = ethernet.to_vec();
        if is_ipv4 {
            let mut header = Ipv4Header::from_slice(packet).expect("an IPv4 header").0;
            header.identification = u16::try_from(identification).expect("IPv4 identifies packets by 16 bits");
            (header.dont_fragment, header.more_fragments, header.fragment_offset) = (false, more, offset);
            header.set_payload_len(piece.len()).expect("a piece of a packet");
            header.header_checksum = header.calc_header_checksum();
            header.write(&mut out).expect("memory");
        } else {
            let mut header = Ipv6Header::from_slice(packet).expect("an IPv6 header").0;
            let part = Ipv6FragmentHeader::new(header.next_header, offset, more, identification);
            header.next_header = IpNumber::IPV6_FRAGMENTATION_HEADER;
            header.set_payload_length(part.header_len() + piece.len()).expect("a piece of a packet");
            header.write(&mut out).expect("memory");
            part.write(&mut out).expect("memory");
        }
        out.extend_from_slice(piece);
        out
    };
    payload.chunks(size).enumerate().map(fragment).collect()
}

/// The frame with extension headers behind its IPv6 header: the protocol number and the length in bytes (a multiple of 8)
/// of each. Options are of a kind that whoever does not know it skips; routing headers have no segments left.
///
/// # Panics
///
/// When the frame is no IPv6 packet, or a length no multiple of 8.
#[must_use]
pub fn extended(frame: &[u8], extensions: &[(u8, usize)]) -> Vec<u8> {
    let (ethernet, packet) = frame.split_at(ETHERNET);
    let (mut header, payload) = Ipv6Header::from_slice(packet).expect("an IPv6 header");
    let transport = header.next_header.0;
    let mut extended = Vec::new();
    for (index, &(protocol, length)) in extensions.iter().enumerate() {
        assert!(length > 0 && length.is_multiple_of(8), "{length} is no multiple of 8");
        let next = extensions.get(index + 1).map_or(transport, |(protocol, _)| *protocol);
        extended.extend([next, u8::try_from(length / 8 - 1).expect("at most 2048 bytes")]);
        match protocol {
            // Type 0, no segments left.
            ROUTING => extended.extend(vec![0; length - 2]),
            _ => options(&mut extended, length - 2),
        }
    }
    header.next_header = extensions.first().map_or(transport, |(protocol, _)| *protocol).into();
    header.set_payload_length(extended.len() + payload.len()).expect("a packet");
    let mut out = ethernet.to_vec();
    header.write(&mut out).expect("memory");
    [out, extended, payload.to_vec()].concat()
}

/// Not padding, of which Linux takes at most 7 bytes.
fn options(out: &mut Vec<u8>, mut length: usize) {
    while length > 0 {
        let option = length.min(257);
        match option {
            1 => out.push(0),
            // A type for experiments (RFC 4727).
            _ => out
                .extend([0x1e, u8::try_from(option - 2).expect("at most 255")].into_iter().chain(vec![0; option - 2])),
        }
        length -= option;
    }
}
