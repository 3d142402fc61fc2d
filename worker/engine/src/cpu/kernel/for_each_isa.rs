//! Loops in plain Rust, compiled once for each instruction set.

/// Compiles functions in plain Rust once more for AVX2 and for AVX-512, and calls what the instruction set allows, which
/// becomes the first parameter. Rust never fuses or reorders, so that all have the same bits.
macro_rules! for_each_isa {
    ($($(#[$doc:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block)*) => { $(
        $(#[$doc])*
        #[inline]
        $visibility fn $name(isa: $crate::cpu::isa::Isa, $($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn plain($($argument: $type),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($argument: $type),*) $(-> $result)? {
                plain($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
            fn avx512($($argument: $type),*) $(-> $result)? {
                plain($($argument),*)
            }
            match isa.level() {
                // SAFETY: an `Isa` is there only where the processor has its features; those of AVX-512 are among AMX's.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::isa::Level::Amx | $crate::cpu::isa::Level::Avx512 => unsafe { avx512($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::isa::Level::Avx2 => unsafe { avx2($($argument),*) },
                $crate::cpu::isa::Level::Portable => plain($($argument),*),
            }
        }
    )* };
}
pub(crate) use for_each_isa;
