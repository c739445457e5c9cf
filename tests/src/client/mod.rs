//! Clients: single requests, long-lived connections, and bulk runs that count who answered.

mod bulk;
mod http;
mod sockets;

pub use self::bulk::{Tally, bulk_http, bulk_udp, udp_exchange};
pub use self::http::{HttpAnswer, HttpConnection, http_get};
pub use self::sockets::{Cable, do_not_fragment, path_mtu, tcp_from, udp_from};
