//! Against transformers in float32: tests/golden/make.py and tests/models/record.py made the files.

use super::*;

const TOLERANCE: f64 = 1e-4;

fn agrees_with_transformers(folder: &str) {
    let (backend, (golden, ids)) = (load(folder), golden(folder));
    let mut kv = backend.allocate_kv(BlockAllocator::needed(ids.len()));
    let record = compute(&backend, &every_row(&ids, &blocks(ids.len())), &mut kv);
    for (layer, hidden) in record.hidden.iter().enumerate() {
        let error = relative(hidden, &golden.f32(&format!("hidden.{layer}")).unwrap());
        assert!(error <= TOLERANCE, "{folder}: hidden.{layer}: {error}");
    }
    for (layer, routes) in (backend.config().first_moe_layer()..).zip(&record.routes) {
        let experts: Vec<i64> = routes.experts.iter().map(|&expert| expert.into()).collect();
        assert_eq!(experts, golden.i64(&format!("experts.{layer}")).unwrap(), "{folder}: experts.{layer}");
        let error = relative(&routes.weights, &golden.f32(&format!("weights.{layer}")).unwrap());
        assert!(error <= TOLERANCE, "{folder}: weights.{layer}: {error}");
    }
    let error = relative(&record.logits, &golden.f32("logits").unwrap());
    assert!(error <= TOLERANCE, "{folder}: logits: {error}");
}

#[test]
fn a_random_v3_agrees_with_transformers() {
    agrees_with_transformers("golden/v3");
}

#[test]
fn yarn_agrees_with_transformers() {
    agrees_with_transformers("golden/v3-yarn");
}

#[test]
fn the_trunk_of_a_model_with_multi_token_prediction_agrees_with_transformers() {
    agrees_with_transformers("golden/v3-mtp");
}

#[test]
fn tiny_r1_agrees_with_transformers() {
    agrees_with_transformers("models/tiny-r1");
}

#[derive(serde::Deserialize)]
struct Conversation {
    ids: Vec<u32>,
    /// Per position the two greatest logits, after rounding to four places: (token, logit).
    top: Vec<[(u32, f32); 2]>,
}

#[test]
fn our_most_probable_token_is_transformers_wherever_theirs_is_clear() {
    let backend = load("models/tiny-r1");
    let heldout = std::fs::read(model("models/tiny-r1").join("heldout.json")).unwrap();
    let conversations: Vec<Conversation> = serde_json::from_slice(&heldout).unwrap();
    assert_eq!(conversations.len(), 40);
    let (mut compared, mut positions) = (0, 0);
    for Conversation { ids, top } in &conversations {
        let mut kv = backend.allocate_kv(BlockAllocator::needed(ids.len()));
        let logits = compute(&backend, &every_row(ids, &blocks(ids.len())), &mut kv).logits;
        for (position, (logits, [first, second])) in
            logits.chunks_exact(backend.config().vocabulary()).zip(top).enumerate()
        {
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
