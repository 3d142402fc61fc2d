//! From a checkpoint's tensors to packed layers.

use super::attention::Attention;
use super::packed::Packed;
use super::swiglu::SwiGlu;
use crate::EngineError;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;

/// What every worker holds: all but the routed experts.
pub(crate) struct Dense {
    /// (vocabulary, hidden), bf16
    pub(crate) embeddings: Vec<u16>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Vec<f32>,
    pub(crate) head: Packed,
}

pub(crate) struct Layer {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) attention: Attention,
    pub(crate) feed_forward_norm: Vec<f32>,
    pub(crate) feed_forward: FeedForward,
}

pub(crate) enum FeedForward {
    Dense(SwiGlu),
    Moe { gate: Packed, bias: Vec<f32>, shared: SwiGlu },
}

/// Reads tensors and says how far it is.
pub(crate) struct Loader<'a, P> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    progress: P,
    done: u64,
    total: u64,
}

impl<'a, P: FnMut(u64, u64)> Loader<'a, P> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, config: &'a ModelConfig, progress: P) -> Self {
        Self { checkpoint, config, progress, done: 0, total: config.dense_bytes() }
    }

    pub(crate) fn dense(mut self) -> Result<Dense, EngineError> {
        let (vocabulary, hidden) = (self.config.vocabulary, self.config.hidden);
        let embeddings = self.checkpoint.bf16("model.embed_tokens.weight", &[vocabulary, hidden])?;
        let embeddings: Vec<u16> = (0..vocabulary * hidden).map(|at| embeddings.bits(at)).collect();
        self.advance(size_of_val(embeddings.as_slice()) as u64);
        let head = if self.config.tied_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        Ok(Dense {
            head: self.matrix(head, vocabulary, hidden)?,
            norm: self.vector("model.norm.weight", hidden)?,
            layers: (0..self.config.layers).map(|layer| self.layer(layer)).collect::<Result<_, _>>()?,
            embeddings,
        })
    }

    fn layer(&mut self, layer: usize) -> Result<Layer, EngineError> {
        let (name, hidden) = (format!("model.layers.{layer}"), self.config.hidden);
        Ok(Layer {
            attention_norm: self.vector(&format!("{name}.input_layernorm.weight"), hidden)?,
            attention: self.attention(&format!("{name}.self_attn"))?,
            feed_forward_norm: self.vector(&format!("{name}.post_attention_layernorm.weight"), hidden)?,
            feed_forward: self.feed_forward(layer, &format!("{name}.mlp"))?,
        })
    }

    fn attention(&mut self, name: &str) -> Result<Attention, EngineError> {
        let hidden = self.config.hidden;
        let (shape, query_latent) = super::latent_config(self.config)?;
        let shape = shape.clone();
        let (heads, nope, value, latent) = (shape.heads, shape.nope, shape.value, shape.latent);
        // kv_b_proj is (heads · (nope + value), latent): of each head W_UK's rows, then W_UV's.
        let kv_up =
            self.checkpoint.bf16(&format!("{name}.kv_b_proj.weight"), &[heads * (nope + value), latent])?;
        let row = |head: usize, row: usize| (head * (nope + value) + row) * latent;
        let absorb = |head| Packed::from_fn(latent, nope, |to, from| kv_up.bits(row(head, from) + to));
        let up = |head| Packed::from_fn(value, latent, |to, from| kv_up.bits(row(head, nope + to) + from));
        let k_absorb: Vec<_> = (0..heads).map(absorb).collect();
        let v_up: Vec<_> = (0..heads).map(up).collect();
        self.advance(k_absorb.iter().chain(&v_up).map(Packed::bytes).sum());
        Ok(Attention {
            q_down: self.matrix(&format!("{name}.q_a_proj.weight"), query_latent, hidden)?,
            q_norm: self.vector(&format!("{name}.q_a_layernorm.weight"), query_latent)?,
            q_up: self.matrix(&format!("{name}.q_b_proj.weight"), heads * shape.query(), query_latent)?,
            kv_down: self.matrix(&format!("{name}.kv_a_proj_with_mqa.weight"), shape.cached(), hidden)?,
            kv_norm: self.vector(&format!("{name}.kv_a_layernorm.weight"), latent)?,
            k_absorb,
            v_up,
            out: self.matrix(&format!("{name}.o_proj.weight"), hidden, heads * value)?,
            shape,
        })
    }

    fn feed_forward(&mut self, layer: usize, name: &str) -> Result<FeedForward, EngineError> {
        let config = self.config;
        if !config.is_moe(layer) {
            return Ok(FeedForward::Dense(self.swiglu(name, config.dense_inner)?));
        }
        Ok(FeedForward::Moe {
            gate: self.matrix(&format!("{name}.gate.weight"), config.experts(), config.hidden)?,
            bias: self.vector(&format!("{name}.gate.e_score_correction_bias"), config.experts())?,
            shared: self.swiglu(&format!("{name}.shared_experts"), config.shared_inner)?,
        })
    }

    pub(crate) fn expert(mut self, layer: usize, expert: u32) -> Result<SwiGlu, EngineError> {
        self.swiglu(&format!("model.layers.{layer}.mlp.experts.{expert}"), self.config.expert_inner)
    }

    fn swiglu(&mut self, name: &str, inner: usize) -> Result<SwiGlu, EngineError> {
        let hidden = self.config.hidden;
        Ok(SwiGlu {
            gate: self.matrix(&format!("{name}.gate_proj.weight"), inner, hidden)?,
            up: self.matrix(&format!("{name}.up_proj.weight"), inner, hidden)?,
            down: self.matrix(&format!("{name}.down_proj.weight"), hidden, inner)?,
        })
    }

    fn matrix(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<Packed, EngineError> {
        let packed = Packed::new(&self.checkpoint.bf16(name, &[outputs, inputs])?, outputs, inputs);
        self.advance(packed.bytes());
        Ok(packed)
    }

    fn vector(&self, name: &str, width: usize) -> Result<Vec<f32>, EngineError> {
        self.checkpoint.widened(name, &[width])
    }

    fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        (self.progress)(self.done, self.total);
    }
}
