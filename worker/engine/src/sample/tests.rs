use expertmesh_model::sampling::{MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, Sampling, SamplingParams};
use proptest::prelude::*;

use super::choose::{self, Sampler};
use super::history::History;
use super::logprobs::{Logprobs, logprobs};

fn params(temperature: f32, top_p: f32, top_k: u32, min_p: f32) -> SamplingParams {
    SamplingParams { temperature, top_p, top_k, min_p, seed: 7, ..Default::default() }
}

fn sampling(params: SamplingParams) -> Sampling {
    Sampling::new(params).unwrap()
}

/// At a position, of a sequence whose tokens do not matter.
fn at(logits: &[f32], sampling: &Sampling, position: usize) -> u32 {
    let history = History::new(sampling, &vec![0; position], position);
    Sampler::default().choose(logits, sampling, &history)
}

/// How often each of the tokens comes in 50,000 positions.
fn counts(logits: &[f32], params: SamplingParams) -> Vec<f64> {
    let (sampling, mut sampler) = (sampling(params), Sampler::default());
    let mut history = History::new(&sampling, &[], 0);
    let mut counts = vec![0.0; logits.len()];
    for _ in 0..50_000 {
        let token = sampler.choose(logits, &sampling, &history);
        counts[token as usize] += 1.0 / 50_000.0;
        history.push(token);
    }
    counts
}

#[test]
fn temperature_0_takes_the_greatest_and_of_equals_the_first() {
    let greedy = sampling(params(0.0, 1.0, 0, 0.0));
    assert_eq!(at(&[1.0, 3.0, 3.0, 2.0], &greedy, 0), 1);
    assert_eq!(at(&[f32::NAN, -1.0, f32::NAN], &greedy, 0), 1);
    assert_eq!(at(&[f32::NAN; 3], &greedy, 0), 0);
    assert_eq!(at(&[f32::NEG_INFINITY; 3], &greedy, 0), 0);
}

#[test]
fn tokens_come_as_often_as_their_probabilities_say() {
    let logits: Vec<f32> = [0.5f32, 0.25, 0.15, 0.1].iter().map(|p| p.ln()).collect();
    let near = |counts: &[f64], expected: &[f64]| {
        assert!(counts.iter().zip(expected).all(|(a, b)| (a - b).abs() < 0.01), "{counts:?} {expected:?}");
    };
    near(&counts(&logits, params(1.0, 1.0, 0, 0.0)), &[0.5, 0.25, 0.15, 0.1]);
    near(&counts(&logits, params(1.0, 1.0, 2, 0.0)), &[0.667, 0.333, 0.0, 0.0]);
    near(&counts(&logits, params(1.0, 0.7, 0, 0.0)), &[0.667, 0.333, 0.0, 0.0]);
    near(&counts(&logits, params(1.0, 1.0, 0, 0.25)), &[0.556, 0.278, 0.167, 0.0]);
    // top_p counts within what top_k left: 0.6 of 0.75 is the first token's alone.
    near(&counts(&logits, params(1.0, 0.6, 2, 0.0)), &[1.0, 0.0, 0.0, 0.0]);
    near(&counts(&logits, params(0.5, 1.0, 0, 0.0)), &[0.725, 0.181, 0.065, 0.029]);
    let logit_bias = vec![(0, -100.0), (3, 2.0f32.ln())];
    near(&counts(&logits, SamplingParams { logit_bias, ..Default::default() }), &[0.0, 0.417, 0.25, 0.333]);
}

#[test]
fn the_same_seed_and_position_give_the_same_token_and_others_do_not_repeat_it() {
    let logits = vec![0.0; 1000];
    let draw =
        |seed, position| at(&logits, &sampling(SamplingParams { seed, ..Default::default() }), position);
    assert_eq!(draw(1, 5), draw(1, 5));
    let of_seed = |seed| (0..100).map(|position| draw(seed, position)).collect::<Vec<_>>();
    let same = of_seed(1).iter().zip(of_seed(2)).filter(|(a, b)| **a == *b).count();
    assert!(same < 5);
    // These are fixed: another generator would change every recorded answer.
    assert_eq!(of_seed(0)[..6], [652, 166, 509, 975, 370, 48]);
}

#[test]
fn the_repetition_penalty_asks_for_prompt_and_answer_and_the_others_for_the_answer_alone() {
    // The prompt is tokens 0 and 3; the answer holds token 1 twice and token 4 once; token 2 never came.
    let adjusted = |params: SamplingParams| {
        let (sampling, mut logits) = (sampling(params), [2.0, 2.0, 2.0, -2.0, -2.0]);
        choose::adjust(&mut logits, &sampling, &History::new(&sampling, &[0, 3, 1, 1, 4], 2));
        logits
    };
    let none = SamplingParams::default;
    assert_eq!(adjusted(none()), [2.0, 2.0, 2.0, -2.0, -2.0]);
    assert_eq!(adjusted(SamplingParams { repetition_penalty: 2.0, ..none() }), [1.0, 1.0, 2.0, -4.0, -4.0]);
    assert_eq!(adjusted(SamplingParams { frequency_penalty: 0.5, ..none() }), [2.0, 1.0, 2.0, -2.0, -2.5]);
    assert_eq!(adjusted(SamplingParams { presence_penalty: 0.5, ..none() }), [2.0, 1.5, 2.0, -2.0, -2.5]);
    // The bias comes before the division.
    let logit_bias = vec![(0, 6.0), (2, 1.0)];
    let both = SamplingParams { repetition_penalty: 2.0, frequency_penalty: 0.5, logit_bias, ..none() };
    assert_eq!(adjusted(both), [4.0, 0.0, 3.0, -4.0, -4.5]);
}

