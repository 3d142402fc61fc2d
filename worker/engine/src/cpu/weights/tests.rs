use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::cpu1::{LANES, PAIR};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::*;
use crate::checkpoint::{Checkpoint, SafetensorsFile};
use crate::cpu::kernel::bf16::element;
use crate::cpu::packing::pack_blob;
use crate::math::widen;

/// A checkpoint of a golden's shapes. Each tensor holds one number everywhere, and no two the same; `kv_b_proj` holds two
/// per head, since its rows are of two matrices.
struct Constants {
    folder: PathBuf,
    config: ModelConfig,
    numbers: HashMap<String, u16>,
}

impl Constants {
    /// `change` is what to replace in config.json, and `more` are tensors that the golden does not have.
    fn new(golden: &str, change: [&str; 2], more: &[(&str, usize)]) -> Self {
        let golden_folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(golden);
        let folder =
            std::env::temp_dir().join(format!("expertmesh-constants-{golden}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let config = fs::read_to_string(golden_folder.join("config.json")).unwrap();
        assert!(config.contains(change[0]), "{config}");
        let config = config.replace(change[0], change[1]);
        fs::write(folder.join("config.json"), &config).unwrap();
        let config = ModelConfig::parse(&config).unwrap();
        let file = SafetensorsFile::open(&golden_folder.join("model.safetensors")).unwrap();
        let shapes = file.names().into_iter().map(|name| {
            let shape = file.shape(&name).unwrap().to_vec();
            (name, shape)
        });
        let more = more.iter().map(|&(name, width)| (name.to_owned(), vec![width]));
        let mut numbers = HashMap::new();
        let mut number = |name: String| -> u16 {
            let next = 0x3f80 + numbers.len() as u16; // 1, and the next greater numbers of bf16
            *numbers.entry(name).or_insert(next)
        };
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
            .chain(more)
            .map(|(name, shape)| {
                let row = |row: usize| match &config.attention {
                    AttentionConfig::Latent(latent) if name.ends_with("kv_b_proj.weight") => {
                        let (head, within) =
                            (row / (latent.nope + latent.value), row % (latent.nope + latent.value));
                        format!("{name} {} {head}", if within < latent.nope { "k" } else { "v" })
                    }
                    _ => name.clone(),
                };
                let width: usize = shape[1..].iter().product();
                let bits = (0..shape[0]).flat_map(|at| vec![number(row(at)); width]);
                let bytes = bits.flat_map(u16::to_le_bytes).collect();
                (name, shape, bytes)
            })
            .collect();
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
        Self { folder, config, numbers }
    }

    /// The number of a tensor, named without `.weight`.
    fn of(&self, name: &str) -> u16 {
        let found = self.numbers.get(&format!("{name}.weight")).or_else(|| self.numbers.get(name));
        *found.unwrap_or_else(|| panic!("{name} is no tensor"))
    }

    fn layer(&self, layer: usize) -> Layer {
        let (checkpoint, plan) = (Checkpoint::open(&self.folder).unwrap(), self.plan());
        Layer::view(&self.config, &plan, layer, &pack_blob(&checkpoint, &plan.layer(layer)).unwrap())
    }

    fn plan(&self) -> Plan<'_> {
        Plan::new(&self.config, WeightFormat::Bf16)
    }

    /// Whether all of a matrix is its tensor's number.
    fn is_all(&self, matrix: &Matrix, tensor: &str) {
        self.are_all(matrix, [tensor, tensor]);
    }

    /// Whether one panel of each pair is the first tensor's number, and the other one the second's.
    fn are_all(&self, matrix: &Matrix, tensors: [&str; 2]) {
        for pair in 0..matrix.shape.pairs() {
            let (elements, []) = matrix.pair(pair).as_chunks::<2>() else { panic!("bf16 has two bytes") };
            for lane in (0..PAIR).filter(|&lane| matrix.shape.row(pair, lane).is_some()) {
                let expected = self.of(tensors[lane / LANES]);
                let all = (0..matrix.shape.inputs)
                    .all(|k| u16::from_le_bytes(elements[element(lane, k)]) == expected);
                assert!(all, "{tensors:?} are not in lane {lane} of pair {pair}");
            }
        }
    }

    fn vector(&self, vector: &[f32], tensor: &str) {
        assert!(!vector.is_empty() && vector.iter().all(|&x| x == widen(self.of(tensor))), "{tensor}");
    }

    fn swiglu(&self, swiglu: &SwiGlu, names: [String; 3]) {
        let [gate, up, down] = names;
        self.are_all(&swiglu.gate_up, [&gate, &up]);
        self.is_all(&swiglu.down, &down);
    }

    /// Whether an expert's blob holds the tensors of these names.
    fn expert(&self, layer: usize, expert: u32, names: [String; 3]) {
        let (checkpoint, parts) =
            (Checkpoint::open(&self.folder).unwrap(), self.plan().expert(layer, expert));
        let blob = pack_blob(&checkpoint, &parts).unwrap();
        self.swiglu(&SwiGlu::view(parts, &blob), names);
    }

    fn ends(&self) {
        let (checkpoint, plan) = (Checkpoint::open(&self.folder).unwrap(), self.plan());
        let ends = Ends::view(&plan, &pack_blob(&checkpoint, &plan.ends()).unwrap());
        let expected = self.of("model.embed_tokens").to_le_bytes();
        assert!(ends.embeddings.bytes().as_chunks::<2>().0.iter().all(|&bits| bits == expected));
        self.vector(&ends.norm, "model.norm");
        self.is_all(&ends.head, "lm_head");
    }
}

impl Drop for Constants {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.folder).ok();
    }
}

