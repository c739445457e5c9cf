//! Clients: single requests, long-lived connections, and bulk runs that count who answered.

mod bulk;
mod http;

pub use self::bulk::{Tally, bulk_http, bulk_udp, udp_exchange};
pub use self::http::{HttpAnswer, HttpConnection, http_get};