#[test]
fn a_stop_token_is_impossible_before_min_tokens_and_ends_the_sequence_after() {
    let sampling = sampling(params(0.0, 1.0, 0, 0.0)).ending(vec![2, 900], 2);
    let (logits, mut history) = ([1.0, 0.0, 9.0], History::new(&sampling, &[1], 1));
    let mut sampler = Sampler::default();
    let mut tokens = Vec::new();
    for _ in 0..3 {
        let token = sampler.choose(&logits, &sampling, &history);
        tokens.push((token, sampling.ends(token, history.generated())));
        history.push(token);
    }
    assert_eq!(tokens, [(0, false), (0, false), (2, true)]);
    // Where nothing else is possible, it comes and does not end.
    let history = History::new(&sampling, &[1], 1);
    let token = sampler.choose(&[f32::NEG_INFINITY, f32::NEG_INFINITY, 1.0], &sampling, &history);
    assert!(!sampling.ends(token, history.generated()));
}

#[test]
fn what_is_out_of_range_is_named() {
    let error = |change: fn(&mut SamplingParams)| {
        let mut params = SamplingParams::default();
        change(&mut params);
        Sampling::new(params).unwrap_err().to_string()
    };
    let finite = "is out of range; expected: a finite number, 0 or more";
    assert_eq!(error(|p| p.temperature = -1.0), format!("temperature: -1 {finite}"));
    assert_eq!(error(|p| p.temperature = f32::NAN), format!("temperature: NaN {finite}"));
    assert_eq!(error(|p| p.top_p = 0.0), "top_p: 0 is out of range; expected: above 0 and at most 1");
    assert_eq!(error(|p| p.min_p = 1.5), "min_p: 1.5 is out of range; expected: 0 to 1");
    let above = "is out of range; expected: a finite number above 0";
    assert_eq!(error(|p| p.repetition_penalty = 0.0), format!("repetition_penalty: 0 {above}"));
    assert_eq!(error(|p| p.repetition_penalty = f32::INFINITY), format!("repetition_penalty: inf {above}"));
    let around = "is out of range; expected: -2 to 2";
    assert_eq!(error(|p| p.presence_penalty = 2.5), format!("presence_penalty: 2.5 {around}"));
    assert_eq!(error(|p| p.frequency_penalty = f32::NAN), format!("frequency_penalty: NaN {around}"));
    let bias = "is out of range; expected: -100 to 100";
    assert_eq!(error(|p| p.logit_bias = vec![(1, 1.0), (2, -101.0)]), format!("logit_bias: -101 {bias}"));
    let many = "logit_bias: 301 is out of range; expected: at most 300 tokens";
    assert_eq!(error(|p| p.logit_bias = vec![(1, 1.0); MAX_LOGIT_BIAS + 1]), many);
}

#[test]
fn logprobs_are_of_the_raw_logits_and_of_equals_the_lower_id_comes_first() {
    let logits: Vec<f32> = [0.5f32, 0.125, 0.125, 0.25].iter().map(|p| 3.0 + p.ln()).collect();
    let found = logprobs(&logits, 2, 3);
    assert!((found.logprob - 0.125f32.ln()).abs() < 1e-6);
    assert_eq!(found.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [0, 3, 1]);
    assert!((found.top[1].1 - 0.25f32.ln()).abs() < 1e-6);
    assert_eq!(logprobs(&logits, 2, 0).top, []);
    assert_eq!(logprobs(&logits, 9, 0).logprob, f32::NEG_INFINITY);
    let broken = logprobs(&[f32::NAN, 0.0, f32::NEG_INFINITY], 0, 5);
    let expected = vec![(1, 0.0), (2, f32::NEG_INFINITY)];
    assert_eq!(broken, Logprobs { logprob: f32::NEG_INFINITY, top: expected });
}

