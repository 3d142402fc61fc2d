//! The gate: scores, a bias that balances the choice, the best groups first, the best experts of those.
//!
//! DeepSeek-V3 report (arXiv 2412.19437), section 2.1.2: sigmoid scores, correction bias, groups by the sum of their two
//! best experts. DeepSeek-V2 report (arXiv 2405.04434), section 2.2: softmax scores, groups by their best. The other
//! families are the softmax with one group.

pub(crate) mod margin;
pub(crate) mod score;

use expertmesh_model::config::parts::GateConfig;

use self::score::{keep_best_groups, score, top};
use crate::routes::Routes;

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

#[cfg(test)]
mod tests {
    use expertmesh_model::config::parts::{GroupScore, Scores};

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
