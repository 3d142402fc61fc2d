//! Who takes an expert over that nobody alive holds: the same choice wherever it is made, without a message.

use expertmesh_model::expert::ExpertId;

use crate::slot::Slot;

/// The worker that takes over an expert of which no live copy is left, among those that are alive.
pub fn elected(expert: ExpertId, alive: impl Iterator<Item = Slot>) -> Option<Slot> {
    alive.max_by_key(|&slot| weight(slot, expert, u32::MAX))
}

/// Rendezvous hashing (Thaler and Ravishankar, 1998): the highest weight wins, and losing a slot moves only its own. Other salts make
/// other choices.
pub fn weight(slot: Slot, expert: ExpertId, salt: u32) -> u64 {
    let low = mix(u64::from(slot.0) << 32 | u64::from(expert.layer));
    mix(low ^ (u64::from(expert.expert) << 32 | u64::from(salt)))
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
