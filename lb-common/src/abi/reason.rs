//! Why packets were not served.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $index:literal, $name:literal, $drops:literal;)+) => {
        /// Why a packet was dropped, or passed without a look at the services. Index into `REASONS`.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            $($(#[doc = $doc])+ $variant = $index,)+
        }

        impl Reason {
            /// All of them, in the order of their indices.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The word that people and metrics see.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// The one with this index; of indices that there are not, any.
            #[must_use]
            pub const fn numbered(index: u32) -> Self {
                match index {
                    $($index => Self::$variant,)+
                    _ => Self::Malformed,
                }
            }

            /// Whether the packet was dropped; it was passed on untouched otherwise.
            #[must_use]
            pub const fn drops(self) -> bool {
                match self {
                    $(Self::$variant => $drops,)+
                }
            }
        }
    };
}

reasons! {
    /// The service port has no backend that this node may use, though there are some elsewhere: Kubernetes wants silence.
    NoBackend = 0, "no-backend", true;
    /// The service port has no backend anywhere, or the port is served by nobody: the sender was told by a TCP RST or an
    /// ICMP error.
    Refused = 1, "refused", true;
    /// The sender would have been told, but too many were in this moment.
    RefusalLimit = 2, "refusal-limit", true;
    /// Each backend and port tried already answers another flow of this client.
    ReplyTaken = 3, "reply-taken", true;
    /// The kernel refused to add a flow entry.
    FlowTable = 4, "flow-table", true;
    /// The kernel refused to change the packet.
    Rewrite = 5, "rewrite", true;
    /// A slot named no backend: the maps contradict each other.
    BadSlot = 6, "bad-slot", true;
    /// An IP header that is none, or a transport header that ends before it should. Passed on: it is for no service.
    Malformed = 7, "malformed", false;
    /// A fragment for a virtual address that came without the first one of its packet, which has the ports.
    Fragment = 8, "fragment", true;
    /// Source and destination are one virtual address (the "LAND" attack).
    Land = 9, "land", true;
    /// The source is a cluster IP: no machine has it, so nobody may send from it.
    VipSource = 10, "vip-source", true;
    /// More IPv6 extension headers than any honest sender uses. Passed on.
    ExtensionHeaders = 11, "extension-headers", false;
    /// The answer of a backend to a SYN that another backend has answered before: the client must not see both.
    LateAnswer = 12, "late-answer", true;
    /// A router or a host says that the backend of a half-open connection cannot be reached, and there are others. The client's next
    /// SYN goes to one of them.
    Unreachable = 13, "unreachable", true;
    /// The service port has used up its flows of this second.
    Budget = 14, "budget", true;
    /// A pod's RST to a backend's reply that reached it untranslated, since the flow was lost: the flow is back, and the
    /// backend sends again.
    Restored = 15, "restored", true;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_numbered_without_gaps() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }
}
