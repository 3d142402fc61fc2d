//! The fast path against the reference: how far rounding takes it, layer by layer and on tiny-r1's held-out text.
//! `--nocapture` prints what was measured.

use std::path::Path;

use expertmesh_engine::{Deviation, LayerDeviation, Tolerance, mean_divergence};
use expertmesh_model::format::WeightFormat;
use expertmesh_model::numerics::Numerics;
use safetensors::Dtype;

use super::malformed::Copy;
use super::*;

const CASES: [&str; 10] = [
    "golden/v3",
    "golden/v3-yarn",
    "golden/v3-fp8",
    "golden/v3-mtp",
    "golden/v2",
    "golden/v2-lite",
    "golden/qwen3-moe",
    "golden/mixtral",
    "golden/olmoe",
    TINY,
];

/// All layers of a text, measured; panics where one is not within the format's rounding.
fn layers_are_within(
    what: &str,
    backend: &CpuBackend,
    reference: &Reference,
    (ids, trace): &(Vec<u32>, Trace),
) {
    let tolerance = Tolerance::of(backend.options().weights, backend.config());
    let Deviation { layers, logits, divergence } =
        Deviation::measure(backend, reference, ids, trace).unwrap();
    let of = |error: fn(&LayerDeviation) -> f64| layers.iter().map(error).fold(0.0, f64::max);
    let (hidden, gate) = (of(|layer| layer.hidden), of(|layer| layer.gate));
    let (routed, rerouted): (usize, usize) =
        layers.iter().fold((0, 0), |(all, some), layer| (all + layer.routed, some + layer.rerouted.len()));
    let margin =
        layers.iter().flat_map(|layer| &layer.rerouted).map(|(_, margin)| *margin).fold(0.0, f32::max);
    println!(
        "{what:<28} layers {hidden:.1e}, gates {gate:.1e}, {rerouted}/{routed} rerouted, margins to {margin:.4}; logits {logits:.1e}, KL {divergence:.1e}",
    );
    for (index, layer) in layers.iter().enumerate() {
        assert!(layer.is_within(&tolerance), "{what}: layer {index}: {layer:?} is not within {tolerance:?}");
    }
    assert!(divergence <= tolerance.untrained, "{what}: {divergence}");
}

#[test]
fn each_layer_is_the_references_but_for_rounding_and_other_experts_are_chosen_only_where_it_was_unsure() {
    for folder in CASES {
        let (reference, ids) = (Reference::open(&model(folder)).unwrap(), golden(folder).1);
        let text = (ids.clone(), reference.forward(&ids).unwrap());
        for weights in WeightFormat::ALL {
            for numerics in Numerics::ALL {
                let backend = load_as(folder, &LoadOptions { weights, numerics, ..LoadOptions::default() });
                layers_are_within(&format!("{folder} {weights} {numerics}"), &backend, &reference, &text);
            }
        }
    }
}

#[test]
fn held_out_text_takes_the_references_experts_except_where_it_was_unsure() {
    let reference = Reference::open(&model(TINY)).unwrap();
    for numerics in Numerics::ALL {
        let backend = load_as(TINY, &LoadOptions { numerics, ..LoadOptions::default() });
        for (index, text) in held_out().iter().enumerate().step_by(4) {
            layers_are_within(&format!("held out {index} bf16 {numerics}"), &backend, &reference, text);
        }
    }
}

/// Predicts every token of the held-out conversations; panics where the mean divergence is not within the format's bound.
fn predictions_are_within(folder: &Path, weights: WeightFormat, texts: &[(Vec<u32>, Trace)]) {
    for numerics in Numerics::ALL {
        let options = LoadOptions { weights, numerics, ..LoadOptions::default() };
        let backend = load_from(folder, &options);
        let (vocabulary, tolerance) = (backend.config().vocabulary, Tolerance::of(weights, backend.config()));
        let (mut sum, mut tokens) = (0.0, 0);
        for (ids, trace) in texts {
            let mut kv = backend.allocate_kv(BlockAllocator::needed(ids.len())).unwrap();
            let logits = compute(&backend, &every_row(ids, &blocks(ids.len())), &mut kv).logits;
            sum += mean_divergence(&trace.logits, &logits, vocabulary) * ids.len() as f64;
            tokens += ids.len();
        }
        let divergence = sum / tokens as f64;
        println!("held out {weights} {numerics}: mean KL {divergence:.2e} over {tokens} tokens");
        assert!(divergence <= tolerance.divergence, "{weights} {numerics}: {divergence}");
    }
}

