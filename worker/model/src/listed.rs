//! Enums that are listed: their `ALL` holds every variant, since both are made of one list.

/// Declares an enum with `ALL`, its variants in the order of their declaration.
macro_rules! listed {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$about:meta])* $variant:ident,)* }) => {
        $(#[$meta])*
        pub enum $name { $($(#[$about])* $variant,)* }

        impl $name {
            /// Every variant, in the order of their declaration.
            pub const ALL: [Self; [$(stringify!($variant)),*].len()] = [$(Self::$variant),*];
        }
    };
}
