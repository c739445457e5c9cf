//! Makes a failing sequence smaller: first fewer operations, then plainer packets and services.

use super::check::{Check, Difference};
use super::operation::{Operation, Send};
use super::packet::{Kind, Lie, Packet};
use super::services::ServicePort;

/// The smallest sequence found that fails in the same way, and its difference. `None`: it does not fail when it is run again.
pub fn shrink(check: &mut Check, operations: &[Operation]) -> Option<(Vec<Operation>, Difference)> {
    let (last, mut difference) = check.replay(operations)?;
    let mut shrinker = Shrinker { check, what: difference.what, operations: operations[..=last].to_vec() };
    loop {
        let before = shrinker.operations.clone();
        shrinker.remove();
        shrinker.simplify();
        if shrinker.operations == before {
            break;
        }
    }
    let operations = shrinker.operations;
    if let Some((_, again)) = check.replay(&operations) {
        difference = again;
    }
    Some((operations, difference))
}

struct Shrinker<'a> {
    check: &'a mut Check,
    what: &'static str,
    operations: Vec<Operation>,
}

impl Shrinker<'_> {
    /// Whether a sequence fails in the same way; it is kept then, up to where it fails.
    fn try_out(&mut self, operations: Vec<Operation>) -> bool {
        match self.check.replay(&operations) {
            Some((last, difference)) if difference.what == self.what => {
                self.operations = operations;
                self.operations.truncate(last + 1);
                true
            }
            _ => false,
        }
    }

    /// Leaves out parts, half of the sequence first, single operations at last (delta debugging).
    fn remove(&mut self) {
        let mut size = self.operations.len().div_ceil(2);
        while size > 0 {
            let mut at = 0;
            while at < self.operations.len() {
                let mut fewer = self.operations.clone();
                fewer.drain(at..(at + size).min(fewer.len()));
                if !self.try_out(fewer) {
                    at += size;
                }
            }
            size = if size == 1 { 0 } else { size.div_ceil(2) };
        }
    }

    /// Tries plainer operations one by one.
    fn simplify(&mut self) {
        let mut at = 0;
        while at < self.operations.len() {
            for plainer in plainer(&self.operations[at]) {
                let mut operations = self.operations.clone();
                if at >= operations.len() || operations[at] == plainer {
                    continue;
                }
                operations[at] = plainer;
                self.try_out(operations);
            }
            at += 1;
        }
    }
}

/// Operations that say less than this one.
fn plainer(operation: &Operation) -> Vec<Operation> {
    match operation {
        Operation::Send(send) => plainer_sends(send).into_iter().map(Operation::Send).collect(),
        Operation::Serve(id, port) => {
            plainer_services(port).into_iter().map(|port| Operation::Serve(*id, port)).collect()
        }
        Operation::Load(..) | Operation::Wait(_) | Operation::Evict(_) | Operation::Collect => Vec::new(),
    }
}

fn plainer_sends(send: &Send) -> Vec<Send> {
    let mut all = vec![
        Send { summed: false, ..send.clone() },
        Send { own: false, ..send.clone() },
        Send { mark: 0, ..send.clone() },
    ];
    all.extend(plainer_packets(&send.packet).into_iter().map(|packet| Send { packet, ..send.clone() }));
    all
}

fn plainer_packets(packet: &Packet) -> Vec<Packet> {
    let with = |change: &dyn Fn(&mut Packet)| {
        let mut packet = packet.clone();
        change(&mut packet);
        packet
    };
    let mut all = vec![
        with(&|packet| packet.lies.clear()),
        with(&|packet| packet.options.clear()),
        with(&|packet| packet.options.truncate(1)),
        with(&|packet| packet.fragment = None),
        with(&|packet| packet.payload = 0),
        with(&|packet| packet.payload = 2),
        with(&|packet| packet.salt = 0),
        with(&|packet| packet.sequence = None),
        with(&|packet| packet.acknowledges = None),
    ];
    for lie in 0..packet.lies.len() {
        all.push(with(&|packet| drop(packet.lies.remove(lie))));
        if let Lie::Bytes(at, bytes) = &packet.lies[lie] {
            for bytes in [&bytes[..bytes.len() / 2], &bytes[..1.min(bytes.len())], &bytes[..2.min(bytes.len())]] {
                all.push(with(&|packet| packet.lies[lie] = Lie::Bytes(*at, bytes.to_vec())));
            }
        }
    }
    if let Kind::Error { kind, code, about, quoted } = &packet.kind {
        for about in plainer_packets(about) {
            let kind = Kind::Error { kind: *kind, code: *code, about: Box::new(about), quoted: *quoted };
            all.push(with(&|packet| packet.kind = kind.clone()));
        }
    }
    all
}

fn plainer_services(port: &ServicePort) -> Vec<ServicePort> {
    let mut all = vec![
        ServicePort { affinity: 0, ..port.clone() },
        ServicePort { draining: [].into(), ..port.clone() },
        ServicePort { drop_when_empty: false, ..port.clone() },
        ServicePort { is_broken: false, ..port.clone() },
        ServicePort { no_passive_health: false, ..port.clone() },
    ];
    for frontend in &port.frontends {
        let frontends = port.frontends.iter().copied().filter(|other| other != frontend).collect();
        all.push(ServicePort { frontends, ..port.clone() });
    }
    for backend in &port.backends {
        let backends = port.backends.iter().copied().filter(|other| other != backend).collect();
        all.push(ServicePort { backends, ..port.clone() });
    }
    all
}