fn projections(part: &str) -> [String; 3] {
    ["gate_proj", "up_proj", "down_proj"].map(|name| format!("{part}.{name}"))
}

#[test]
fn every_part_of_a_layer_with_latent_attention_is_its_own_tensor() {
    for (golden, has_query_latent) in [("v3", true), ("v2-lite", false)] {
        let model = Constants::new(golden, ["{", "{"], &[]);
        for layer in 0..model.config.layers {
            let (viewed, of) = (model.layer(layer), |name: &str| format!("model.layers.{layer}.{name}"));
            model.vector(&viewed.attention_norm, &of("input_layernorm"));
            model.vector(&viewed.feed_forward_norm, &of("post_attention_layernorm"));
            let Attention::Latent(latent) = &viewed.attention else { panic!("{golden} has latents") };
            if has_query_latent {
                model.is_all(latent.q_down.as_ref().unwrap(), &of("self_attn.q_a_proj"));
                model.vector(&latent.q_norm, &of("self_attn.q_a_layernorm"));
                model.is_all(&latent.q_up, &of("self_attn.q_b_proj"));
            } else {
                model.is_all(&latent.q_up, &of("self_attn.q_proj"));
            }
            model.is_all(&latent.kv_down, &of("self_attn.kv_a_proj_with_mqa"));
            model.vector(&latent.kv_norm, &of("self_attn.kv_a_layernorm"));
            let of_head = |part: &str, head: usize| of(&format!("self_attn.kv_b_proj.weight {part} {head}"));
            assert_eq!((latent.k_absorb.len(), latent.v_up.len()), (latent.shape.heads, latent.shape.heads));
            for head in 0..latent.shape.heads {
                model.is_all(&latent.k_absorb[head], &of_head("k", head));
                model.is_all(&latent.v_up[head], &of_head("v", head));
            }
            model.is_all(&latent.out, &of("self_attn.o_proj"));
            match &viewed.feed_forward {
                FeedForward::Dense(dense) => model.swiglu(dense, projections(&of("mlp"))),
                FeedForward::Moe { gate, bias, shared } => {
                    model.is_all(gate, &of("mlp.gate"));
                    assert_eq!(bias.is_empty(), golden != "v3");
                    if !bias.is_empty() {
                        model.vector(bias, &of("mlp.gate.e_score_correction_bias"));
                    }
                    model.swiglu(shared.as_ref().unwrap(), projections(&of("mlp.shared_experts")));
                    model.expert(layer, 3, projections(&of("mlp.experts.3")));
                }
            }
        }
        model.ends();
    }
}

#[test]
fn every_part_of_a_layer_with_grouped_attention_is_its_own_tensor() {
    let biases: Vec<(String, usize)> = (0..3)
        .flat_map(|layer| {
            [("q", 4 * 24), ("k", 2 * 24), ("v", 2 * 24), ("o", 64)]
                .map(|(part, width)| (format!("model.layers.{layer}.self_attn.{part}_proj.bias"), width))
        })
        .collect();
    let biases: Vec<(&str, usize)> = biases.iter().map(|(name, width)| (name.as_str(), *width)).collect();
    let change = ["\"head_dim\"", "\"attention_bias\": true, \"head_dim\""];
    let model = Constants::new("qwen3-moe", change, &biases);
    for layer in 0..model.config.layers {
        let (viewed, of) = (model.layer(layer), |name: &str| format!("model.layers.{layer}.{name}"));
        let Attention::Grouped(grouped) = &viewed.attention else { panic!("qwen3 has no latents") };
        model.is_all(&grouped.q, &of("self_attn.q_proj"));
        model.is_all(&grouped.k, &of("self_attn.k_proj"));
        model.is_all(&grouped.v, &of("self_attn.v_proj"));
        model.is_all(&grouped.out, &of("self_attn.o_proj"));
        for (bias, part) in grouped.biases.as_ref().unwrap().iter().zip(["q", "k", "v", "o"]) {
            model.vector(bias, &of(&format!("self_attn.{part}_proj.bias")));
        }
        for (norm, part) in grouped.norms.as_ref().unwrap().iter().zip(["q", "k"]) {
            model.vector(norm, &of(&format!("self_attn.{part}_norm")));
        }
        match &viewed.feed_forward {
            FeedForward::Dense(dense) => model.swiglu(dense, projections(&of("mlp"))),
            FeedForward::Moe { gate, .. } => {
                model.is_all(gate, &of("mlp.gate"));
                model.expert(layer, 5, projections(&of("mlp.experts.5")));
            }
        }
    }
    let mixtral = Constants::new("mixtral", ["{", "{"], &[]);
    let expert = "model.layers.1.block_sparse_moe.experts.2";
    mixtral.expert(1, 2, ["w1", "w3", "w2"].map(|name| format!("{expert}.{name}")));
}