/// Every number of a request, and whether it asks for penalties.
fn any_params() -> impl Strategy<Value = SamplingParams> {
    let filters =
        (prop_oneof![Just(0.0f32), Just(1e-30), 0.1f32..2.0], 0.01f32..=1.0, 0u32..20, 0.0f32..=1.0);
    let penalties = prop_oneof![
        Just((1.0f32, 0.0f32, 0.0f32)),
        (0.5f32..2.0, -2.0f32..=2.0, -2.0f32..=2.0),
        (0.5f32..2.0, Just(0.0), Just(0.0)),
    ];
    let logit_bias = prop::collection::vec((0u32..60, -100.0f32..=100.0), 0..4);
    (filters, penalties, logit_bias, any::<u64>()).prop_map(|(filters, penalties, logit_bias, seed)| {
        let (temperature, top_p, top_k, min_p) = filters;
        let (repetition_penalty, presence_penalty, frequency_penalty) = penalties;
        let filters = SamplingParams { temperature, top_p, top_k, min_p, seed, ..Default::default() };
        SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, logit_bias, ..filters }
    })
}

/// Different for every position, with ties, NaN and ids that a bias may name and the vocabulary lacks.
fn logits_at(seed: u32, position: usize) -> Vec<f32> {
    let logit = |token: u32| match (token * 2_654_435 + seed * 40_503 + position as u32 * 97) % 41 {
        40 => f32::NAN,
        other => other as f32 / 4.0 - 5.0,
    };
    (0..50).map(logit).collect()
}

proptest! {
    #[test]
    fn a_sampled_token_is_one_that_the_filters_keep(
        logits in prop::collection::vec(prop_oneof![9 => -20.0f32..20.0, 1 => Just(f32::NAN)], 1..200),
        temperature in prop_oneof![Just(1e-30f32), 0.1f32..2.0],
        top_p in 0.01f32..=1.0,
        top_k in 0u32..20,
        min_p in 0.0f32..=1.0,
        position in 0usize..5000,
    ) {
        let token = at(&logits, &sampling(params(temperature, top_p, top_k, min_p)), position) as usize;
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if best > f32::NEG_INFINITY {
            let better = logits.iter().filter(|logit| **logit > logits[token]).count();
            prop_assert!(!logits[token].is_nan());
            prop_assert!(top_k == 0 || better < top_k as usize);
            let relative = ((f64::from(logits[token]) - f64::from(best)) / f64::from(temperature)).exp();
            prop_assert!(relative >= f64::from(min_p) * 0.999_99);
        }
    }

    #[test]
    fn a_sequence_goes_on_the_same_wherever_it_is_resumed_and_whatever_ran_before(
        params in any_params(),
        prompt in prop::collection::vec(0u32..60, 1..20),
        min_tokens in 0usize..12,
        cut in 0usize..30,
        logits in any::<u16>(),
    ) {
        let sampling = sampling(params).ending(vec![3, 4], min_tokens);
        let mut tokens = prompt.clone();
        let mut history = History::new(&sampling, &tokens, prompt.len());
        let mut sampler = Sampler::default();
        for _ in 0..30 {
            let token = sampler.choose(&logits_at(logits.into(), tokens.len()), &sampling, &history);
            let early = tokens.len() - prompt.len() < min_tokens;
            prop_assert!(!(early && [3, 4].contains(&token)));
            tokens.push(token);
            history.push(token);
        }
        let resumed = &tokens[..prompt.len() + cut];
        let mut history = History::new(&sampling, resumed, prompt.len());
        for (position, &wanted) in tokens.iter().enumerate().skip(resumed.len()) {
            // A sampler that saw nothing before.
            let token = Sampler::default().choose(&logits_at(logits.into(), position), &sampling, &history);
            prop_assert_eq!(token, wanted);
            history.push(token);
        }
    }

    #[test]
    fn penalties_that_penalize_nothing_change_no_token(params in any_params(), tokens in prop::collection::vec(0u32..50, 2..20)) {
        let logit_bias = vec![(90, 50.0)]; // outside of the vocabulary: it only has the logits copied
        let neutral = SamplingParams { repetition_penalty: 1.0, presence_penalty: 0.0, frequency_penalty: 0.0, ..params };
        let plain = sampling(SamplingParams { logit_bias: vec![], ..neutral.clone() });
        let copied = sampling(SamplingParams { logit_bias, ..neutral });
        let history = History::new(&plain, &tokens, 1);
        let logits = logits_at(5, tokens.len());
        let [one, other] = [&plain, &copied].map(|sampling| Sampler::default().choose(&logits, sampling, &history));
        prop_assert_eq!(one, other);
    }

    #[test]
    fn probabilities_add_up_to_1_and_come_in_order(logits in prop::collection::vec(-30.0f32..30.0, 1..20), token in 0u32..20) {
        let found = logprobs(&logits, token.min(logits.len() as u32 - 1), MAX_TOP_LOGPROBS);
        let sum: f64 = found.top.iter().map(|(_, logprob)| f64::from(*logprob).exp()).sum();
        prop_assert!((sum - 1.0).abs() < 1e-5, "{sum}");
        prop_assert!(found.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        let own = found.top.iter().find(|(other, _)| *other == token.min(logits.len() as u32 - 1));
        prop_assert_eq!(own.map(|(_, logprob)| *logprob), Some(found.logprob));
    }
}
