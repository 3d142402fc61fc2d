//! The gate: sigmoid scores, a bias that balances the choice, and the best groups first (DeepSeek-V3 report,
//! section 2.1.2, "Node-Limited Routing" included).

use crate::Routes;
use crate::config::GateConfig;

/// Experts of a group whose scores make the group's.
const GROUP_TOP: usize = 2;

/// Routes rows by their logits (rows, experts). The bias (experts) counts in the choice, not in the weights.
/// Equal scores: the lower expert.
pub(crate) fn route(gate: &GateConfig, logits: &[f32], bias: &[f32]) -> Routes {
    let rows = logits.len() / gate.experts;
    let mut routes = Routes {
        top_k: gate.top_k,
        experts: Vec::with_capacity(rows * gate.top_k),
        weights: Vec::with_capacity(rows * gate.top_k),
    };
    for logits in logits.chunks_exact(gate.experts) {
        let scores: Vec<f32> = logits.iter().map(|&logit| sigmoid(logit)).collect(); // (experts)
        let biased: Vec<f32> = scores.iter().zip(bias).map(|(score, bias)| score + bias).collect(); // (experts)
        let mut experts = top(gate.top_k, &within_best_groups(gate, biased)); // (top_k)
        experts.sort_unstable();
        let weights = experts.iter().map(|&expert| scores[expert]);
        let sum = if gate.normalised { weights.clone().sum::<f32>() + 1e-20 } else { 1.0 };
        routes.weights.extend(weights.map(|weight| weight / sum * gate.scale));
        routes.experts.extend(experts.iter().map(|&expert| expert as u32));
    }
    routes
}

pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + libm::expf(-x))
}

/// The scores (experts), -∞ outside of the groups whose two best experts have the greatest sums. DeepSeek's own code
/// masks with -∞ too; a mask of 0, as some versions of transformers have it, lets experts of a dropped group in where
/// too few of the kept ones have positive scores.
fn within_best_groups(gate: &GateConfig, mut scores: Vec<f32>) -> Vec<f32> {
    let size = gate.experts / gate.groups;
    let sum_of_best = |group: &[f32]| top(GROUP_TOP.min(size), group).iter().map(|&i| group[i]).sum();
    let groups: Vec<f32> = scores.chunks_exact(size).map(sum_of_best).collect(); // (groups)
    let kept = top(gate.top_groups, &groups);
    for (group, scores) in scores.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&group) {
            scores.fill(f32::NEG_INFINITY);
        }
    }
    scores
}

/// The places of the `count` greatest scores, the greatest first. Equal scores: the lower place.
fn top(count: usize, scores: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let greatest_first = |&a: &usize, &b: &usize| scores[b].total_cmp(&scores[a]).then(a.cmp(&b));
    if count < order.len() {
        order.select_nth_unstable_by(count, greatest_first);
        order.truncate(count);
    }
    order.sort_unstable_by(greatest_first);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATE: GateConfig =
        GateConfig { experts: 8, top_k: 2, groups: 4, top_groups: 2, normalised: true, scale: 1.0 };

    #[test]
    fn equal_scores_go_to_the_lower_experts() {
        let routes = route(&GATE, &[0.0; 8], &[0.0; 8]);
        assert_eq!(routes.experts, [0, 1]);
        assert_eq!(routes.weights, [0.5, 0.5]);
    }

    #[test]
    fn an_expert_outside_of_the_best_groups_is_not_chosen() {
        // Expert 0 is the best alone; the groups of 2 and 3, and of 4 and 5, are better together.
        let routes = route(&GATE, &[3.0, -9.0, 2.0, 2.0, 2.0, 1.9, -9.0, -9.0], &[0.0; 8]);
        assert_eq!(routes.experts, [2, 3]);
    }

    #[test]
    fn a_negative_score_in_a_kept_group_beats_all_of_a_dropped_group() {
        assert_eq!(route(&GATE, &[0.0; 8], &[-1.0; 8]).experts, [0, 1]);
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
}
