//! Which instruction sets the processor has, and which of them the kernels use.

use std::fmt;
use std::str::FromStr;

/// A level of instruction sets; each includes those before it. All compute the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, as the compiler vectorises it for any processor.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, VL, DQ, VBMI, BF16 and VNNI: Zen 4, Sapphire Rapids and later.
    Avx512,
    /// AMX tiles of bf16 and int8 besides: Sapphire Rapids and later.
    Amx,
}

impl Isa {
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Amx];

    /// The best that this process may use. The first call asks the kernel for the tiles.
    pub fn detect() -> Self {
        static DETECTED: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
        *DETECTED.get_or_init(detect)
    }

    /// Whether this process may use it.
    pub fn is_available(self) -> bool {
        self <= Self::detect()
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let isa = Self::ALL.into_iter().find(|isa| isa.name() == name);
        let isa = isa.ok_or_else(|| format!("{name} is none of portable, avx2, avx512, amx"))?;
        if isa.is_available() {
            Ok(isa)
        } else {
            Err(format!("this machine has no {name}; its best is {}", Self::detect()))
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    use std::arch::is_x86_feature_detected as has;
    if !(has!("avx2") && has!("fma")) {
        return Isa::Portable;
    }
    let avx512 = has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
    if !(avx512 && has!("avx512vbmi") && has!("avx512bf16") && has!("avx512vnni")) {
        return Isa::Avx2;
    }
    if has_tiles() && tiles_permitted() { Isa::Amx } else { Isa::Avx512 }
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
        for isa in Isa::ALL {
            let read: Result<Isa, String> = isa.name().parse();
            if isa.is_available() {
                assert_eq!(read, Ok(isa));
            } else {
                let best = Isa::detect();
                assert_eq!(read, Err(format!("this machine has no {isa}; its best is {best}")));
            }
        }
        assert_eq!("sse9".parse::<Isa>(), Err("sse9 is none of portable, avx2, avx512, amx".to_owned()));
    }
}
