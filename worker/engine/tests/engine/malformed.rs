//! Broken models give errors that name what is wrong and where.

use std::fs;
use std::path::Path;

use expertmesh_engine::{EngineError, ModelConfig, ModelFingerprint, Numerics, WeightFormat};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::*;

/// A tensor under change: name, type, shape, bytes.
type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// A copy of tests/golden/v3 that is removed in the end.
struct Copy(PathBuf);

impl Copy {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("expertmesh-engine-{test}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(model("golden/v3").join(file), path.join(file)).unwrap();
        }
        Self(path)
    }

    fn tensors(&self) -> Vec<Tensor> {
        let bytes = fs::read(self.0.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let owned = |(name, view): (String, TensorView)| {
            (name, view.dtype(), view.shape().to_vec(), view.data().to_vec())
        };
        tensors.tensors().into_iter().map(owned).collect()
    }

    /// Writes some tensors to a file of the model.
    fn write(&self, file: &str, tensors: &[Tensor]) {
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        // Not over the file that may be mapped.
        let path = self.0.join(file);
        fs::remove_file(&path).ok();
        safetensors::serialize_to_file(views, None, &path).unwrap();
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Tensor)) -> &Self {
        let mut tensors = self.tensors();
        change(tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap());
        self.write("model.safetensors", &tensors);
        self
    }

    fn load(&self) -> Result<CpuBackend, EngineError> {
        CpuBackend::load(&self.0, &LoadOptions::default(), |_, _| ())
    }

    /// The error, with the temporary folder's name taken out.
    fn error(&self) -> (&'static str, String) {
        let error = self.load().err().expect("the model is broken");
        (error.reason(), error.to_string().replace(&format!("{}/", self.0.display()), ""))
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

const O_PROJ: &str = "model.layers.1.self_attn.o_proj.weight";

#[test]
fn a_missing_tensor_is_named() {
    let copy = Copy::new("missing");
    let kept: Vec<Tensor> = copy.tensors().into_iter().filter(|tensor| tensor.0 != O_PROJ).collect();
    copy.write("model.safetensors", &kept);
    let (reason, message) = copy.error();
    assert_eq!(reason, "MissingTensor");
    assert!(message.starts_with(&format!("tensor {O_PROJ} is missing from ")), "{message}");
}

#[test]
fn a_wrong_shape_is_named_with_the_file_and_both_shapes() {
    let copy = Copy::new("shape");
    copy.change(O_PROJ, |tensor| tensor.2.reverse());
    let message = format!("tensor {O_PROJ} in model.safetensors: expected shape [64, 48], found [48, 64]");
    assert_eq!(copy.error(), ("InvalidTensor", message));
}

#[test]
fn a_wrong_type_is_named_with_the_file_and_both_types() {
    let copy = Copy::new("dtype");
    copy.change(O_PROJ, |tensor| tensor.1 = Dtype::F16);
    let message = format!("tensor {O_PROJ} in model.safetensors: expected dtype BF16, found F16");
    assert_eq!(copy.error(), ("InvalidTensor", message));
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let copy = Copy::new("nan");
    copy.change(O_PROJ, |tensor| tensor.3[14..16].copy_from_slice(&0x7fc0u16.to_le_bytes()));
    let message = format!("tensor {O_PROJ} in model.safetensors: element 7 is not finite");
    assert_eq!(copy.error(), ("InvalidTensor", message));
    let bias = "model.layers.2.mlp.gate.e_score_correction_bias";
    let copy = Copy::new("infinity");
    copy.change(bias, |tensor| tensor.3[..4].copy_from_slice(&f32::INFINITY.to_le_bytes()));
    let message = format!("tensor {bias} in model.safetensors: element 0 is not finite");
    assert_eq!(copy.error(), ("InvalidTensor", message));
}

#[test]
fn a_broken_expert_is_named_when_it_is_loaded_and_stays_absent() {
    let name = "model.layers.2.mlp.experts.11.up_proj.weight";
    let copy = Copy::new("expert");
    copy.change(name, |tensor| tensor.2.reverse());
    let backend = copy.load().unwrap();
    let error = backend.load(2, 11).unwrap_err();
    assert!(error.to_string().starts_with(&format!("tensor {name} in ")), "{error}");
    assert!(!backend.is_resident(2, 11));
    backend.load(2, 10).unwrap();
    for (layer, expert) in [(0, 0), (2, 16), (3, 0)] {
        assert_eq!(backend.load(layer, expert).unwrap_err().reason(), "UnknownExpert");
        assert!(!backend.is_resident(layer, expert));
    }
}

#[test]
fn a_truncated_file_is_named() {
    let copy = Copy::new("truncated");
    let file = copy.0.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    for length in [bytes.len() - 1, 1000, 8, 3, 0] {
        fs::write(&file, &bytes[..length]).unwrap();
        let (reason, message) = copy.error();
        assert_eq!(reason, "InvalidCheckpoint", "{length} bytes");
        assert!(message.starts_with("model.safetensors: "), "{length} bytes: {message}");
    }
}

#[test]
fn shards_give_what_one_file_gives() {
    let copy = Copy::new("shards");
    let (whole, tensors) = (copy.load().unwrap(), copy.tensors());
    let half = tensors.len() / 2;
    let map: Vec<String> = tensors
        .iter()
        .enumerate()
        .map(|(i, tensor)| format!("{:?}:\"shard-{}.safetensors\"", tensor.0, usize::from(i >= half)))
        .collect();
    copy.write("shard-0.safetensors", &tensors[..half]);
    copy.write("shard-1.safetensors", &tensors[half..]);
    let index = |map: &str| {
        fs::write(copy.0.join("model.safetensors.index.json"), format!("{{\"weight_map\":{{{map}}}}}"))
            .unwrap();
    };
    index(&map.join(","));
    fs::remove_file(copy.0.join("model.safetensors")).unwrap();
    let sharded = copy.load().unwrap();
    for backend in [&whole, &sharded] {
        for (layer, expert) in (1..3).flat_map(|layer| (0..16).map(move |expert| (layer, expert))) {
            backend.load(layer, expert).unwrap();
        }
    }
    let tokens: Vec<u32> = (2..60).collect();
    let compute =
        |backend: &CpuBackend| compute(backend, &super::whole(&tokens), &mut backend.allocate_kv(1));
    assert_eq!(compute(&sharded), compute(&whole));

    index(&map.join(",").replacen("shard-1", "shard-0", 1));
    assert_eq!(copy.error().0, "MissingTensor");
    index(&map.join(",").replacen("shard-1.safetensors", "../secret", 1));
    let (reason, message) = copy.error();
    assert_eq!(reason, "InvalidCheckpoint");
    assert!(message.contains("../secret is not a file's name"), "{message}");
    index("");
    fs::write(copy.0.join("model.safetensors.index.json"), "{").unwrap();
    assert_eq!(copy.error().0, "InvalidCheckpoint");
}

#[test]
fn a_model_that_is_not_there_is_named() {
    let error = CpuBackend::load(Path::new("/nowhere/model"), &LoadOptions::default(), |_, _| ()).err().unwrap();
    assert_eq!(error.reason(), "ModelNotFound");
    assert_eq!(error.to_string(), "no model at /nowhere/model: no such directory");
    let copy = Copy::new("no-weights");
    fs::remove_file(copy.0.join("model.safetensors")).unwrap();
    assert_eq!(copy.error().0, "ModelNotFound");
}

#[test]
fn progress_ends_with_all_bytes() {
    let mut last = (0, 0);
    let backend = CpuBackend::load(&model("golden/v3"), &LoadOptions::default(), |done, total| {
        assert!(done > last.0 && done <= total);
        last = (done, total);
    });
    assert_eq!(last, (backend.unwrap().config().dense_bytes(WeightFormat::Native), last.0));
}

fn fingerprint(model: &Path) -> Result<ModelFingerprint, EngineError> {
    ModelFingerprint::read(model, WeightFormat::Native, Numerics::Pair)
}

#[test]
fn a_fingerprint_says_which_part_differs() {
    let original = fingerprint(&model("golden/v3")).unwrap();
    assert_eq!(original, fingerprint(&model("golden/v3")).unwrap());
    let copy = Copy::new("fingerprint");
    let read = || fingerprint(&copy.0).unwrap();
    assert_eq!(original.difference(&read()), None);

    let config = fs::read_to_string(copy.0.join("config.json")).unwrap();
    let edit = |from: &str, to: &str| {
        assert!(config.contains(from));
        fs::write(copy.0.join("config.json"), config.replace(from, to)).unwrap();
    };
    edit("{", "{ \"use_cache\": false,");
    assert_eq!(original.difference(&read()), None);
    edit("\"routed_scaling_factor\": 2.5", "\"routed_scaling_factor\": 2.25");
    assert!(original.difference(&read()).unwrap().starts_with("architecture: "));
    edit("{", "{ ");

    copy.change(O_PROJ, |tensor| tensor.3[0] ^= 1);
    assert!(original.difference(&read()).unwrap().starts_with("weights: "));
}

#[test]
fn what_a_config_asks_for_and_the_engine_lacks_is_named_with_its_value() {
    let json = fs::read_to_string(model("golden/v3-yarn").join("config.json")).unwrap();
    let error = |from: &str, to: &str| {
        assert!(json.contains(from), "{from}");
        let error = ModelConfig::parse(&json.replacen(from, to, 1)).expect_err(to);
        format!("{}: {error}", error.reason())
    };
    let cases = [
        (
            "DeepseekV3ForCausalLM",
            "FooForCausalLM",
            "UnsupportedArchitecture: config.json: architectures: FooForCausalLM is not supported; supported: DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, Qwen3MoeForCausalLM, MixtralForCausalLM, OlmoeForCausalLM",
        ),
        (
            "\"hidden_size\": 64",
            "\"hidden_size\": 0",
            "InvalidConfig: config.json: hidden_size: 0 is not supported; expected: a positive integer",
        ),
        (
            "\"hidden_size\": 64",
            "\"hidden_size\": -1",
            "InvalidConfig: config.json: hidden_size: -1 is not supported; expected: an integer",
        ),
        ("\"hidden_size\": 64,", "", "InvalidConfig: config.json: hidden_size: missing"),
        (
            "\"n_group\": 4",
            "\"n_group\": 5",
            "InvalidConfig: config.json: n_group: 5 is not supported; expected: a divisor of n_routed_experts",
        ),
        (
            "\"num_experts_per_tok\": 4",
            "\"num_experts_per_tok\": 9",
            "InvalidConfig: config.json: num_experts_per_tok: 9 is not supported; expected: at most the experts of topk_group groups",
        ),
        (
            "\"scoring_func\": \"sigmoid\"",
            "\"scoring_func\": \"softmax\"",
            "InvalidConfig: config.json: scoring_func: softmax is not supported; expected: sigmoid",
        ),
        (
            "\"rope_interleave\": true",
            "\"rope_interleave\": false",
            "InvalidConfig: config.json: rope_interleave: false is not supported; expected: true",
        ),
        (
            "\"type\": \"yarn\"",
            "\"type\": \"linear\"",
            "InvalidConfig: config.json: type: linear is not supported; expected: yarn or default",
        ),
        (
            "\"vocab_size\"",
            "\"quantization_config\": {\"quant_method\": \"fp8\"}, \"vocab_size\"",
            "InvalidConfig: config.json: weight_block_size: missing",
        ),
        (
            "\"eos_token_id\": 1",
            "\"eos_token_id\": [1, \"end\"]",
            "InvalidConfig: config.json: eos_token_id: [1,\"end\"] is not supported; expected: a token id or a list of them",
        ),
        (
            "\"num_key_value_heads\": 4",
            "\"num_key_value_heads\": 2",
            "InvalidConfig: config.json: num_key_value_heads: 2 is not supported; expected: 4",
        ),
    ];
    for (from, to, expected) in cases {
        assert_eq!(error(from, to), expected);
    }
    assert!(ModelConfig::parse("[]").unwrap_err().to_string().starts_with("config.json: "));
}

#[test]
fn both_spellings_of_yarn_are_one_model() {
    let json = fs::read_to_string(model("golden/v3-yarn").join("config.json")).unwrap();
    let config = ModelConfig::parse(&json).unwrap();
    let renamed = json.replace("\"type\": \"yarn\"", "\"rope_type\": \"yarn\"");
    assert_eq!(ModelConfig::parse(&renamed).unwrap(), config);
    let nested = renamed
        .replace("\"rope_scaling\": {", "\"rope_parameters\": { \"rope_theta\": 10000.0,")
        .replacen("\"rope_theta\": 10000.0,\n  \"arch", "\n  \"arch", 1);
    assert!(nested.matches("rope_theta").count() == 1);
    assert_eq!(ModelConfig::parse(&nested).unwrap(), config);
}
