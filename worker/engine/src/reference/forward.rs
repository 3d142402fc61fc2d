//! The whole of it: embeddings, layers, head, and DeepSeek-V3's multi-token prediction.

use std::path::Path;

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::config::parts::AttentionConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::names::Names;

use super::grouped::GroupedAttention;
use super::latent::LatentAttention;
use super::moe::{choose, margins, mixture, swiglu};
use super::weights::{Weights, add};
use crate::checkpoint::Checkpoint;
use crate::rope::Rope;
use crate::routes::Routes;

/// A model, computed as the papers write it.
pub struct Reference {
    config: ModelConfig,
    names: Names,
    weights: Weights,
    rope: Rope,
}

/// Everything that a pass over T tokens computed.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// Of every layer the residual stream after it: (T, hidden).
    pub hidden: Vec<Vec<f32>>,
    /// Of every layer the gate's choice; `None` for a dense one.
    pub routes: Vec<Option<Routes>>,
    /// Of the next token: (T, vocabulary).
    pub logits: Vec<f32>,
    /// Of the token after the next: (T - 1, vocabulary); `None` where the checkpoint has no module for it.
    pub mtp_logits: Option<Vec<f32>>,
}

/// What one layer makes of a residual stream of T rows.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTrace {
    /// The residual stream after it: (T, hidden).
    pub hidden: Vec<f32>,
    /// `None` for a dense layer.
    pub gate: Option<Gated>,
}

/// What a gate saw and chose.
#[derive(Debug, Clone, PartialEq)]
pub struct Gated {
    /// What the gate took in: (T, hidden).
    pub normed: Vec<f32>,
    pub routes: Routes,
    /// Of each row the greatest relative error of its input that certainly leaves the choice as it is, if the error
    /// points in a direction like any other: r moves the logit of expert e by r · ‖x‖ · ‖wₑ‖ / √hidden. (T)
    pub margins: Vec<f32>,
}

