use std::fs;

use expertmesh_model::format::WeightFormat;
use expertmesh_model::numerics::Numerics;

use super::tensors::{Tensor, Values};
use super::*;
use crate::tokenizer::tests::tiny_r1;

/// As stored, unless a test says otherwise.
fn args(model: PathBuf) -> Args {
    let computed_as = ComputedAs { weights: WeightFormat::Native, numerics: Numerics::Pair };
    let computed_with = ComputedWith { isa: None, threads: std::num::NonZeroUsize::new(2) };
    Args { model: Address::Directory(model), computed_as, computed_with, dump: None }
}

/// tiny-r1 with another golden.
fn with_golden(name: &str, golden: &Path) -> PathBuf {
    let model = std::env::temp_dir().join(format!("expertmesh-verify-{name}-{}", std::process::id()));
    fs::create_dir_all(&model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(tiny_r1().join(file), model.join(file)).unwrap();
    }
    fs::copy(golden, model.join(GOLDEN)).unwrap();
    model
}

#[test]
fn what_was_dumped_verifies_and_a_change_of_it_does_not() {
    let out = std::env::temp_dir().join(format!("expertmesh-dump-{}.safetensors", std::process::id()));
    assert!(verify(&Args { dump: Some(out.clone()), ..args(tiny_r1()) }).unwrap());
    let model = with_golden("dump", &out);
    let args = args(model.clone());
    assert!(verify(&args).unwrap());

    let golden = SafetensorsFile::open(&out).unwrap();
    assert_eq!(SafetensorsFile::open(&tiny_r1().join(GOLDEN)).unwrap().names(), golden.names());

    let reference = Reference::open(&model).unwrap();
    let tokens = tokens(&golden, reference.config()).unwrap();
    let trace = reference.forward(&tokens).unwrap();
    for (name, element) in [("logits", 5), ("weights.2", 3), ("experts.4", 1), ("mtp_logits", 7)] {
        let mut changed = traced(reference.config(), &tokens, trace.clone());
        match &mut changed.get_mut(name).unwrap().values {
            Values::F32(values) => values[element] += 1.0,
            Values::I64(values) => values[element] += 1,
        }
        fs::remove_file(model.join(GOLDEN)).unwrap();
        dump(&changed, &model.join(GOLDEN)).unwrap();
        assert!(!verify(&args).unwrap(), "{name}");
    }
    let mut more = traced(reference.config(), &tokens, trace);
    more.insert("hidden.6".to_owned(), Tensor { width: None, values: Values::F32(vec![0.0]) });
    fs::remove_file(model.join(GOLDEN)).unwrap();
    dump(&more, &model.join(GOLDEN)).unwrap();
    assert!(!verify(&args).unwrap(), "a tensor that nobody computed");
    fs::remove_file(&out).unwrap();
    fs::remove_dir_all(&model).unwrap();
}

#[test]
fn numbers_that_are_not_numbers_are_not_ok() {
    let relative = |ours: &[f32]| match Verdict::numbers(ours, &[1.0, 2.0]) {
        Verdict::Numbers { relative, .. } => relative,
        _ => unreachable!(),
    };
    assert_eq!(relative(&[1.0, 2.0]), 0.0);
    assert!(relative(&[f32::NAN, 2.0]).is_nan());
    assert!(!Verdict::numbers(&[1.0, f32::NAN], &[1.0, 2.0]).print("logits", &[2]));
    assert!(!Verdict::numbers(&[1.0], &[0.0]).print("logits", &[1]));
}

#[test]
fn a_golden_that_is_missing_or_of_another_vocabulary_is_named() {
    let missing = verify(&args("/nowhere".into())).err().unwrap();
    assert!(missing.message.starts_with("/nowhere/golden.safetensors: "), "{}", missing.message);
    let other = with_golden("other", &tiny_r1().join("model.safetensors"));
    let error = verify(&args(other.clone())).err().unwrap();
    assert_eq!(error.reason, "MissingTensor");
    fs::remove_dir_all(&other).unwrap();
}

#[test]
fn every_golden_verifies_in_every_format_and_numerics() {
    let goldens = fs::read_dir(tiny_r1().join("../../golden")).unwrap().map(|entry| entry.unwrap().path());
    let models: Vec<PathBuf> = goldens.filter(|path| path.join(GOLDEN).exists()).chain([tiny_r1()]).collect();
    assert_eq!(models.len(), 10);
    for model in models {
        for weights in WeightFormat::ALL {
            for numerics in Numerics::ALL {
                let computed_as = ComputedAs { weights, numerics };
                let ok = verify(&Args { computed_as, ..args(model.clone()) }).unwrap();
                assert!(ok, "{} {weights} {numerics}", model.display());
            }
        }
    }
}

#[test]
fn a_fast_path_on_other_weights_is_not_ok() {
    let (reference, other) =
        (Reference::open(&tiny_r1()).unwrap(), with_golden("weights", &tiny_r1().join(GOLDEN)));
    let mut bytes = fs::read(other.join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let index: serde_json::Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let offsets = &index["model.layers.3.self_attn.o_proj.weight"]["data_offsets"];
    let [from, to] = [0, 1].map(|at| header + offsets[at].as_u64().unwrap() as usize);
    // A sign in sixteen.
    (from..to).skip(1).step_by(32).for_each(|at| bytes[at] ^= 0x80);
    fs::remove_file(other.join("model.safetensors")).unwrap();
    fs::write(other.join("model.safetensors"), bytes).unwrap();
    let golden = SafetensorsFile::open(&tiny_r1().join(GOLDEN)).unwrap();
    let tokens = tokens(&golden, reference.config()).unwrap();
    let trace = reference.forward(&tokens).unwrap();
    let Args { computed_as, computed_with, .. } = args(other.clone());
    let compared = |model: &Path| {
        let model = Address::Directory(model.to_owned());
        let found = source::Args { model, cache: None }.find().unwrap();
        let backend = load(&found, &computed_as.with(computed_with)).unwrap();
        fast_and_reference(&backend, &reference, &tokens, &trace).unwrap()
    };
    assert!(compared(&tiny_r1()) && !compared(&other));
    fs::remove_dir_all(&other).unwrap();
}

#[test]
fn a_packed_model_without_its_checkpoint_is_named() {
    let model = std::env::temp_dir().join(format!("expertmesh-verify-packed-{}", std::process::id()));
    fs::create_dir_all(&model).unwrap();
    fs::write(model.join(packed::INDEX), "{}").unwrap();
    let error = verify(&args(model.clone())).err().unwrap();
    assert_eq!(error.reason, "NoCheckpoint");
    assert!(error.message.contains("is packed"), "{}", error.message);
    fs::remove_dir_all(&model).unwrap();
}
