//! Broken models give errors that name what is wrong and where.

use std::fs;
use std::path::Path;

use expertmesh_engine::{ExpertStore, unloadable};
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::expert::ExpertId;
use expertmesh_model::fingerprint::ModelFingerprint;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::budget::Layout;
use expertmesh_model::numerics::Numerics;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::*;

/// A tensor under change: name, type, shape, bytes.
pub(super) type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// A copy of a folder of tests/golden that is removed in the end.
pub(super) struct Copy(pub(super) PathBuf);

impl Copy {
    fn new(test: &str) -> Self {
        Self::of("v3", test)
    }

    pub(super) fn of(golden: &str, test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("expertmesh-engine-{test}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(model("golden").join(golden).join(file), path.join(file)).unwrap();
        }
        Self(path)
    }

    pub(super) fn tensors(&self) -> Vec<Tensor> {
        let bytes = fs::read(self.0.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let owned = |(name, view): (String, TensorView)| {
            (name, view.dtype(), view.shape().to_vec(), view.data().to_vec())
        };
        tensors.tensors().into_iter().map(owned).collect()
    }

    /// Writes some tensors to a file of the model.
    pub(super) fn write(&self, file: &str, tensors: &[Tensor]) {
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

    fn load(&self) -> Result<CpuBackend, ModelError> {
        CpuBackend::load(&self.0, &LoadOptions::default(), |_, _| ())
    }

    /// The error, with the temporary folder's name taken out.
    fn error(&self) -> (&'static str, String) {
        let error = self.load().err().expect("the model is broken");
        self.reported(error)
    }

    /// The error of the reference, likewise.
    fn reference_error(&self) -> (&'static str, String) {
        let computed = Reference::open(&self.0).and_then(|reference| reference.forward(&[2, 3, 4]));
        self.reported(computed.expect_err("the model is broken"))
    }

    fn reported(&self, error: ModelError) -> (&'static str, String) {
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
    copy.change(O_PROJ, |tensor| tensor.1 = Dtype::I16);
    let message = format!(
        "tensor {O_PROJ} in model.safetensors: expected dtype BF16 or F16 or F32 or F8_E4M3, found I16"
    );
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

const FP8: &str = "model.layers.0.mlp.down_proj.weight";
const SCALES: &str = "model.layers.0.mlp.down_proj.weight_scale_inv";

#[test]
fn the_codes_of_fp8_that_are_not_numbers_are_named() {
    for code in [0x7f, 0xff] {
        let copy = Copy::of("v3-fp8", &format!("fp8-code-{code}"));
        copy.change(FP8, |tensor| tensor.3[11] = code);
        let message = format!("tensor {FP8} in model.safetensors: element 11 is not finite");
        assert_eq!(copy.reference_error(), ("InvalidTensor", message));
    }
}

#[test]
fn scales_that_are_missing_or_of_another_shape_or_type_are_named() {
    let copy = Copy::of("v3-fp8", "no-scales");
    let kept: Vec<Tensor> = copy.tensors().into_iter().filter(|tensor| tensor.0 != SCALES).collect();
    copy.write("model.safetensors", &kept);
    let (reason, message) = copy.reference_error();
    assert_eq!(reason, "MissingTensor");
    assert!(message.starts_with(&format!("tensor {SCALES} is missing from ")), "{message}");

    // (160, 200) in blocks of 128.
    let copy = Copy::of("v3-fp8", "few-scales");
    copy.change(SCALES, |tensor| (tensor.2, tensor.3) = (vec![2, 1], tensor.3[..8].to_vec()));
    let message = format!("tensor {SCALES} in model.safetensors: expected shape [2, 2], found [2, 1]");
    assert_eq!(copy.reference_error(), ("InvalidTensor", message));

    let copy = Copy::of("v3-fp8", "integer-scales");
    copy.change(SCALES, |tensor| tensor.1 = Dtype::I32);
    let message =
        format!("tensor {SCALES} in model.safetensors: expected dtype F32 or BF16 or F8_E8M0, found I32");
    assert_eq!(copy.reference_error(), ("InvalidTensor", message));
}

#[test]
fn a_scale_that_is_not_a_positive_number_is_named() {
    for (scale, shown) in [
        (0.0f32, "0"),
        (-1.0, "-1"),
        (f32::NAN, "NaN"),
        (f32::INFINITY, "inf"),
        (1e36, "1000000000000000000000000000000000000"),
    ] {
        let copy = Copy::of("v3-fp8", &format!("scale-{shown}"));
        copy.change(SCALES, |tensor| tensor.3[8..12].copy_from_slice(&scale.to_le_bytes()));
        let (reason, message) = copy.reference_error();
        assert_eq!(reason, "InvalidTensor");
        let start = format!("tensor {SCALES} in model.safetensors: element 2 is ");
        assert!(message.starts_with(&start) && message.ends_with(", not a scale"), "{message}");
    }
}

#[test]
fn scales_that_are_powers_of_two_are_the_same_in_every_type() {
    let copy = Copy::of("v3-fp8", "ue8m0");
    let logits = || Reference::open(&copy.0).unwrap().forward(&[2, 3, 4]).unwrap().logits;
    let exponents = |tensor: &Tensor| -> Vec<u8> {
        let scale = |bytes: &[u8; 4]| (f32::from_le_bytes(*bytes).to_bits() >> 23) as u8;
        tensor.3.as_chunks().0.iter().map(scale).collect()
    };
    let write = |dtype, bytes: &dyn Fn(u8) -> Vec<u8>| {
        let mut tensors = copy.tensors();
        for tensor in tensors.iter_mut().filter(|tensor| tensor.0.ends_with("_scale_inv")) {
            (tensor.1, tensor.3) = (dtype, exponents(tensor).into_iter().flat_map(bytes).collect());
        }
        let original = fs::read(copy.0.join("model.safetensors")).unwrap();
        copy.write("model.safetensors", &tensors);
        let found = logits();
        fs::remove_file(copy.0.join("model.safetensors")).unwrap();
        fs::write(copy.0.join("model.safetensors"), original).unwrap();
        found
    };
    let of_f32 = write(Dtype::F32, &|e| (u32::from(e) << 23).to_le_bytes().to_vec());
    assert_eq!(write(Dtype::F8_E8M0, &|e| vec![e]), of_f32);
    assert_eq!(write(Dtype::BF16, &|e| (u16::from(e) << 7).to_le_bytes().to_vec()), of_f32);
    assert_ne!(logits(), of_f32);
}

#[test]
fn weights_in_f32_and_f16_are_the_numbers_they_are() {
    let copy = Copy::new("wide");
    let logits = || Reference::open(&copy.0).unwrap().forward(&[2, 3, 4]).unwrap().logits;
    let of_bf16 = logits();
    let widened = |bytes: &[u8]| -> Vec<u8> { bytes.chunks(2).flat_map(|b| [0, 0, b[0], b[1]]).collect() };
    copy.change(O_PROJ, |tensor| (tensor.1, tensor.3) = (Dtype::F32, widened(&tensor.3)));
    assert_eq!(logits(), of_bf16);
    // In f16, the number one is 0x3c00; in bf16 it is 0x3f80.
    let ones = |dtype, bits: u16| {
        copy.change(O_PROJ, |tensor| {
            (tensor.1, tensor.3) = (dtype, bits.to_le_bytes().repeat(48 * 64));
        });
        logits()
    };
    assert_eq!(ones(Dtype::F16, 0x3c00), ones(Dtype::BF16, 0x3f80));
    copy.change(O_PROJ, |tensor| tensor.1 = Dtype::I16);
    let message = format!(
        "tensor {O_PROJ} in model.safetensors: expected dtype BF16 or F16 or F32 or F8_E4M3, found I16"
    );
    assert_eq!(copy.reference_error(), ("InvalidTensor", message));
    copy.change(O_PROJ, |tensor| (tensor.1, tensor.3[9]) = (Dtype::F16, 0x7c));
    let message = format!("tensor {O_PROJ} in model.safetensors: element 4 is not finite");
    assert_eq!(copy.reference_error(), ("InvalidTensor", message));
}

#[test]
fn biases_are_wanted_where_the_configuration_says_so_and_added_to_what_their_matrices_give() {
    // qwen3-moe: 4 heads in 2 groups, of 24 each. The weights of a softmax sum to one, so that a bias of the values
    // comes out multiplied with the output's matrix.
    let copy = Copy::of("qwen3-moe", "bias");
    let config = fs::read_to_string(copy.0.join("config.json")).unwrap();
    fs::write(copy.0.join("config.json"), config.replacen('{', "{ \"attention_bias\": true,", 1)).unwrap();
    assert_eq!(copy.reference_error().0, "MissingTensor");

    let tensors = copy.tensors();
    let name = |part: &str| format!("model.layers.0.self_attn.{part}");
    let values: Vec<f32> = (0..48).map(|i| (i as f32 - 20.0) / 16.0).collect();
    let out = tensors.iter().find(|tensor| tensor.0 == name("o_proj.weight")).unwrap();
    let out = |row: usize, column: usize| {
        let at = (row * 96 + column) * 2;
        f32::from_bits(u32::from(u16::from_le_bytes([out.3[at], out.3[at + 1]])) << 16)
    };
    let mixed = |row| (0..96).map(|c| out(row, c) * values[c / 48 * 24 + c % 24]).sum::<f32>();
    let moved: Vec<f32> = (0..64).map(mixed).collect();
    let hidden = |biased: &str, bias: &[f32]| {
        let mut tensors = tensors.clone();
        for layer in 0..3 {
            for (part, width) in [("q_proj", 96), ("k_proj", 48), ("v_proj", 48), ("o_proj", 64)] {
                let chosen = layer == 0 && part == biased;
                let bias = if chosen { bias.to_vec() } else { vec![0.0; width] };
                let bytes = bias.iter().flat_map(|x: &f32| x.to_le_bytes()).collect();
                let name = format!("model.layers.{layer}.self_attn.{part}.bias");
                tensors.push((name, Dtype::F32, vec![width], bytes));
            }
        }
        copy.write("model.safetensors", &tensors);
        Reference::open(&copy.0).unwrap().forward(&[2, 3, 4, 5]).unwrap().hidden.concat()
    };
    let (of_values, of_output) = (hidden("v_proj", &values), hidden("o_proj", &moved));
    assert!(relative(&of_values, &of_output) < 1e-5);
    let unbiased = Reference::open(&model("golden/qwen3-moe")).unwrap().forward(&[2, 3, 4, 5]).unwrap();
    assert_eq!(hidden("", &[]), unbiased.hidden.concat());
    assert!(relative(&of_values, &unbiased.hidden.concat()) > 0.1);
    assert!(relative(&hidden("k_proj", &values), &unbiased.hidden.concat()) > 1e-3);
}

#[test]
fn a_module_that_predicts_further_may_be_left_out_and_not_by_half() {
    let copy = Copy::of("v3-mtp", "no-mtp");
    let whole = Reference::open(&copy.0).unwrap().forward(&[2, 3, 4]).unwrap();
    assert!(whole.mtp_logits.is_some());
    let tensors = copy.tensors();
    let without = |ending: &str| {
        let left_out = |name: &str| name.starts_with("model.layers.3.") && name.ends_with(ending);
        let kept: Vec<Tensor> = tensors.iter().filter(|tensor| !left_out(&tensor.0)).cloned().collect();
        copy.write("model.safetensors", &kept);
    };
    without("");
    let trunk = Reference::open(&copy.0).unwrap().forward(&[2, 3, 4]).unwrap();
    assert_eq!((trunk.mtp_logits, trunk.logits), (None, whole.logits));
    without("hnorm.weight");
    let (reason, message) = copy.reference_error();
    assert_eq!(reason, "MissingTensor");
    assert!(message.starts_with("tensor model.layers.3.hnorm.weight is missing from "), "{message}");
}

#[test]
fn the_tensors_of_every_family_are_named_when_they_are_missing() {
    let names = [
        ("v2-lite", "model.layers.0.self_attn.q_proj.weight"),
        ("qwen3-moe", "model.layers.1.self_attn.k_norm.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
        ("olmoe", "model.layers.2.self_attn.q_norm.weight"),
    ];
    for (golden, name) in names {
        let copy = Copy::of(golden, &format!("missing-{golden}"));
        let kept: Vec<Tensor> = copy.tensors().into_iter().filter(|tensor| tensor.0 != name).collect();
        copy.write("model.safetensors", &kept);
        let (reason, message) = copy.reference_error();
        assert_eq!(reason, "MissingTensor");
        assert!(message.starts_with(&format!("tensor {name} is missing from ")), "{message}");
    }
}

/// What keeps a model from being loaded with all its experts.
fn refused(copy: &Copy) -> Option<ModelError> {
    let loaded = copy.load().and_then(|backend| {
        let experts = backend.config().experts() as u32;
        let of = |layer| (0..experts).map(move |expert| ExpertId::new(layer as u32, expert));
        let all: Vec<ExpertId> = backend.config().moe_layers().flat_map(of).collect();
        backend.load_experts(&all, |_| ())
    });
    loaded.err()
}

#[test]
fn what_loading_refuses_of_any_tensor_is_told_from_its_header() {
    let mut told = 0;
    for golden in ["v3-fp8", "v2", "v2-lite", "v3-mtp", "qwen3-moe", "mixtral", "olmoe"] {
        let copy = Copy::of(golden, &format!("headers-{golden}"));
        let config = ModelConfig::read(&copy.0).unwrap();
        let whole = copy.tensors();
        let headers = || unloadable(&copy.0, &config, WeightFormat::Native).unwrap();
        assert_eq!(headers(), []);
        // Every seventh: of all layers, and of all kinds.
        for (at, (name, dtype, shape, _)) in whole.iter().enumerate().step_by(7) {
            let retyped = match dtype.bitsize() {
                8 => Dtype::U8,
                16 => Dtype::I16,
                _ => Dtype::I32,
            };
            for change in ["missing", "shape", "type"] {
                let mut tensors = whole.clone();
                match change {
                    "missing" => drop(tensors.remove(at)),
                    "shape" => tensors[at].2.push(1),
                    _ => tensors[at].1 = retyped,
                }
                copy.write("model.safetensors", &tensors);
                let error = refused(&copy);
                assert_eq!(
                    headers(),
                    error.clone().into_iter().collect::<Vec<_>>(),
                    "{golden} {name} {shape:?} {change}"
                );
                told += usize::from(error.is_some());
            }
        }
    }
    assert!(told > 300, "{told}");
}

#[test]
fn a_broken_expert_is_named_when_it_is_loaded_and_stays_absent() {
    let name = "model.layers.2.mlp.experts.11.up_proj.weight";
    let copy = Copy::new("expert");
    copy.change(name, |tensor| tensor.2.reverse());
    let backend = copy.load().unwrap();
    let error = backend.load(ExpertId::new(2, 11)).unwrap_err();
    assert!(error.to_string().starts_with(&format!("tensor {name} in ")), "{error}");
    assert!(!backend.is_resident(ExpertId::new(2, 11)));
    backend.load(ExpertId::new(2, 10)).unwrap();
    for (layer, expert) in [(0, 0), (2, 16), (3, 0)] {
        assert_eq!(backend.load(ExpertId::new(layer, expert)).unwrap_err().reason(), "UnknownExpert");
        assert!(!backend.is_resident(ExpertId::new(layer, expert)));
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
            backend.load(ExpertId::new(layer, expert)).unwrap();
        }
    }
    let tokens: Vec<u32> = (2..60).collect();
    let compute =
        |backend: &CpuBackend| compute(backend, &super::whole(&tokens), &mut backend.allocate_kv(1).unwrap());
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
fn a_whole_file_counts_beside_an_index_of_shards_that_are_gone() {
    let copy = Copy::new("stale-index");
    let index = r#"{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}"#;
    fs::write(copy.0.join("model.safetensors.index.json"), index).unwrap();
    assert!(copy.load().is_ok());
    fs::remove_file(copy.0.join("model.safetensors")).unwrap();
    let (reason, message) = copy.error();
    assert_eq!(reason, "InvalidCheckpoint");
    assert!(message.starts_with("model-00001-of-00002.safetensors: no such file"), "{message}");
}

#[test]
fn files_that_are_none_are_named_at_once_and_a_mark_before_json_is_read_over() {
    let copy = Copy::new("irregular");
    let (weights, config) = (copy.0.join("model.safetensors"), copy.0.join("config.json"));
    let json = fs::read(&config).unwrap();
    fs::write(&config, [b"\xef\xbb\xbf", &json[..]].concat()).unwrap();
    assert!(copy.load().is_ok());
    fs::write(&weights, "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 26876488\n")
        .unwrap();
    let pointer = "model.safetensors: a git-lfs pointer in the place of the file; run git lfs pull where the model was cloned";
    assert_eq!(copy.error(), ("InvalidCheckpoint", pointer.to_owned()));
    let replace = |file: &Path, by: &str| {
        fs::remove_file(file).unwrap();
        std::os::unix::fs::symlink(by, file).unwrap();
    };
    replace(&weights, "/dev/zero");
    assert_eq!(copy.error().1, "model.safetensors: a device or a pipe, not a file");
    replace(&config, "/dev/zero");
    let (reason, message) = copy.error();
    assert_eq!(reason, "InvalidConfig");
    assert!(message.ends_with("a device or a pipe, not a file"), "{message}");
    replace(&config, "/dev");
    assert!(copy.error().1.ends_with("a directory, not a file"));
}

#[test]
fn a_model_that_is_not_there_is_named() {
    let error =
        CpuBackend::load(Path::new("/nowhere/model"), &LoadOptions::default(), |_, _| ()).err().unwrap();
    assert_eq!(error.reason(), "ModelNotFound");
    assert_eq!(error.to_string(), "no model at /nowhere/model: no such directory");
    let file = model("golden/v3").join("config.json");
    let error = CpuBackend::load(&file, &LoadOptions::default(), |_, _| ()).err().unwrap();
    assert!(error.to_string().ends_with("config.json: it is no directory"), "{error}");
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
    assert_eq!(last, (Layout::Cpu1.dense_bytes(backend.unwrap().config(), WeightFormat::Native), last.0));
}

fn fingerprint(model: &Path) -> Result<ModelFingerprint, ModelError> {
    expertmesh_engine::fingerprint(model, WeightFormat::Native, Numerics::Pair)
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
