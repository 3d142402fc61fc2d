//! A checkpoint of DeepSeek-V3's architecture with random weights, the same bytes on every machine.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use safetensors::Dtype;
use safetensors::tensor::{View, serialize_to_file};
use serde_json::{Value, json};

/// Where the model that the bench measures is kept.
pub(crate) const DEFAULT: &str = "target/bench/model";
pub(crate) const WEIGHTS: &str = "model.safetensors";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The directory to make; nothing is done where it exists
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Layers, the first of them dense; 12 are about 1.3 billion parameters
    #[arg(long, value_name = "N", default_value_t = LAYERS)]
    layers: usize,
}

const LAYERS: usize = 12;

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    write(&args.out, args.layers)
}

/// What the bench measures.
pub(crate) fn write_default(out: &Path) -> anyhow::Result<()> {
    write(out, LAYERS)
}

/// Writes `out`, a tensor at a time, and gives it its name when it is complete.
pub(crate) fn write(out: &Path, layers: usize) -> anyhow::Result<()> {
    if out.is_dir() {
        return Ok(());
    }
    let name = out.file_name().context("--out has no name")?.to_string_lossy();
    let partial = out.with_file_name(format!("{name}.partial"));
    if partial.is_dir() {
        fs::remove_dir_all(&partial)?;
    }
    eprintln!("writing {} with random weights", out.display());
    fs::create_dir_all(&partial)?;
    let shape = Shape { layers, ..SHAPE };
    fs::write(partial.join("config.json"), format!("{:#}\n", shape.config()))?;
    serialize_to_file(shape.tensors(), None, &partial.join(WEIGHTS))?;
    fs::rename(&partial, out).with_context(|| format!("{}: cannot be given its name", out.display()))
}

/// Sizes, named as in DeepSeek-V3's config.json.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) layers: usize,
    pub(crate) hidden: usize,
    pub(crate) vocabulary: usize,
    pub(crate) heads: usize,
    pub(crate) q_lora_rank: usize,
    pub(crate) kv_lora_rank: usize,
    pub(crate) nope: usize,
    pub(crate) rope: usize,
    pub(crate) value: usize,
    pub(crate) first_k_dense_replace: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) moe_intermediate_size: usize,
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    pub(crate) groups: usize,
    pub(crate) top_groups: usize,
    pub(crate) routed_scaling_factor: f32,
    pub(crate) rope_theta: f32,
    pub(crate) norm_eps: f32,
    pub(crate) positions: usize,
}

pub(crate) const SHAPE: Shape = Shape {
    layers: LAYERS,
    hidden: 1024,
    vocabulary: 32_000,
    heads: 16,
    q_lora_rank: 768,
    kv_lora_rank: 512,
    nope: 128,
    rope: 64,
    value: 128,
    first_k_dense_replace: 1,
    intermediate_size: 4096,
    moe_intermediate_size: 512,
    experts: 64,
    top_k: 8,
    groups: 8,
    top_groups: 4,
    routed_scaling_factor: 2.5,
    rope_theta: 10_000.0,
    norm_eps: 1e-6,
    positions: 4096,
};

impl Shape {
    fn config(&self) -> Value {
        json!({
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "v_head_dim": self.value,
            "first_k_dense_replace": self.first_k_dense_replace,
            "intermediate_size": self.intermediate_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "moe_layer_freq": 1,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": self.top_k,
            "n_group": self.groups,
            "topk_group": self.top_groups,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": true,
            "routed_scaling_factor": self.routed_scaling_factor,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": false,
        })
    }

    /// Every tensor of the checkpoint: (name, tensor).
    fn tensors(&self) -> Vec<(String, Random)> {
        let mut tensors = vec![
            embedding("model.embed_tokens.weight", self.vocabulary, self.hidden),
            norm("model.norm.weight", self.hidden),
            matrix("lm_head.weight", self.vocabulary, self.hidden),
        ];
        for layer in 0..self.layers {
            let name = format!("model.layers.{layer}");
            tensors.push(norm(&format!("{name}.input_layernorm.weight"), self.hidden));
            tensors.push(norm(&format!("{name}.post_attention_layernorm.weight"), self.hidden));
            tensors.extend(self.attention(&format!("{name}.self_attn")));
            tensors.extend(self.feed_forward(layer, &format!("{name}.mlp")));
        }
        tensors
    }