#[test]
fn held_out_text_is_predicted_as_by_the_reference_in_every_format() {
    for weights in [WeightFormat::Bf16, WeightFormat::Fp8, WeightFormat::Int8, WeightFormat::Int4] {
        predictions_are_within(&model(TINY), weights, held_out());
    }
}

#[test]
fn held_out_text_is_predicted_as_by_the_reference_on_the_same_fp8_numbers() {
    let copy = quantised("fast-fp8");
    let reference = Reference::open(&copy.0).unwrap();
    let texts: Vec<(Vec<u32>, Trace)> =
        held_out().iter().map(|(ids, _)| (ids.clone(), reference.forward(ids).unwrap())).collect();
    predictions_are_within(&copy.0, WeightFormat::Native, &texts);
    let backend = load_from(&copy.0, &LoadOptions::default());
    for (index, text) in texts.iter().enumerate().step_by(8) {
        layers_are_within(&format!("held out {index} fp8"), &backend, &reference, text);
    }
}

/// tiny-r1 in DeepSeek-V3's fp8, as tests/golden/make.py's `quantise_fp8` does it.
fn quantised(test: &str) -> Copy {
    let copy = Copy::of("../models/tiny-r1", test);
    let mut tensors = Vec::new();
    for (name, dtype, shape, bytes) in copy.tensors() {
        let kept = ["embed", "lm_head", "mlp.gate.weight", "norm"].iter().any(|part| name.contains(part));
        let &[rows, columns] = shape.as_slice() else {
            tensors.push((name, dtype, shape, bytes));
            continue;
        };
        if kept {
            tensors.push((name, dtype, shape, bytes));
            continue;
        }
        assert_eq!(dtype, Dtype::BF16, "{name}");
        let value = |at: usize| {
            f32::from_bits(u32::from(u16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]])) << 16)
        };
        let blocks = [rows.div_ceil(128), columns.div_ceil(128)];
        let block = |at: usize| at / columns / 128 * blocks[1] + at % columns / 128;
        let mut scales = vec![0.0f32; blocks[0] * blocks[1]];
        (0..rows * columns).for_each(|at| scales[block(at)] = scales[block(at)].max(value(at).abs()));
        scales.iter_mut().for_each(|scale| *scale /= 448.0);
        let codes = (0..rows * columns).map(|at| e4m3(value(at) / scales[block(at)])).collect();
        tensors.push((
            format!("{name}_scale_inv"),
            Dtype::F32,
            blocks.to_vec(),
            scales.iter().flat_map(|s| s.to_le_bytes()).collect(),
        ));
        tensors.push((name, Dtype::F8_E4M3, shape, codes));
    }
    copy.write("model.safetensors", &tensors);
    let config = std::fs::read_to_string(copy.0.join("config.json")).unwrap();
    let fp8 = "{\"quantization_config\": {\"quant_method\": \"fp8\", \"fmt\": \"e4m3\", \"activation_scheme\": \"dynamic\", \"weight_block_size\": [128, 128]},";
    std::fs::write(copy.0.join("config.json"), config.replacen('{', fp8, 1)).unwrap();
    copy
}

/// The nearest of the magnitudes of e4m3, ties to the even code.
fn e4m3(value: f32) -> u8 {
    static MAGNITUDES: OnceLock<Vec<f32>> = OnceLock::new();
    let magnitudes = MAGNITUDES.get_or_init(|| {
        let magnitude = |code: i32| match (code / 8, (code % 8) as f32) {
            (0, fraction) => fraction * 2f32.powi(-9),
            (exponent, fraction) => (8.0 + fraction) * 2f32.powi(exponent - 10),
        };
        (0..0x7f).map(magnitude).collect()
    });
    let above = magnitudes.partition_point(|&magnitude| magnitude < value.abs()).min(0x7e);
    let below = above.saturating_sub(1);
    let [to_below, to_above] = [below, above].map(|code| (value.abs() - magnitudes[code]).abs());
    let to_even = to_below == to_above && below % 2 == 0;
    let nearest = if to_below < to_above || to_even { below } else { above };
    nearest as u8 | if value.is_sign_negative() { 0x80 } else { 0 }
}
