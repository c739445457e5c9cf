//! Section 5: services without endpoints. How clients are told comes with the answers by ICMP and RST; that none is misled
//! is shown here.

use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::{EndpointSliceManifest, ServiceManifest, needs_root};

use crate::cluster::Cluster;

#[test]
fn a_service_without_endpoints_answers_nobody_until_the_first_one_is_ready_and_again_after_the_last() {
    needs_root!();
    const VIP: &str = "10.96.0.10:80";
    let cluster = Cluster::new();
    let both = ServiceManifest::new("default", "both").cluster_ip("10.96.0.10").port("tcp", Tcp, 80);
    cluster.apply(&both.port("udp", Udp, 80));
    let slice = EndpointSliceManifest::new("default", "both").port("tcp", Tcp, 8080).port("udp", Udp, 5353);
    for client in ["client1", "client2"] {
        cluster.nobody(client, VIP, Tcp);
        cluster.nobody(client, VIP, Udp);
    }
    cluster.apply(&slice.clone().pods([cluster.lab.pod("near1")]));
    for client in ["client1", "client2"] {
        cluster.tcp(client, VIP, &["near1"]);
        cluster.udp(client, VIP, &["near1"]);
    }
    cluster.apply(&slice);
    cluster.nobody("client1", VIP, Tcp);
    cluster.nobody("client1", VIP, Udp);
    cluster.delete(&slice);
    cluster.apply(&slice.pods([cluster.lab.pod("far1")]));
    cluster.tcp("client1", VIP, &["far1"]);
    cluster.udp("client1", VIP, &["far1"]);
}