    fn attention(&self, name: &str) -> [(String, Random); 7] {
        let (queries, heads) = (self.nope + self.rope, self.heads);
        [
            matrix(&format!("{name}.q_a_proj.weight"), self.q_lora_rank, self.hidden),
            norm(&format!("{name}.q_a_layernorm.weight"), self.q_lora_rank),
            matrix(&format!("{name}.q_b_proj.weight"), heads * queries, self.q_lora_rank),
            matrix(&format!("{name}.kv_a_proj_with_mqa.weight"), self.kv_lora_rank + self.rope, self.hidden),
            norm(&format!("{name}.kv_a_layernorm.weight"), self.kv_lora_rank),
            matrix(&format!("{name}.kv_b_proj.weight"), heads * (self.nope + self.value), self.kv_lora_rank),
            matrix(&format!("{name}.o_proj.weight"), self.hidden, heads * self.value),
        ]
    }

    fn feed_forward(&self, layer: usize, name: &str) -> Vec<(String, Random)> {
        if layer < self.first_k_dense_replace {
            return self.swiglu(name, self.intermediate_size).into();
        }
        let mut tensors = vec![
            matrix(&format!("{name}.gate.weight"), self.experts, self.hidden),
            bias(&format!("{name}.gate.e_score_correction_bias"), self.experts),
        ];
        tensors.extend(self.swiglu(&format!("{name}.shared_experts"), self.moe_intermediate_size));
        for expert in 0..self.experts {
            tensors.extend(self.swiglu(&format!("{name}.experts.{expert}"), self.moe_intermediate_size));
        }
        tensors
    }

    fn swiglu(&self, name: &str, inner: usize) -> [(String, Random); 3] {
        [
            matrix(&format!("{name}.gate_proj.weight"), inner, self.hidden),
            matrix(&format!("{name}.up_proj.weight"), inner, self.hidden),
            matrix(&format!("{name}.down_proj.weight"), self.hidden, inner),
        ]
    }
}

/// A tensor of numbers evenly spread over `mean` ± `spread`; they come from the tensor's name alone.
struct Random {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    mean: f32,
    spread: f32,
}

fn random(name: &str, dtype: Dtype, shape: Vec<usize>, mean: f32, spread: f32) -> (String, Random) {
    (name.to_owned(), Random { name: name.to_owned(), dtype, shape, mean, spread })
}

/// Of variance 1 / inputs, so that outputs are as large as inputs.
fn matrix(name: &str, outputs: usize, inputs: usize) -> (String, Random) {
    random(name, Dtype::BF16, vec![outputs, inputs], 0.0, (3.0 / inputs as f32).sqrt())
}

fn embedding(name: &str, vocabulary: usize, hidden: usize) -> (String, Random) {
    random(name, Dtype::BF16, vec![vocabulary, hidden], 0.0, 3f32.sqrt())
}

fn norm(name: &str, width: usize) -> (String, Random) {
    random(name, Dtype::BF16, vec![width], 1.0, 0.25)
}

/// Of the gate: small beside the spread of its scores, so that every expert is chosen now and then.
fn bias(name: &str, experts: usize) -> (String, Random) {
    random(name, Dtype::F32, vec![experts], 0.0, 0.02)
}

impl View for Random {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let seed = self.name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3) // FNV-1a
        });
        let mut bytes = Vec::with_capacity(self.data_len());
        let count = self.shape.iter().product::<usize>();
        let numbers = (0..count as u64).step_by(4).map(|at| Quad::new(seed, at / 4));
        for value in numbers.flat_map(|quad| quad.0).take(count) {
            let value = self.mean + self.spread * value;
            match self.dtype {
                Dtype::F32 => bytes.extend(value.to_le_bytes()),
                _ => bytes.extend(nearest_bf16(value).to_le_bytes()),
            }
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        let width = if self.dtype == Dtype::F32 { 4 } else { 2 };
        self.shape.iter().product::<usize>() * width
    }
}

/// Four numbers between -1 and 1 of one SplitMix64 output.
struct Quad([f32; 4]);

impl Quad {
    fn new(seed: u64, counter: u64) -> Self {
        let bits = split_mix(seed.wrapping_add(counter.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        Self([0, 16, 32, 48].map(|shift| {
            let odd = f32::from((bits >> shift) as u16) * 2.0 + 1.0; // 1, 3, … 131071
            odd / 65536.0 - 1.0
        }))
    }
}

/// SplitMix64's output function.
pub(crate) fn split_mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The bits of the nearest bf16, ties to even; finite numbers only.
fn nearest_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}
