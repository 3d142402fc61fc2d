//! Rotary positions in both spellings: transformers 5 writes one object, `rope_parameters`; older files have
//! `rope_theta` beside `rope_scaling`. Where both objects say something, the older one counts, as in transformers.

use super::keys::Keys;
use super::parts::{Architecture, AttentionConfig, RopeConfig, Yarn};
use crate::error::ModelError;

pub(super) fn read(
    keys: &Keys,
    architecture: Architecture,
    attention: &AttentionConfig,
    positions: usize,
) -> Result<RopeConfig, ModelError> {
    let filled = |key| Ok(keys.object(key)?.filter(|object| !object.map.is_empty()));
    let nested = match filled("rope_scaling")? {
        Some(nested) => Some(nested),
        None => filled("rope_parameters")?,
    };
    let theta_keys = nested.as_ref().filter(|rope| rope.get("rope_theta").is_some()).unwrap_or(keys);
    let default = architecture.defaults().rope_theta;
    let theta = theta_keys.optional_positive("rope_theta")?.unwrap_or(default);
    theta_keys.require("rope_theta", theta > 1.0, "a number above 1")?;
    for keys in [Some(keys), nested.as_ref()].into_iter().flatten() {
        keys.only("partial_rotary_factor", 1.0)?;
    }
    let yarn = nested.as_ref().map(|rope| yarn(rope, positions)).transpose()?.flatten();
    let (width, interleaved) = match attention {
        AttentionConfig::Latent(latent) => (latent.rope, true),
        AttentionConfig::Grouped(grouped) => (grouped.head, false),
    };
    Ok(RopeConfig { width, theta, yarn, interleaved })
}

/// What an object says of YaRN; nothing where it names no kind of positions. `positions` is the model's own context.
fn yarn(rope: &Keys, positions: usize) -> Result<Option<Yarn>, ModelError> {
    let kind = |key| rope.one_of(key, &["yarn", "default"]);
    if kind("rope_type")?.or(kind("type")?) != Some("yarn") {
        return Ok(None);
    }
    rope.only("truncate", true)?;
    let factor = rope.positive("factor")?;
    rope.require("factor", factor >= 1.0, "at least 1")?;
    let original = rope.optional_size("original_max_position_embeddings")?;
    Ok(Some(Yarn {
        factor,
        original_positions: original.unwrap_or(positions) as f64,
        beta_fast: rope.optional_positive("beta_fast")?.unwrap_or(32.0),
        beta_slow: rope.optional_positive("beta_slow")?.unwrap_or(1.0),
        attention_factor: rope.optional_positive("attention_factor")?,
        mscale: rope.optional_positive("mscale")?,
        mscale_all_dim: rope.optional_positive("mscale_all_dim")?,
    }))
}
