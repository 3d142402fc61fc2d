//! The feed-forward part: SwiGLU (arXiv 2002.05202), and the mixture of experts (DeepSeekMoE, arXiv 2401.06066, section
//! 3, equations 9 to 11).

use super::weights::{Weights, add};
use crate::config::ModelConfig;
use crate::forward::group;
use crate::gate::{self, sigmoid};
use crate::names::{Names, SwiGluNames};
use crate::{EngineError, Routes};

/// down(silu(gate(x)) · up(x)): (rows, hidden) → (rows, hidden).
pub(super) fn swiglu(
    weights: &Weights,
    names: &SwiGluNames,
    x: &[f32],
    [inner, hidden]: [usize; 2],
) -> Result<Vec<f32>, EngineError> {
    let mut a = weights.linear(&names.gate, x, [inner, hidden])?; // (rows, inner)
    let b = weights.linear(&names.up, x, [inner, hidden])?; // (rows, inner)
    a.iter_mut().zip(b).for_each(|(a, b)| *a = *a * sigmoid(*a) * b);
    weights.linear(&names.down, &a, [hidden, inner]) // (rows, hidden)
}

/// shared(x) + Σ wₑ·expertₑ(x), e ascending: (rows, hidden) → (rows, hidden), and the gate's choice.
pub(super) fn mixture(
    weights: &Weights,
    config: &ModelConfig,
    layer: usize,
    x: &[f32],
) -> Result<(Vec<f32>, Routes), EngineError> {
    let (names, hidden) = (Names::new(config), config.hidden);
    let logits = weights.linear(&names.gate(layer), x, [config.gate.experts, hidden])?; // (rows, experts)
    let bias = match config.gate.bias {
        true => weights.vector(&names.gate_bias(layer), config.gate.experts)?, // (experts)
        false => Vec::new(),
    };
    let routes = gate::route(&config.gate, &logits, &bias); // (rows, top_k)
    let mut out = match config.shared_inner {
        0 => vec![0.0; x.len()],
        inner => swiglu(weights, &names.shared(layer), x, [inner, hidden])?, // (rows, hidden)
    };
    let grouped = group(&routes, |_| true);
    let mut places = grouped.at.iter(); // row · top_k + slot
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
    Ok((out, routes))
}
