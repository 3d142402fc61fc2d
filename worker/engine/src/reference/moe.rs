//! The feed-forward part: SwiGLU (arXiv 2002.05202), and the mixture of experts (DeepSeekMoE, arXiv 2401.06066, section
//! 3, equations 9 to 11).

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::names::{Names, SwiGluNames};

use super::weights::{Weights, add, dot};
use crate::gate::margin::margins as margins_of;
use crate::gate::route;
use crate::gate::score::sigmoid;
use crate::routes::{Routes, group};

/// down(silu(gate(x)) · up(x)): (rows, hidden) → (rows, hidden).
pub(super) fn swiglu(
    weights: &Weights,
    names: &SwiGluNames,
    x: &[f32],
    [inner, hidden]: [usize; 2],
) -> Result<Vec<f32>, ModelError> {
    let mut a = weights.linear(&names.gate, x, [inner, hidden])?; // (rows, inner)
    let b = weights.linear(&names.up, x, [inner, hidden])?; // (rows, inner)
    a.iter_mut().zip(b).for_each(|(a, b)| *a = *a * sigmoid(*a) * b);
    weights.linear(&names.down, &a, [hidden, inner]) // (rows, hidden)
}

/// The gate's choice for rows (rows, hidden).
pub(super) fn choose(
    weights: &Weights,
    config: &ModelConfig,
    layer: usize,
    x: &[f32],
) -> Result<Routes, ModelError> {
    let (logits, bias) = gate_logits(weights, config, layer, x)?;
    Ok(route(&config.gate, &logits, &bias)) // (rows, top_k)
}

/// Of each row how sure that choice is: (rows), as [`Gated::margins`](super::forward::Gated) has it.
pub(super) fn margins(
    weights: &Weights,
    config: &ModelConfig,
    layer: usize,
    x: &[f32],
) -> Result<Vec<f32>, ModelError> {
    let (experts, hidden) = (config.gate.experts, config.hidden);
    let (logits, bias) = gate_logits(weights, config, layer, x)?;
    let sizes = weights.sizes(&Names::new(config).gate(layer), [experts, hidden])?; // (experts)
    let of_row = |(x, logits): (&[f32], &[f32])| {
        let typical = (dot(x, x) / hidden as f32).sqrt();
        let sizes: Vec<f32> = sizes.iter().map(|size| size * typical).collect(); // (experts)
        margins_of(&config.gate, logits, &bias, &sizes)[0]
    };
    Ok(x.chunks_exact(hidden).zip(logits.chunks_exact(experts)).map(of_row).collect())
}

/// The gate's logits of rows (rows, hidden): (rows, experts); and its bias: (experts), or empty.
fn gate_logits(
    weights: &Weights,
    config: &ModelConfig,
    layer: usize,
    x: &[f32],
) -> Result<(Vec<f32>, Vec<f32>), ModelError> {
    let (names, experts) = (Names::new(config), config.gate.experts);
    let logits = weights.linear(&names.gate(layer), x, [experts, config.hidden])?;
    let bias = match config.gate.bias {
        true => weights.vector(&names.gate_bias(layer), experts)?,
        false => Vec::new(),
    };
    Ok((logits, bias))
}

/// shared(x) + Σ wₑ·expertₑ(x), e ascending: (rows, hidden) → (rows, hidden).
pub(super) fn mixture(
    weights: &Weights,
    config: &ModelConfig,
    layer: usize,
    x: &[f32],
    routes: &Routes,
) -> Result<Vec<f32>, ModelError> {
    let (names, hidden) = (Names::new(config), config.hidden);
    let mut out = match config.shared_inner {
        0 => vec![0.0; x.len()],
        inner => swiglu(weights, &names.shared(layer), x, [inner, hidden])?, // (rows, hidden)
    };
    let grouped = group(routes.pairs(), |_| true);
    let mut places = grouped.at.iter(); // row · top_k + choice
    for group in &grouped.groups {
        let rows = group.rows.iter().flat_map(|&row| &x[row as usize * hidden..][..hidden]);
        let rows: Vec<f32> = rows.copied().collect(); // (rows of the expert, hidden)
        let answers =
            swiglu(weights, &names.expert(layer, group.expert), &rows, [config.expert_inner, hidden])?;
        for ((&row, answer), &place) in group.rows.iter().zip(answers.chunks_exact(hidden)).zip(&mut places) {
            let weighted: Vec<f32> = answer.iter().map(|y| routes.weights[place as usize] * y).collect(); // (hidden)
            add(&mut out[row as usize * hidden..][..hidden], &weighted);
        }
    }
    Ok(out)
}
