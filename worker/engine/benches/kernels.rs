//! Each kernel, in every format, order of sums and instruction set that this machine has, on one thread:
//!
//!     cargo bench -p expertmesh-engine                     # all of them: minutes
//!     cargo bench -p expertmesh-engine -- experts/int8     # those of a name
//!
//! `experts` is two products, gate and up with SwiGLU, then down: weights of 3 · 1024 · 512, of 1, 16 and 128 rows.
//! `attend` is a layer's attention with its norms, products and gate: one row behind 2047 others, and 256 rows of a prompt.
//! What is compared with the reference is in tests/engine; here it is only timed.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use expertmesh_engine::{Attended, Backend, CpuBackend, ExpertStore, Isa, LoadOptions, Pair};
use expertmesh_model::expert::ExpertId;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::numerics::Numerics;
use expertmesh_scheduler::{BLOCK_TOKENS, Span, Step};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

const HIDDEN: usize = 1024;
const INNER: usize = 512;
const CONTEXT: usize = 2048;

const CONFIG: &str = r#"{
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "vocab_size": 256, "hidden_size": 1024, "intermediate_size": 512, "moe_intermediate_size": 512,
    "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_attention_heads": 16, "num_key_value_heads": 16,
    "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": true, "routed_scaling_factor": 1.0, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "max_position_embeddings": 4096, "rope_theta": 10000.0, "rope_interleave": true, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1,
    "num_nextn_predict_layers": 0
}"#;

/// A layer of DeepSeek-V3's architecture with random weights.
struct Model(PathBuf);

