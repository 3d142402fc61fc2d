//! Against transformers in float32: tests/golden/make.py and tests/models/record.py made the files.

use super::*;

const TOLERANCE: f64 = 1e-4;

/// The papers' form against transformers: the experts identical, everything else within the tolerance.
fn the_reference_agrees(folder: &str) {
    let (reference, (golden, ids)) = (Reference::open(&model(folder)).unwrap(), golden(folder));
    let trace = reference.forward(&ids).unwrap();
    let mut compared = vec!["input_ids".to_owned()];
    let mut close = |name: String, ours: &[f32]| {
        let error = relative(ours, &golden.f32(&name).unwrap());
        assert!(error <= TOLERANCE, "{folder}: {name}: {error}");
        compared.push(name);
    };
    for (layer, (hidden, routes)) in trace.hidden.iter().zip(&trace.routes).enumerate() {
        close(format!("hidden.{layer}"), hidden);
        if let Some(routes) = routes {
            let experts: Vec<i64> = routes.experts.iter().map(|&expert| expert.into()).collect();
            assert_eq!(
                experts,
                golden.i64(&format!("experts.{layer}")).unwrap(),
                "{folder}: experts.{layer}"
            );
            close(format!("weights.{layer}"), &routes.weights);
        }
    }
    close("logits".to_owned(), &trace.logits);
    if let Some(logits) = &trace.mtp_logits {
        close("mtp_logits".to_owned(), logits);
    }
    let experts = |name: &String| name.replacen("weights", "experts", 1);
    compared
        .extend(compared.iter().filter(|name| name.starts_with("weights")).map(experts).collect::<Vec<_>>());
    compared.sort_unstable();
    assert_eq!(compared, golden.names(), "{folder}: not everything was compared");
}

#[test]
fn the_reference_is_transformers_deepseek_v3() {
    the_reference_agrees("golden/v3");
}

#[test]
fn the_reference_is_transformers_deepseek_v3_with_yarn() {
    the_reference_agrees("golden/v3-yarn");
}

#[test]
fn the_reference_is_transformers_deepseek_v3_on_the_numbers_that_fp8_stands_for() {
    the_reference_agrees("golden/v3-fp8");
}

#[test]
fn the_reference_predicts_the_token_after_the_next_as_the_paper_says() {
    the_reference_agrees("golden/v3-mtp");
}

#[test]
fn the_reference_is_transformers_deepseek_v2_with_groups_of_experts_and_yarn() {
    the_reference_agrees("golden/v2");
}

#[test]
fn the_reference_is_transformers_deepseek_v2_lite() {
    the_reference_agrees("golden/v2-lite");
}

#[test]
fn the_reference_is_transformers_qwen3_moe() {
    the_reference_agrees("golden/qwen3-moe");
}

#[test]
fn the_reference_is_transformers_mixtral() {
    the_reference_agrees("golden/mixtral");
}

#[test]
fn the_reference_is_transformers_olmoe() {
    the_reference_agrees("golden/olmoe");
}

#[test]
fn the_reference_is_transformers_tiny_r1() {
    the_reference_agrees("models/tiny-r1");
}

#[test]
fn the_reference_takes_one_token_and_none_that_is_not_in_the_vocabulary() {
    let reference = Reference::open(&model("golden/v3-mtp")).unwrap();
    let one = reference.forward(&[7]).unwrap();
    assert_eq!((one.logits.len(), one.mtp_logits), (256, Some(Vec::new())));
    assert_eq!(reference.forward(&[7, 8]).unwrap().logits[..256], one.logits);
    let error = reference.forward(&[7, 256]).unwrap_err();
    assert_eq!(error.to_string(), "token 256 is not in the vocabulary of 256");
}

#[test]
fn the_references_most_probable_token_is_transformers_wherever_theirs_is_clear() {
    let (mut compared, mut positions) = (0, 0);
    for (Conversation { ids, top }, (_, trace)) in conversations().iter().zip(held_out()) {
        let rows = trace.logits.chunks_exact(trace.logits.len() / ids.len());
        for (position, (logits, [first, second])) in rows.zip(top).enumerate() {
            positions += 1;
            if first.1 - second.1 > 0.02 {
                compared += 1;
                let ours = (0..).zip(logits).max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
                assert_eq!(ours.0, first.0, "position {position} of {ids:?}");
                assert!((ours.1 - first.1).abs() < 1e-3, "position {position} of {ids:?}");
            }
        }
    }
    assert!(compared * 100 > positions * 95, "{compared} of {positions} positions are clear");
}