impl Reference {
    /// Opens a model's directory; tensors are read, and checked, when they are needed.
    pub fn open(model: &Path) -> Result<Self, ModelError> {
        let config = ModelConfig::read(model)?;
        Ok(Self {
            names: Names::new(&config),
            weights: Weights { checkpoint: Checkpoint::open(model)? },
            rope: Rope::new(&config.rope, &config.attention, config.max_positions),
            config,
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// A sequence from position 0. A token that is not in the vocabulary is an error, and so is a tensor that is
    /// missing, of another shape or type, or not finite.
    pub fn forward(&self, tokens: &[u32]) -> Result<Trace, ModelError> {
        let (vocabulary, hidden) = (self.config.vocabulary, self.config.hidden);
        let mut x = self.embed(tokens)?; // (T, hidden)
        let (mut states, mut routes) = (Vec::new(), Vec::new());
        for layer in 0..self.config.layers {
            let gated = self.layer(layer, self.config.is_moe(layer), &mut x, 0)?;
            routes.push(gated.map(|(_, routes)| routes));
            states.push(x.clone());
        }
        let x = self.weights.norm(self.names.norm(), &x, hidden, self.config.norm_eps)?; // (T, hidden)
        let logits = self.weights.linear(self.names.head(), &x, [vocabulary, hidden])?; // (T, vocabulary)
        let mtp_logits = self.predict_further(tokens, &x)?;
        Ok(Trace { hidden: states, routes, logits, mtp_logits })
    }

    /// The embeddings of a sequence, which the first layer takes: (T, hidden).
    pub fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        let (vocabulary, hidden) = (self.config.vocabulary, self.config.hidden);
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(ModelError::UnknownToken { token, vocabulary });
        }
        self.weights.embed(self.names.embeddings(), tokens, [vocabulary, hidden])
    }

    /// One layer on somebody's residual stream (T, hidden) from position 0, so that what they make of it can be
    /// compared without the errors of the layers before.
    pub fn layer_from(&self, layer: usize, hidden: &[f32]) -> Result<LayerTrace, ModelError> {
        let mut x = hidden.to_vec();
        let Some((normed, routes)) = self.layer(layer, self.config.is_moe(layer), &mut x, 0)? else {
            return Ok(LayerTrace { hidden: x, gate: None });
        };
        let margins = margins(&self.weights, &self.config, layer, &normed)?;
        Ok(LayerTrace { hidden: x, gate: Some(Gated { normed, routes, margins }) })
    }

    /// One layer on `x` (T, hidden), whose first row is at position `start`: the gate's input and choice.
    fn layer(
        &self,
        layer: usize,
        is_moe: bool,
        x: &mut [f32],
        start: usize,
    ) -> Result<Option<(Vec<f32>, Routes)>, ModelError> {
        let (names, hidden, eps) = (&self.names, self.config.hidden, self.config.norm_eps);
        let normed = self.weights.norm(&names.attention_norm(layer), x, hidden, eps)?; // (T, hidden)
        add(x, &self.attend(layer, &normed, start)?);
        let normed = self.weights.norm(&names.feed_forward_norm(layer), x, hidden, eps)?; // (T, hidden)
        if !is_moe {
            add(x, &swiglu(&self.weights, &names.dense(layer), &normed, [self.config.dense_inner, hidden])?);
            return Ok(None);
        }
        let routes = choose(&self.weights, &self.config, layer, &normed)?; // (T, top_k)
        add(x, &mixture(&self.weights, &self.config, layer, &normed, &routes)?);
        Ok(Some((normed, routes)))
    }

    /// (T, hidden) → (T, hidden)
    fn attend(&self, layer: usize, normed: &[f32], start: usize) -> Result<Vec<f32>, ModelError> {
        let (weights, rope, hidden) = (&self.weights, &self.rope, self.config.hidden);
        match &self.config.attention {
            AttentionConfig::Latent(config) => {
                let names = self.names.latent(layer);
                LatentAttention { weights, names, config, hidden, rope }.attend(normed, start)
            }
            AttentionConfig::Grouped(config) => {
                let (names, norm_eps) = (self.names.grouped(layer), self.config.norm_eps);
                GroupedAttention { weights, names, config, hidden, norm_eps, rope }.attend(normed, start)
            }
        }
    }

    /// Multi-token prediction (DeepSeek-V3 report, arXiv 2412.19437, section 2.2, equations 21 to 23), the first module:
    /// row i joins the embedding of token i + 1 with the trunk's state of token i. The report has the state first; the
    /// checkpoints have the embedding first, and the state after the trunk's last norm. `normed` is (T, hidden).
    fn predict_further(&self, tokens: &[u32], normed: &[f32]) -> Result<Option<Vec<f32>>, ModelError> {
        let (layer, hidden, eps) = (self.config.layers, self.config.hidden, self.config.norm_eps);
        let (weights, names, shape) =
            (&self.weights, self.names.mtp(layer), [self.config.vocabulary, hidden]);
        // Copies of a model often keep the configuration and leave the module out.
        if self.config.mtp_modules == 0 || !weights.checkpoint.has(&names.join) {
            return Ok(None);
        }
        let e = weights.embed(&names.embeddings, tokens.get(1..).unwrap_or_default(), shape)?; // (T - 1, hidden)
        let e = weights.norm(&names.embedding_norm, &e, hidden, eps)?;
        let h = weights.norm(&names.hidden_norm, &normed[..e.len()], hidden, eps)?; // (T - 1, hidden)
        let rows = e.chunks_exact(hidden).zip(h.chunks_exact(hidden));
        let joined: Vec<f32> = rows.flat_map(|(e, h)| [e, h].concat()).collect(); // (T - 1, 2 · hidden)
        let mut x = weights.linear(&names.join, &joined, [hidden, 2 * hidden])?; // (T - 1, hidden)
        self.layer(layer, true, &mut x, 1)?;
        let x = weights.norm(&names.norm, &x, hidden, eps)?; // (T - 1, hidden)
        weights.linear(&names.head, &x, shape).map(Some) // (T - 1, vocabulary)
    }
}
