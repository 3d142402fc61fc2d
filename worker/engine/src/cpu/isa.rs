//! Which instruction sets the processor has, and which of them the kernels use.

use std::fmt;
use std::str::FromStr;

/// A level of instruction sets; each includes those before it. All compute the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Plain Rust, as the compiler vectorises it for any processor.
    Portable,
    /// AVX2 with FMA: Haswell, Zen and later.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, VL, DQ, VBMI, BF16 and VNNI: Zen 4, Sapphire Rapids and later.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AMX tiles of bf16 and int8 besides: Sapphire Rapids and later.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Level {
    /// The levels that this build has kernels for, ascending.
    #[cfg(target_arch = "x86_64")]
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Amx];

    /// The levels that this build has kernels for, ascending.
    #[cfg(not(target_arch = "x86_64"))]
    pub const ALL: [Self; 1] = [Self::Portable];

    /// The level's name, as `--isa` and `inspect` spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Amx => "amx",
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An instruction set that this process may use: it exists only where detection said so, so that whoever has one may call
/// the kernels that are compiled for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(Level);

impl Isa {
    /// The best that this process may use. The first call asks the system for the tiles.
    pub fn detect() -> Self {
        static DETECTED: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
        Self(*DETECTED.get_or_init(detect))
    }

    /// The instruction set of a level; `None` where this process may not use it.
    pub fn new(level: Level) -> Option<Self> {
        (level <= Self::detect().0).then_some(Self(level))
    }

    /// Every instruction set that this process may use, ascending.
    pub fn available() -> impl Iterator<Item = Self> {
        Level::ALL.into_iter().filter_map(Self::new)
    }

    /// The level that this process may use.
    #[inline]
    pub fn level(self) -> Level {
        self.0
    }

    /// Whether the processor has the features of [`Level::Avx512`].
    #[inline]
    pub(crate) fn has_avx512(self) -> bool {
        match self.0 {
            Level::Portable => false,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => false,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Amx => true,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Isa {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let level = Level::ALL.into_iter().find(|level| level.name() == name);
        let level =
            level.ok_or_else(|| format!("{name} is none of {}", Level::ALL.map(Level::name).join(", ")))?;
        Self::new(level).ok_or_else(|| format!("this machine has no {name}; its best is {}", Self::detect()))
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Portable
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    use std::arch::is_x86_feature_detected as has;
    if !(has!("avx2") && has!("fma")) {
        return Level::Portable;
    }
    let avx512 = has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
    if !(avx512 && has!("avx512vbmi") && has!("avx512bf16") && has!("avx512vnni")) {
        return Level::Avx2;
    }
    if has_tiles() && tiles_permitted() { Level::Amx } else { Level::Avx512 }
}

/// AMX-TILE, AMX-BF16 and AMX-INT8 (Intel SDM volume 1, section 18): CPUID leaf 7, EDX bits 24, 22 and 25.
#[cfg(target_arch = "x86_64")]
fn has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const WANTED: u32 = 1 << 24 | 1 << 22 | 1 << 25;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & WANTED == WANTED
}

/// Linux hands the tiles' state (8 KiB a thread) out on request only; threads that start later inherit it.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn tiles_permitted() -> bool {
    const SYS_ARCH_PRCTL: u64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: this system call writes no memory of ours; the kernel preserves all but rax, rcx and r11.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL as i64 => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn tiles_permitted() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_that_this_machine_has_is_read_and_others_are_named() {
        for level in Level::ALL {
            let read: Result<Isa, String> = level.name().parse();
            match Isa::new(level) {
                Some(isa) => assert_eq!(read, Ok(isa)),
                None => {
                    let best = Isa::detect();
                    assert_eq!(read, Err(format!("this machine has no {level}; its best is {best}")));
                }
            }
        }
        let names = Level::ALL.map(Level::name).join(", ");
        assert_eq!("sse9".parse::<Isa>(), Err(format!("sse9 is none of {names}")));
    }

    #[test]
    fn all_levels_are_listed_ascending() {
        // A new level does not compile here before it has a place, and has none before it is listed.
        let place = |level: Level| match level {
            Level::Portable => 0,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => 1,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => 2,
            #[cfg(target_arch = "x86_64")]
            Level::Amx => 3,
        };
        assert!(Level::ALL.into_iter().map(place).eq(0..Level::ALL.len()));
        assert!(Level::ALL.is_sorted() && Isa::available().last() == Some(Isa::detect()));
    }
}
