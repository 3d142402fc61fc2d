//! How sure a gate's choice is: how far its logits may be off before it chooses other experts.

use expertmesh_model::config::parts::{GateConfig, Scores};

use super::score::{group_score, keep_best_groups, score, sigmoid, top};

/// Margins beyond this are not told apart.
const MOST: f32 = 64.0;

/// Halvings that find a margin, from [`MOST`] down.
const HALVINGS: usize = 32;

/// Of each row of `logits` (rows, experts) the greatest r for which no logits that are within r · `sizes[e]` of these
/// make [`route`](super::route) choose other experts: (rows). `sizes` is (experts).
pub(crate) fn margins(gate: &GateConfig, logits: &[f32], bias: &[f32], sizes: &[f32]) -> Vec<f32> {
    let rows = logits.chunks_exact(gate.experts);
    rows.map(|logits| {
        let choice = Choice::of(gate, logits, bias);
        let certain = |r: f32| choice.is_certain(gate, |at| ordered(gate, logits, bias, sizes, at * r));
        let (mut low, mut high) = (0.0, MOST);
        for _ in 0..HALVINGS {
            let middle = (low + high) / 2.0;
            *if certain(middle) { &mut low } else { &mut high } = middle;
        }
        low
    })
    .collect()
}

/// Numbers in the order of the scores that decide, of logits that are all `r` · size more. A softmax has its logits'
/// order, also where one of them changes all its scores; those gates have no bias, and groups as good as their best.
fn ordered(gate: &GateConfig, logits: &[f32], bias: &[f32], sizes: &[f32], r: f32) -> Vec<f32> {
    let moved = logits.iter().zip(sizes).map(|(logit, size)| logit + r * size);
    let mut ordered: Vec<f32> = match gate.scores {
        Scores::Sigmoid => moved.map(sigmoid).collect(),
        Scores::Softmax => moved.collect(),
    };
    ordered.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
    ordered
}

/// What a row's logits lead to: per expert whether its group is kept, and whether it is chosen.
struct Choice {
    kept: Vec<bool>,
    chosen: Vec<bool>,
}

impl Choice {
    fn of(gate: &GateConfig, logits: &[f32], bias: &[f32]) -> Self {
        let (mut biased, mut groups, mut order) = (vec![0.0; gate.experts], Vec::new(), Vec::new());
        score(gate.scores, logits, &mut biased);
        biased.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
        if gate.top_groups < gate.groups {
            keep_best_groups(gate, &mut biased, &mut groups, &mut order);
        }
        let kept = biased.iter().map(|&score| score != f32::NEG_INFINITY).collect();
        top(gate.top_k, &biased, &mut order);
        let mut chosen = vec![false; gate.experts];
        order.iter().for_each(|&expert| chosen[expert as usize] = true);
        Self { kept, chosen }
    }

    /// Whether what is in stays in where it gets the least, at −1, and what is out gets the most, at 1.
    fn is_certain(&self, gate: &GateConfig, scores: impl Fn(f32) -> Vec<f32>) -> bool {
        let (least, most) = (scores(-1.0), scores(1.0));
        let experts = |inside: bool| {
            (0..gate.experts).filter(move |&expert| self.kept[expert] && self.chosen[expert] == inside)
        };
        let size = gate.experts / gate.groups;
        let group = |scores: &[f32], group: usize| {
            group_score(gate.group_score, &scores[group * size..(group + 1) * size])
        };
        let groups = |inside: bool| (0..gate.groups).filter(move |&group| self.kept[group * size] == inside);
        let lowest = |scores: &mut dyn Iterator<Item = f32>| scores.fold(f32::INFINITY, f32::min);
        let highest = |scores: &mut dyn Iterator<Item = f32>| scores.fold(f32::NEG_INFINITY, f32::max);
        lowest(&mut experts(true).map(|e| least[e])) > highest(&mut experts(false).map(|e| most[e]))
            && lowest(&mut groups(true).map(|g| group(&least, g)))
                > highest(&mut groups(false).map(|g| group(&most, g)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::gate::route;
    use expertmesh_model::config::parts::GroupScore;

    fn gate(scores: Scores, groups: usize, top_groups: usize) -> GateConfig {
        let (bias, group_score) = match scores {
            Scores::Sigmoid => (true, GroupScore::SumOfBestTwo),
            Scores::Softmax => (false, GroupScore::Best),
        };
        GateConfig {
            experts: 8,
            top_k: 2,
            scores,
            bias,
            groups,
            top_groups,
            group_score,
            normalised: true,
            scale: 1.0,
        }
    }

    #[test]
    fn the_margin_is_half_the_gap_between_the_last_chosen_and_the_best_other_logit() {
        let logits = [3.0, 2.0, 1.5, 0.0, -1.0, -1.0, -1.0, -1.0];
        let margin = margins(&gate(Scores::Softmax, 1, 1), &logits, &[], &[1.0; 8])[0];
        assert!((margin - 0.25).abs() < 1e-6, "{margin}");
        // The best expert of all, in a group that is second by 1.
        let margin = margins(&gate(Scores::Softmax, 4, 1), &logits, &[], &[1.0; 8])[0];
        assert!((margin - 0.75).abs() < 1e-6, "{margin}");
        let equal = margins(&gate(Scores::Sigmoid, 4, 2), &[0.0; 8], &[0.0; 8], &[1.0; 8]);
        assert!(equal[0] < 1e-6);
    }

    proptest! {
        #[test]
        fn no_logits_within_the_margin_change_the_choice_and_some_just_beyond_it_do(
            logits in prop::collection::vec(-4.0f32..4.0, 8),
            bias in prop::collection::vec(-0.5f32..0.5, 8),
            sizes in prop::collection::vec(0.1f32..2.0, 8),
            errors in prop::collection::vec(prop::collection::vec(-1.0f32..1.0, 8), 40),
            (sigmoid, groups) in (any::<bool>(), any::<bool>()),
        ) {
            let (scores, bias) = match sigmoid {
                true => (Scores::Sigmoid, bias),
                false => (Scores::Softmax, Vec::new()),
            };
            let gate = if groups { gate(scores, 4, 2) } else { gate(scores, 1, 1) };
            let chosen = |logits: &[f32]| route(&gate, logits, &bias).experts;
            let (before, margin) = (chosen(&logits), margins(&gate, &logits, &bias, &sizes)[0]);
            let moved = |r: f32, errors: &[f32]| -> Vec<f32> {
                let error = errors.iter().zip(&sizes).map(|(error, size)| error * size * r);
                logits.iter().zip(error).map(|(logit, error)| logit + error).collect()
            };
            for errors in &errors {
                // Everything as bad as it may be, too.
                let extreme: Vec<f32> = errors.iter().map(|error| error.signum()).collect();
                prop_assert_eq!(&chosen(&moved(margin * 0.999, errors)), &before);
                prop_assert_eq!(&chosen(&moved(margin * 0.999, &extreme)), &before);
            }
            // Of one group, the choice does change where all that is chosen loses and all else gains.
            if !groups {
                let worst: Vec<f32> = (0..8).map(|e| if before.contains(&e) { -1.0 } else { 1.0 }).collect();
                prop_assert_ne!(&chosen(&moved(margin * 1.001 + 1e-5, &worst)), &before);
            }
        }
    }
}
