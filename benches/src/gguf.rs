//! The bench's checkpoint as a GGUF file, for llama.cpp: its architecture `deepseek2`, weights in bf16 bit for bit.
//!
//! What each key and tensor is follows llama.cpp's own converter (conversion/deepseek.py): experts of a layer are one
//! tensor, `kv_b_proj` is split into the keys' part, transposed, and the values' part; vectors and the gate are f32.
//! The file has no vocabulary (`tokenizer.ggml.model` is `none`): its benches feed token ids.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use safetensors::tensor::Metadata;

use crate::model::{SHAPE, Shape, WEIGHTS};

const ALIGNMENT: u64 = 32;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A directory that `model` wrote
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The file to make; nothing is done where it exists
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    convert(&args.model, &args.out)
}

/// Converts a tensor at a time, and gives the file its name when it is complete.
pub(crate) fn convert(model: &Path, out: &Path) -> anyhow::Result<()> {
    if out.is_file() {
        return Ok(());
    }
    eprintln!("converting {} to {}", model.display(), out.display());
    let checkpoint = Checkpoint::open(&model.join(WEIGHTS))?;
    let shape = Shape { layers: checkpoint.layers(), ..SHAPE };
    let partial = out.with_extension("partial");
    let mut file = BufWriter::with_capacity(1 << 20, File::create(&partial)?);
    write(&checkpoint, &shape, &mut file)?;
    file.into_inner()?.sync_all()?;
    fs::rename(&partial, out).with_context(|| format!("{}: cannot be given its name", out.display()))
}

/// A safetensors file, read a tensor at a time.
struct Checkpoint {
    file: File,
    metadata: Metadata,
    /// Where the tensors' bytes begin.
    data: u64,
}

impl Checkpoint {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let invalid = || format!("{}: no safetensors file", path.display());
        let file = File::open(path).with_context(invalid)?;
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0).with_context(invalid)?;
        let length = u64::from_le_bytes(length);
        ensure!(length < 100 << 20, invalid());
        let mut header = vec![0; length as usize];
        file.read_exact_at(&mut header, 8).with_context(invalid)?;
        let metadata = serde_json::from_slice(&header).with_context(invalid)?;
        Ok(Self { file, metadata, data: 8 + length })
    }

    fn layers(&self) -> usize {
        let norms = self.metadata.offset_keys().into_iter();
        norms.filter(|name| name.ends_with(".input_layernorm.weight")).count()
    }

    fn read(&self, name: &str) -> anyhow::Result<Vec<u8>> {
        let info = self.metadata.info(name).with_context(|| format!("{name} is missing"))?;
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        self.file.read_exact_at(&mut bytes, self.data + start as u64)?;
        Ok(bytes)
    }
}

/// A type of tensor elements, by its number in GGUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    F32 = 0,
    Bf16 = 30,
}

/// One tensor of the GGUF file.
struct Tensor {
    name: String,
    /// Innermost first.
    dims: Vec<usize>,
    kind: Type,
    source: Source,
}

/// Where a tensor's elements are in the checkpoint.
enum Source {
    /// These tensors, one after another.
    Bf16(Vec<String>),
    /// Widened exactly.
    WidenedBf16(String),
    F32(String),
    /// Of each head's rows of `kv_b_proj`, those of the keys, transposed to (latent, nope).
    Keys(String),
    /// Of each head's rows of `kv_b_proj`, those of the values: (value, latent).
    Values(String),
}

impl Tensor {
    fn bytes(&self) -> u64 {
        let width = if self.kind == Type::F32 { 4 } else { 2 };
        self.dims.iter().product::<usize>() as u64 * width
    }

    fn read(&self, checkpoint: &Checkpoint, shape: &Shape) -> anyhow::Result<Vec<u8>> {
        let latent = shape.kv_lora_rank;
        let heads = |kv_b: &[u8]| -> Vec<Vec<[u8; 2]>> {
            let rows = (shape.nope + shape.value) * latent;
            kv_b.as_chunks::<2>().0.chunks_exact(rows).map(<[_]>::to_vec).collect()
        };
        Ok(match &self.source {
            Source::Bf16(names) => {
                let mut bytes = Vec::with_capacity(self.bytes() as usize);
                for name in names {
                    bytes.extend(checkpoint.read(name)?);
                }
                bytes
            }
            Source::F32(name) => checkpoint.read(name)?,
            Source::WidenedBf16(name) => {
                let bytes = checkpoint.read(name)?;
                bytes.as_chunks::<2>().0.iter().flat_map(|&[low, high]| [0, 0, low, high]).collect()
            }
            Source::Keys(name) => {
                let transposed = |head: Vec<[u8; 2]>| {
                    let at = (0..latent).flat_map(|to| (0..shape.nope).map(move |from| from * latent + to));
                    at.flat_map(|at| head[at]).collect::<Vec<u8>>()
                };
                heads(&checkpoint.read(name)?).into_iter().flat_map(transposed).collect()
            }
            Source::Values(name) => {
                let values = |head: Vec<[u8; 2]>| head[shape.nope * latent..].as_flattened().to_vec();
                heads(&checkpoint.read(name)?).into_iter().flat_map(values).collect()
            }
        })
    }
}