impl Model {
    fn make() -> Self {
        let folder = std::env::temp_dir().join(format!("expertmesh-kernels-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a temporary folder");
        fs::write(folder.join("config.json"), CONFIG).expect("config.json");
        let mut seed = 1;
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes()
            .into_iter()
            .map(|(name, shape)| {
                let bytes = (0..shape.iter().product()).flat_map(|_| bf16(&mut seed, &shape)).collect();
                (name, shape, bytes)
            })
            .collect();
        let views = tensors.iter().map(|(name, shape, bytes)| {
            (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).expect("bytes of the shape"))
        });
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).expect("the model");
        Self(folder)
    }

    fn load(&self, options: &LoadOptions) -> CpuBackend {
        let backend = CpuBackend::load(&self.0, options, |_, _| ()).expect("the model loads");
        backend.load(ExpertId::new(0, 0)).expect("the expert loads");
        backend
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn shapes() -> Vec<(String, Vec<usize>)> {
    let layer = |name: &str, shape: &[usize]| (format!("model.layers.0.{name}.weight"), shape.to_vec());
    let swiglu = |part: String| {
        [("gate_proj", [INNER, HIDDEN]), ("up_proj", [INNER, HIDDEN]), ("down_proj", [HIDDEN, INNER])]
            .map(|(name, shape)| layer(&format!("mlp.{part}.{name}"), &shape))
    };
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![256, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ("lm_head.weight".to_owned(), vec![256, HIDDEN]),
        ("model.layers.0.mlp.gate.e_score_correction_bias".to_owned(), vec![4]),
        layer("mlp.gate", &[4, HIDDEN]),
        layer("input_layernorm", &[HIDDEN]),
        layer("post_attention_layernorm", &[HIDDEN]),
        layer("self_attn.q_a_proj", &[768, HIDDEN]),
        layer("self_attn.q_a_layernorm", &[768]),
        layer("self_attn.q_b_proj", &[16 * 192, 768]),
        layer("self_attn.kv_a_proj_with_mqa", &[512 + 64, HIDDEN]),
        layer("self_attn.kv_a_layernorm", &[512]),
        layer("self_attn.kv_b_proj", &[16 * 256, 512]),
        layer("self_attn.o_proj", &[HIDDEN, 16 * 128]),
    ];
    shapes.extend((0..4).flat_map(|expert| swiglu(format!("experts.{expert}"))));
    shapes.extend(swiglu("shared_experts".to_owned()));
    shapes
}

/// Between −1 and 1, over the root of the inputs.
fn bf16(seed: &mut u32, shape: &[usize]) -> [u8; 2] {
    *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    let inputs = shape.last().map_or(1.0, |&inputs| inputs as f32);
    let value = ((*seed >> 8) as f32 / (1 << 23) as f32 - 1.0) / inputs.sqrt();
    let [_, _, low, high] = value.to_bits().to_le_bytes();
    [low, high]
}

/// Every way to compute, by name; int8 and int4 have one order of sums.
fn ways() -> Vec<(String, LoadOptions)> {
    let mut ways = Vec::new();
    for weights in WeightFormat::ALL {
        let integer = match weights {
            WeightFormat::Native => continue, // one of the others
            WeightFormat::Bf16 | WeightFormat::Fp8 => false,
            WeightFormat::Int8 | WeightFormat::Int4 => true,
        };
        for numerics in Numerics::ALL.into_iter().take(if integer { 1 } else { 2 }) {
            for isa in Isa::available() {
                let order = if integer { String::new() } else { format!("-{numerics}") };
                ways.push((
                    format!("{weights}{order}/{isa}"),
                    LoadOptions { weights, numerics, isa, threads: 1 },
                ));
            }
        }
    }
    ways
}

fn experts(criterion: &mut Criterion) {
    let model = Model::make();
    let mut group = criterion.benchmark_group("experts");
    group.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for (name, options) in ways() {
        let backend = model.load(&options);
        for rows in [1, 16, 128] {
            let values: Vec<u16> =
                (0..rows * HIDDEN).map(|i| 0x3f00 | (i * 37 % 128) as u16 | (i as u16 & 1) << 15).collect();
            let pairs: Vec<Pair> = (0..rows as u32).map(|row| Pair { row, expert: 0 }).collect();
            let (mut queue, here) = (backend.queue().expect("a queue"), backend.pin(0, &[0]));
            let (inputs, routes) = (backend.upload(&mut queue, &values), backend.pairs(&mut queue, &pairs));
            let mut answers = backend.answers(&mut queue, &routes);
            // Multiplications and additions.
            group.throughput(Throughput::Elements(2 * 3 * (HIDDEN * INNER * rows) as u64));
            group.bench_with_input(BenchmarkId::new(&name, rows), &rows, |bencher, _| {
                bencher.iter(|| backend.experts(&mut queue, &here, &inputs, &routes, &mut answers));
            });
        }
    }
}

fn attend(criterion: &mut Criterion) {
    let model = Model::make();
    let mut group = criterion.benchmark_group("attend");
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    let blocks: Vec<u32> = (0..(CONTEXT / BLOCK_TOKENS) as u32).collect();
    for (name, options) in ways() {
        let backend = model.load(&options);
        let mut kv = backend.allocate_kv(blocks.len()).expect("room for the cache");
        let (mut queue, mut other) = (backend.queue().expect("a queue"), backend.queue().expect("a queue"));
        for (rows, start) in [(256, 0), (1, CONTEXT - 1)] {
            let tokens = (0..rows).map(|i| i * 31 % 256).collect();
            let step = Step { spans: vec![Span { tokens, start, blocks: blocks.clone(), logits: false }] };
            group.throughput(Throughput::Elements(u64::from(rows)));
            group.bench_with_input(BenchmarkId::new(&name, rows), &rows, |bencher, _| {
                bencher.iter_batched(
                    || backend.embed(&mut other, &step),
                    |mut hidden| {
                        let attended = backend.attend(&mut queue, 0, &step, &mut hidden, &mut kv);
                        matches!(attended, Attended::Dense)
                    },
                    criterion::BatchSize::SmallInput,
                );
            });
        }
    }
}

criterion_group!(kernels, experts, attend);
criterion_main!(kernels);
