//! Wire layouts, transcribed from the specifications; nothing here computes.
//!
//! Rules (checked by `cargo xtask tidy`): every struct is `repr(C)` with its layout asserted on the
//! next line; no Rust `enum`, `bool` or reference, because a peer can write any value.

/// Defines an open enum: a transparent integer with named values, for anything a peer sends.
///
/// Storing an unlisted value in a Rust `enum` is undefined behaviour; here it is kept and printed.
#[macro_export]
macro_rules! open_enum {
    ($(#[$meta:meta])* $vis:vis enum $name:ident: $int:ty {
        $($(#[$vmeta:meta])* $variant:ident = $value:expr,)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout)]
        #[repr(transparent)]
        $vis struct $name(pub $int);
        impl $name {
            $($(#[$vmeta])* pub const $variant: Self = Self($value);)*
        }
        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                $(if *self == Self::$variant {
                    return f.write_str(stringify!($variant));
                })*
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

/// Defines flag words of the wire: a transparent integer with named bits; unlisted bits are kept.
#[macro_export]
macro_rules! open_flags {
    ($(#[$meta:meta])* $vis:vis struct $name:ident: $int:ty {
        $($(#[$inner:ident $($args:tt)*])* const $flag:ident = $value:expr;)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        #[derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout)]
        #[repr(transparent)]
        $vis struct $name(pub $int);
        bitflags::bitflags! {
            impl $name: $int {
                $($(#[$inner $($args)*])* const $flag = $value;)*
                const _ = !0;
            }
        }
        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str(concat!(stringify!($name), "("))?;
                bitflags::parser::to_writer(self, &mut *f)?;
                f.write_str(")")
            }
        }
    };
}

/// Asserts at compile time the size of a layout and the offset of each named field.
#[macro_export]
macro_rules! assert_layout {
    ($ty:ty, size = $size:expr $(, $field:ident = $offset:expr)* $(,)?) => {
        const _: () = {
            assert!(core::mem::size_of::<$ty>() == $size);
            $(assert!(core::mem::offset_of!($ty, $field) == $offset);)*
        };
    };
}

pub mod virtio;

pub mod xen;
pub mod xen_io;
