//! What a gate's choice is made of: scores, the best groups, the best experts.

use std::cmp::Ordering;

use expertmesh_model::config::parts::{GateConfig, GroupScore, Scores};

/// 1 / (1 + e⁻ˣ), as DeepSeek-V3's gate makes scores of logits.
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + libm::expf(-x))
}

/// Makes a row's scores (experts) of its logits (experts); sums ascend.
pub(super) fn score(kind: Scores, logits: &[f32], scores: &mut [f32]) {
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
pub(super) fn keep_best_groups(
    gate: &GateConfig,
    scores: &mut [f32],
    groups: &mut Vec<f32>,
    order: &mut Vec<u32>,
) {
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

/// How good a group of experts is, by their scores.
pub(super) fn group_score(kind: GroupScore, group: &[f32]) -> f32 {
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
        GroupScore::SumOfBestTwo | GroupScore::Best => best,
    }
}

/// Leaves the places of the `count` greatest scores in `order`, in no order. Equal scores: the lower place.
pub(super) fn top(count: usize, scores: &[f32], order: &mut Vec<u32>) {
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