fn write(checkpoint: &Checkpoint, shape: &Shape, out: &mut impl Write) -> anyhow::Result<()> {
    let (keys, mut tensors) = (keys(shape), tensors(shape));
    let mut header = Vec::new();
    header.write_all(b"GGUF")?;
    header.write_all(&3u32.to_le_bytes())?;
    header.write_all(&(tensors.len() as u64).to_le_bytes())?;
    header.write_all(&(keys.len() as u64).to_le_bytes())?;
    for (key, value) in &keys {
        string(&mut header, key)?;
        value.write(&mut header)?;
    }
    let mut offset = 0;
    for tensor in &tensors {
        string(&mut header, &tensor.name)?;
        header.write_all(&(tensor.dims.len() as u32).to_le_bytes())?;
        for &dim in &tensor.dims {
            header.write_all(&(dim as u64).to_le_bytes())?;
        }
        header.write_all(&(tensor.kind as u32).to_le_bytes())?;
        header.write_all(&u64::to_le_bytes(offset))?;
        offset += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    pad(&mut header)?;
    out.write_all(&header)?;
    while let Some(tensor) = tensors.pop_front() {
        let mut bytes = tensor.read(checkpoint, shape).with_context(|| tensor.name.clone())?;
        ensure!(bytes.len() as u64 == tensor.bytes(), "{}: its shape is not the bench's", tensor.name);
        pad(&mut bytes)?;
        out.write_all(&bytes)?;
    }
    Ok(out.flush()?)
}

fn pad(bytes: &mut Vec<u8>) -> io::Result<()> {
    let to = (bytes.len() as u64).next_multiple_of(ALIGNMENT);
    bytes.resize(to as usize, 0);
    Ok(())
}

fn string(out: &mut Vec<u8>, text: &str) -> io::Result<()> {
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(text.as_bytes())
}

enum Metavalue {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(&'static str),
}

impl Metavalue {
    /// The number of its type in GGUF, then the value.
    fn write(&self, out: &mut Vec<u8>) -> io::Result<()> {
        let kind = |kind: u32| kind.to_le_bytes();
        match self {
            Self::U32(value) => out.write_all(&[kind(4), value.to_le_bytes()].concat()),
            Self::F32(value) => out.write_all(&[kind(6), value.to_le_bytes()].concat()),
            Self::Bool(value) => out.write_all(&[&kind(7)[..], &[u8::from(*value)]].concat()),
            Self::Text(value) => out.write_all(&kind(8)).and_then(|()| string(out, value)),
        }
    }
}

fn keys(shape: &Shape) -> Vec<(String, Metavalue)> {
    use Metavalue::{Bool, F32, Text, U32};
    let size = |size: usize| U32(size as u32);
    let own = [
        ("block_count", size(shape.layers)),
        ("context_length", size(shape.positions)),
        ("embedding_length", size(shape.hidden)),
        ("feed_forward_length", size(shape.intermediate_size)),
        ("vocab_size", size(shape.vocabulary)),
        ("leading_dense_block_count", size(shape.first_k_dense_replace)),
        ("expert_feed_forward_length", size(shape.moe_intermediate_size)),
        ("expert_count", size(shape.experts)),
        ("expert_used_count", size(shape.top_k)),
        ("expert_shared_count", U32(1)),
        ("expert_group_count", size(shape.groups)),
        ("expert_group_used_count", size(shape.top_groups)),
        ("expert_gating_func", U32(2)), // sigmoid
        ("expert_weights_norm", Bool(true)),
        ("expert_weights_scale", F32(shape.routed_scaling_factor)),
        ("attention.head_count", size(shape.heads)),
        ("attention.head_count_kv", U32(1)), // absorbed: all heads share the latent
        ("attention.layer_norm_rms_epsilon", F32(shape.norm_eps)),
        ("attention.q_lora_rank", size(shape.q_lora_rank)),
        ("attention.kv_lora_rank", size(shape.kv_lora_rank)),
        ("attention.key_length", size(shape.kv_lora_rank + shape.rope)),
        ("attention.value_length", size(shape.kv_lora_rank)),
        ("attention.key_length_mla", size(shape.nope + shape.rope)),
        ("attention.value_length_mla", size(shape.value)),
        ("rope.dimension_count", size(shape.rope)),
        ("rope.freq_base", F32(shape.rope_theta)),
    ];
    let general = [
        ("general.architecture", Text("deepseek2")),
        ("general.file_type", U32(32)), // mostly bf16
        ("general.alignment", U32(ALIGNMENT as u32)),
        ("tokenizer.ggml.model", Text("none")),
    ];
    let general = general.into_iter().map(|(key, value)| (key.to_owned(), value));
    general.chain(own.into_iter().map(|(key, value)| (format!("deepseek2.{key}"), value))).collect()
}

fn tensors(shape: &Shape) -> VecDeque<Tensor> {
    let mut tensors = VecDeque::from([
        bf16("token_embd", &[shape.hidden, shape.vocabulary], ["model.embed_tokens"]),
        vector("output_norm", shape.hidden, "model.norm"),
        bf16("output", &[shape.hidden, shape.vocabulary], ["lm_head"]),
    ]);
    for layer in 0..shape.layers {
        tensors.extend(attention(shape, &format!("blk.{layer}"), &format!("model.layers.{layer}")));
        tensors.extend(feed_forward(shape, layer, &format!("blk.{layer}"), &format!("model.layers.{layer}")));
    }
    tensors
}

fn attention(shape: &Shape, to: &str, from: &str) -> [Tensor; 10] {
    let (hidden, latent, heads) = (shape.hidden, shape.kv_lora_rank, shape.heads);
    let queries = heads * (shape.nope + shape.rope);
    let attn = format!("{from}.self_attn");
    let kv_b = || format!("{attn}.kv_b_proj.weight");
    let part = |name: &str, dims: [usize; 3], source| Tensor {
        name: format!("{to}.{name}.weight"),
        dims: dims.to_vec(),
        kind: Type::Bf16,
        source,
    };
    [
        vector(&format!("{to}.attn_norm"), hidden, &format!("{from}.input_layernorm")),
        bf16(&format!("{to}.attn_q_a"), &[hidden, shape.q_lora_rank], [&format!("{attn}.q_a_proj")]),
        vector(&format!("{to}.attn_q_a_norm"), shape.q_lora_rank, &format!("{attn}.q_a_layernorm")),
        bf16(&format!("{to}.attn_q_b"), &[shape.q_lora_rank, queries], [&format!("{attn}.q_b_proj")]),
        bf16(
            &format!("{to}.attn_kv_a_mqa"),
            &[hidden, latent + shape.rope],
            [&format!("{attn}.kv_a_proj_with_mqa")],
        ),
        vector(&format!("{to}.attn_kv_a_norm"), latent, &format!("{attn}.kv_a_layernorm")),
        part("attn_k_b", [shape.nope, latent, heads], Source::Keys(kv_b())),
        part("attn_v_b", [latent, shape.value, heads], Source::Values(kv_b())),
        bf16(&format!("{to}.attn_output"), &[heads * shape.value, hidden], [&format!("{attn}.o_proj")]),
        vector(&format!("{to}.ffn_norm"), hidden, &format!("{from}.post_attention_layernorm")),
    ]
}

fn feed_forward(shape: &Shape, layer: usize, to: &str, from: &str) -> Vec<Tensor> {
    let (hidden, inner) = (shape.hidden, shape.moe_intermediate_size);
    if layer < shape.first_k_dense_replace {
        let inner = shape.intermediate_size;
        let part = |part: &str, dims: [usize; 2]| {
            bf16(&format!("{to}.ffn_{part}"), &dims, [&format!("{from}.mlp.{part}_proj")])
        };
        return vec![
            part("gate", [hidden, inner]),
            part("up", [hidden, inner]),
            part("down", [inner, hidden]),
        ];
    }
    let gate = Tensor {
        name: format!("{to}.ffn_gate_inp.weight"),
        dims: vec![hidden, shape.experts],
        kind: Type::F32,
        source: Source::WidenedBf16(format!("{from}.mlp.gate.weight")),
    };
    let bias = Tensor {
        name: format!("{to}.exp_probs_b.bias"),
        dims: vec![shape.experts],
        kind: Type::F32,
        source: Source::F32(format!("{from}.mlp.gate.e_score_correction_bias")),
    };
    let mut tensors = vec![gate, bias];
    for (part, dims) in [("gate", [hidden, inner]), ("up", [hidden, inner]), ("down", [inner, hidden])] {
        let shared = format!("{from}.mlp.shared_experts.{part}_proj");
        tensors.push(bf16(&format!("{to}.ffn_{part}_shexp"), &dims, [&shared]));
        let experts = (0..shape.experts).map(|expert| format!("{from}.mlp.experts.{expert}.{part}_proj"));
        let dims = [dims[0], dims[1], shape.experts];
        tensors.push(bf16(&format!("{to}.ffn_{part}_exps"), &dims, experts));
    }
    tensors
}

fn bf16(to: &str, dims: &[usize], from: impl IntoIterator<Item = impl AsRef<str>>) -> Tensor {
    let from = from.into_iter().map(|name| format!("{}.weight", name.as_ref())).collect();
    Tensor { name: format!("{to}.weight"), dims: dims.to_vec(), kind: Type::Bf16, source: Source::Bf16(from) }
}

fn vector(to: &str, width: usize, from: &str) -> Tensor {
    let source = Source::WidenedBf16(format!("{from}.weight"));
    Tensor { name: format!("{to}.weight"), dims: vec![width], kind: Type::F32, source }
}
