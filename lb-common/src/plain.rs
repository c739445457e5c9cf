//! Values as bytes.

/// A type without padding: all bytes of a value are its own. What `zerocopy::IntoBytes` says of types without parameters.
///
/// # Safety
/// There is no padding, and [`Plain::Bytes`] is an array of as many bytes as the type has.
pub unsafe trait Plain: Copy {
    /// The array of bytes.
    type Bytes;

    /// The bytes of a value, as they lie in memory.
    #[must_use]
    fn bytes(&self) -> Self::Bytes {
        const { assert!(size_of::<Self>() == size_of::<Self::Bytes>()) };
        // SAFETY: both have the same size, no byte is padding, and an array of bytes may hold anything.
        unsafe { core::mem::transmute_copy(self) }
    }
}

/// Says that a type has no padding; the sum of the sizes of its fields is checked by the one who writes it down.
macro_rules! plain {
    ($type:ty, $size:literal) => {
        const _: () = assert!(size_of::<$type>() == $size);
        // SAFETY: the fields of the type fill these bytes, as its definition shows.
        unsafe impl $crate::plain::Plain for $type {
            type Bytes = [u8; $size];
        }
    };
}

pub(crate) use plain;
