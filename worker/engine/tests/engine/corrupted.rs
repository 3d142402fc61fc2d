//! Models with random damage: the loader says what is wrong or computes something, and never panics.

use std::fs;

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::budget::Layout;
use expertmesh_model::numerics::Numerics;
use proptest::prelude::*;

use super::malformed::Copy;
use super::*;

const GOLDENS: [&str; 7] = ["v3", "v3-fp8", "v3-mtp", "v2-lite", "qwen3-moe", "mixtral", "olmoe"];

/// What happens to some bytes.
#[derive(Debug, Clone)]
pub(super) enum Damage {
    /// These places, as shares of the length in 2⁻³², get these bytes.
    Bytes(Vec<(u32, u8)>),
    /// The end is cut off from here.
    Cut(u32),
    /// A piece of this length occurs twice.
    Twice(u32, usize),
}

impl Damage {
    pub(super) fn inflict(&self, bytes: &mut Vec<u8>) {
        let place = |share: u32, length: usize| ((u64::from(share) * length as u64) >> 32) as usize;
        let length = bytes.len();
        match self {
            Self::Bytes(places) => places.iter().for_each(|&(at, byte)| bytes[place(at, length)] = byte),
            Self::Cut(at) => bytes.truncate(place(*at, length)),
            Self::Twice(at, piece) => {
                let at = place(*at, length);
                let piece = bytes[at..length.min(at + piece)].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
}

pub(super) fn damage() -> impl Strategy<Value = Damage> {
    // Digits and punctuation leave more of a JSON text intact than any byte does.
    let byte = prop_oneof![any::<u8>(), prop::sample::select(b"0123456789-.eE\"[]{},: nullF8_".to_vec())];
    prop_oneof![
        4 => prop::collection::vec((any::<u32>(), byte), 1..4).prop_map(Damage::Bytes),
        1 => any::<u32>().prop_map(Damage::Cut),
        1 => (any::<u32>(), 1usize..80).prop_map(|(at, piece)| Damage::Twice(at, piece)),
    ]
}

/// Everything that reads a model's directory.
fn read(model: &std::path::Path) -> Result<(), ModelError> {
    expertmesh_engine::fingerprint(model, WeightFormat::Int4, Numerics::Pair)?;
    let config = ModelConfig::read(model)?;
    let _ = (
        Layout::Cpu1.dense_bytes(&config, WeightFormat::Int4),
        Layout::Cpu1.expert_bytes(&config, WeightFormat::Fp8),
        Layout::Cpu1.kv_bytes(&config, 64),
        config.active_parameters(),
    );
    let backend = CpuBackend::load(model, &LoadOptions { threads: 1, ..LoadOptions::default() }, |_, _| ());
    Reference::open(model)?.forward(&[2, 1, 0])?;
    backend.map(drop)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(96) })]

    #[test]
    fn a_damaged_config_is_an_error_or_another_model(golden in prop::sample::select(&GOLDENS[..]), damage in damage()) {
        let copy = Copy::of(golden, "damaged-config");
        let path = copy.0.join("config.json");
        let mut bytes = fs::read(&path).unwrap();
        damage.inflict(&mut bytes);
        fs::write(&path, bytes).unwrap();
        if let Err(error) = read(&copy.0) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn a_damaged_header_is_an_error_or_another_model(golden in prop::sample::select(&GOLDENS[..]), damage in damage()) {
        let copy = Copy::of(golden, "damaged-header");
        let path = copy.0.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let header = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let data = bytes.split_off(header);
        damage.inflict(&mut bytes);
        bytes.extend(data);
        // Not over the file that may be mapped.
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        if let Err(error) = read(&copy.0) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
