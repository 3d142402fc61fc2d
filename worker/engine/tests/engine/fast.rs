//! The fast path against the reference: how far rounding takes it.

use expertmesh_engine::WeightFormat;

use super::*;

const CASES: [&str; 9] = [
    "golden/v3",
    "golden/v3-yarn",
    "golden/v3-fp8",
    "golden/v3-mtp",
    "golden/v2",
    "golden/v2-lite",
    "golden/qwen3-moe",
    "golden/mixtral",
    "golden/olmoe",
];

#[test]
fn show() {
    for folder in CASES {
        let (_, ids) = golden(folder);
        let trace = Reference::open(&model(folder)).unwrap().forward(&ids).unwrap();
        for weights in WeightFormat::ALL {
            let backend = load_as(folder, &LoadOptions { weights, ..LoadOptions::default() });
            let mut kv = backend.allocate_kv(BlockAllocator::needed(ids.len()));
            let record = compute(&backend, &every_row(&ids, &blocks(ids.len())), &mut kv);
            let hidden: Vec<String> = record
                .hidden
                .iter()
                .zip(&trace.hidden)
                .map(|(a, b)| format!("{:.1e}", relative(a, b)))
                .collect();
            let mut diff = 0;
            let mut all = 0;
            for (ours, theirs) in record.routes.iter().zip(trace.routes.iter().flatten()) {
                all += ours.experts.len();
                diff += ours.experts.iter().zip(&theirs.experts).filter(|(a, b)| a != b).count();
            }
            println!(
                "{folder} {weights} hidden {hidden:?} logits {:.1e} experts {diff}/{all}",
                relative(&record.logits, &trace.logits)
            );
        }
    }
}
