//! The gate: scores, a bias that balances the choice, the best groups first, the best experts of those.
//!
//! DeepSeek-V3 report (arXiv 2412.19437), section 2.1.2: sigmoid scores, correction bias, groups by the sum of their two
//! best experts. DeepSeek-V2 report (arXiv 2405.04434), section 2.2: softmax scores, groups by their best. The other
//! families are the softmax with one group.

mod margin;

use std::cmp::Ordering;

pub(crate) use margin::margins;

use crate::routes::Routes;
use expertmesh_model::config::parts::{GateConfig, GroupScore, Scores};

/// Routes rows by their logits (rows, experts). The bias (experts) counts in the choice, not in the weights; it is
/// empty where the gate has none. Equal scores: the lower expert.
pub(crate) fn route(gate: &GateConfig, logits: &[f32], bias: &[f32]) -> Routes {
    let rows = logits.len() / gate.experts;
    let mut routes = Routes {
        top_k: gate.top_k,
        experts: Vec::with_capacity(rows * gate.top_k),
        weights: Vec::with_capacity(rows * gate.top_k),
    };
    let mut scores = vec![0.0; gate.experts]; // (experts)
    let mut biased = Vec::with_capacity(gate.experts); // (experts)
    let (mut groups, mut order) = (Vec::new(), Vec::new());
    for logits in logits.chunks_exact(gate.experts) {
        score(gate.scores, logits, &mut scores);
        biased.clone_from(&scores);
        biased.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
        if gate.top_groups < gate.groups {
            keep_best_groups(gate, &mut biased, &mut groups, &mut order);
        }
        top(gate.top_k, &biased, &mut order); // (top_k)
        order.sort_unstable();
        let weights = order.iter().map(|&expert| scores[expert as usize]);
        let sum = if gate.normalised { weights.clone().sum::<f32>() + 1e-20 } else { 1.0 };
        routes.weights.extend(weights.map(|weight| weight / sum * gate.scale));
        routes.experts.extend(&order);
    }
    routes
}

pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + libm::expf(-x))
}

/// logits (experts) → scores (experts); sums ascend.
fn score(kind: Scores, logits: &[f32], scores: &mut [f32]) {
    match kind {
        Scores::Sigmoid => {
            scores.iter_mut().zip(logits).for_each(|(score, &logit)| *score = sigmoid(logit));
        }
        Scores::Softmax => {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            scores.iter_mut().zip(logits).for_each(|(score, logit)| *score = libm::expf(logit - max));
            let sum: f32 = scores.iter().sum();
            scores.iter_mut().for_each(|score| *score /= sum);
        }
    }
}

/// Leaves -∞ outside of the best groups. DeepSeek's own code masks with -∞ too; a mask of 0, as some versions of
/// transformers have it, lets experts of a dropped group in where too few of the kept ones have positive scores.
fn keep_best_groups(gate: &GateConfig, scores: &mut [f32], groups: &mut Vec<f32>, order: &mut Vec<u32>) {
    let size = gate.experts / gate.groups;
    groups.clear();
    groups.extend(scores.chunks_exact(size).map(|group| group_score(gate.group_score, group))); // (groups)
    top(gate.top_groups, groups, order); // (top_groups)
    for (group, scores) in (0..).zip(scores.chunks_exact_mut(size)) {
        if !order.contains(&group) {
            scores.fill(f32::NEG_INFINITY);
        }
    }
}

fn group_score(kind: GroupScore, group: &[f32]) -> f32 {
    let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &score in group {
        if score > best {
            (best, second) = (score, best);
        } else if score > second {
            second = score;
        }
    }
    match kind {
        GroupScore::SumOfBestTwo if group.len() > 1 => best + second,
        _ => best,
    }
}

/// Leaves the places of the `count` greatest scores in `order`, in no order. Equal scores: the lower place.
fn top(count: usize, scores: &[f32], order: &mut Vec<u32>) {
    order.clear();
    order.extend(0..scores.len() as u32);
    let greatest_first = |&a: &u32, &b: &u32| -> Ordering {
        scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b))
    };
    if count < order.len() {
        order.select_nth_unstable_by(count, greatest_first);
        order.truncate(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATE: GateConfig = GateConfig {
        experts: 8,
        top_k: 2,
        scores: Scores::Sigmoid,
        bias: true,
        groups: 4,
        top_groups: 2,
        group_score: GroupScore::SumOfBestTwo,
        normalised: true,
        scale: 1.0,
    };

    const SOFTMAX: GateConfig = GateConfig {
        scores: Scores::Softmax,
        bias: false,
        group_score: GroupScore::Best,
        normalised: false,
        ..GATE
    };

    #[test]
    fn equal_scores_go_to_the_lower_experts() {
        let routes = route(&GATE, &[0.0; 8], &[0.0; 8]);
        assert_eq!(routes.experts, [0, 1]);
        assert_eq!(routes.weights, [0.5, 0.5]);
    }

    #[test]
    fn an_expert_outside_of_the_best_groups_is_not_chosen() {
        // Expert 0 is the best alone; the groups of 2 and 3, and of 4 and 5, are better together.
        let logits = [3.0, -9.0, 2.0, 2.0, 2.0, 1.9, -9.0, -9.0];
        assert_eq!(route(&GATE, &logits, &[0.0; 8]).experts, [2, 3]);
        // Where a group is as good as its best expert, those of 0 and of 2 are kept.
        let one = GateConfig { top_k: 3, ..SOFTMAX };
        assert_eq!(route(&one, &logits, &[]).experts, [0, 2, 3]);
    }

    #[test]
    fn a_negative_score_in_a_kept_group_beats_all_of_a_dropped_group() {
        assert_eq!(route(&GATE, &[0.0; 8], &[-1.0; 8]).experts, [0, 1]);
    }

    #[test]
    fn a_score_of_zero_in_a_kept_group_beats_all_of_a_dropped_group() {
        // The softmax leaves nothing but the last expert.
        let logits = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 500.0];
        let gate = GateConfig { top_k: 4, top_groups: 2, ..SOFTMAX };
        assert_eq!(route(&gate, &logits, &[]).experts, [0, 1, 6, 7]);
    }

    #[test]
    fn the_bias_moves_the_choice_and_not_the_weights() {
        let bias = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -5.0, 6.0];
        let routes = route(&GATE, &[0.0; 8], &bias);
        assert_eq!(routes.experts, [0, 7]);
        assert_eq!(routes.weights, [0.5, 0.5]);
    }

    #[test]
    fn scores_without_normalisation_are_only_scaled() {
        let gate = GateConfig { normalised: false, scale: 2.0, ..GATE };
        assert_eq!(route(&gate, &[0.0; 8], &[0.0; 8]).weights, [1.0, 1.0]);
    }

    #[test]
    fn a_softmax_is_over_all_experts_and_normalised_over_the_chosen() {
        let logits: Vec<f32> =
            [1.0f32, 2.0, 1.0, 4.0, 0.0, 0.0, 0.0, 0.0].iter().map(|x| x.ln().max(-99.0)).collect();
        let plain = GateConfig { groups: 1, top_groups: 1, ..SOFTMAX };
        let close = |ours: Vec<f32>, theirs: [f32; 2]| {
            ours.iter().zip(theirs).for_each(|(ours, theirs)| assert!((ours - theirs).abs() < 1e-6));
        };
        let routes = route(&plain, &logits, &[]);
        assert_eq!(routes.experts, [1, 3]);
        close(routes.weights, [0.25, 0.5]);
        close(route(&GateConfig { normalised: true, ..plain }, &logits, &[]).weights, [1.0 / 3.0, 2.0 / 3.0]);
    }
}
