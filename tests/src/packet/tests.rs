use std::net::SocketAddr;

use super::*;

const FAMILIES: [(&str, &str); 2] =
    [("10.244.1.10:40000", "10.96.0.10:80"), ("[fd00:10:244:1::10]:40000", "[fd00:10:96::10]:80")];

fn pairs() -> [(SocketAddr, SocketAddr); 2] {
    FAMILIES.map(|(from, to)| (from.parse().unwrap(), to.parse().unwrap()))
}

fn frames() -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for (from, to) in pairs() {
        for payload in [&b""[..], b"odd", b"even"] {
            frames.push(tcp(from, to, TcpFlags::SYN, payload));
            frames.push(tcp(from, to, TcpFlags::FIN_ACK, payload));
            frames.push(udp(from, to, payload));
            frames.push(echo_request(from.ip(), to.ip(), 7, 1, payload));
            frames.push(echo_reply(to.ip(), from.ip(), 7, 1, payload));
            let about = udp(to, from, payload);
            frames.extend(IcmpError::ALL.map(|error| icmp_error(from.ip(), to.ip(), error, &about)));
        }
    }
    frames
}

#[test]
fn built_packets_have_right_checksums() {
    for frame in frames() {
        verify_checksums(&frame).unwrap();
    }
}

#[test]
fn the_checksum_of_sctp_is_that_of_the_rfc() {
    // RFC 3720 appendix B.4 has examples of CRC32c: 32 bytes of zeroes.
    assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
}

#[test]
fn a_changed_byte_behind_the_ethernet_header_is_noticed() {
    for frame in frames() {
        // Beyond the addresses: changed lengths and versions are errors of another kind.
        for at in 26..frame.len() {
            let mut changed = frame.clone();
            changed[at] ^= 0x40;
            assert!(verify_checksums(&changed).is_err(), "byte {at} of {frame:02x?}");
        }
    }
}

#[test]
fn a_wrong_checksum_in_a_quoted_packet_is_noticed_although_the_outer_one_is_right() {
    for (from, to) in pairs() {
        let mut about = udp(to, from, b"payload");
        *about.last_mut().unwrap() ^= 1;
        let error = verify_checksums(&icmp_error(from.ip(), to.ip(), IcmpError::TimeExceeded, &about)).unwrap_err();
        assert_eq!(format!("{error:#}").split(" (").next(), Some("in the quoted packet: the UDP checksum is wrong"));
        // What is quoted in part cannot be checked but for the IPv4 header.
        about.pop();
        verify_checksums(&icmp_error(from.ip(), to.ip(), IcmpError::TimeExceeded, &about)).unwrap();
    }
}

#[test]
fn what_was_built_is_read_again() {
    for (from, to) in pairs() {
        let read_tcp = read(&tcp(from, to, TcpFlags::SYN_ACK, b"payload")).unwrap();
        assert_eq!((read_tcp.from, read_tcp.to, read_tcp.protocol, read_tcp.hops), (from, to, TCP, 64));
        assert_eq!(read_tcp.tcp_flags().unwrap(), TcpFlags::SYN_ACK);
        assert_eq!((read_tcp.payload().unwrap(), read_tcp.fragment), (&b"payload"[..], None));

        let about = udp(to, from, &[7; 4000]);
        for error in IcmpError::ALL {
            let frame = icmp_error(from.ip(), to.ip(), error, &about);
            assert_eq!(frame.len() - 14, if from.is_ipv4() { 576 } else { 1280 });
            let read = read(&frame).unwrap();
            let icmp = read.icmp().unwrap();
            assert_eq!((icmp.kind, icmp.code), error.kind_and_code(from.is_ipv4()));
            let mtu = if let IcmpError::TooBig { mtu } = error { mtu.into() } else { 0 };
            assert_eq!(u32::from_be_bytes(icmp.rest), mtu);
            let quoted = read.quoted().unwrap();
            assert_eq!((quoted.from, quoted.to, quoted.protocol), (to, from, UDP));
        }
    }
}

#[test]
fn fragments_put_together_are_the_packet() {
    for (from, to) in pairs() {
        let whole = udp(from, to, &(0..=255).cycle().take(3000).collect::<Vec<_>>());
        let fragments = fragments(&whole, 0x1234, 1280);
        assert_eq!(fragments.len(), 3);
        let mut transport = Vec::new();
        for (index, frame) in fragments.iter().enumerate() {
            verify_checksums(frame).unwrap();
            let read = read(frame).unwrap();
            let part = Fragment { identification: 0x1234, offset: index * 1280, more: index < 2 };
            assert_eq!((read.fragment, read.from.ip(), read.to.ip()), (Some(part), from.ip(), to.ip()));
            assert_eq!(read.from.port(), if index == 0 { 40_000 } else { 0 }, "only the first has ports");
            transport.extend(read.transport);
        }
        assert_eq!(transport, read(&whole).unwrap().transport);
    }
}

#[test]
fn extension_headers_are_skipped() {
    let [_, (from, to)] = pairs();
    let plain = udp(from, to, b"payload");
    for extensions in [
        &[(HOP_BY_HOP, 8)][..],
        &[(DESTINATION_OPTIONS, 1024)],
        &[(HOP_BY_HOP, 16), (ROUTING, 24), (DESTINATION_OPTIONS, 8)],
    ] {
        let frame = extended(&plain, extensions);
        let length: usize = extensions.iter().map(|(_, length)| length).sum();
        assert_eq!(frame.len(), plain.len() + length);
        verify_checksums(&frame).unwrap();
        assert_eq!(read(&frame).unwrap(), read(&plain).unwrap());
        let mut changed = frame;
        *changed.last_mut().unwrap() ^= 1;
        assert!(verify_checksums(&changed).is_err());
    }
}
