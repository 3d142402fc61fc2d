//! Rotary positions in both spellings: transformers 5 writes one object, `rope_parameters`; older files have
//! `rope_theta` beside `rope_scaling`.

use super::keys::Keys;
use super::parts::{RopeConfig, Yarn};
use crate::error::ModelError;

pub(super) fn read(keys: &Keys, width: usize, interleaved: bool) -> Result<RopeConfig, ModelError> {
    let nested = match keys.object("rope_parameters")? {
        Some(nested) => Some(nested),
        None => keys.object("rope_scaling")?,
    };
    let theta_keys = nested.as_ref().filter(|rope| rope.get("rope_theta").is_some()).unwrap_or(keys);
    let theta = theta_keys.positive("rope_theta")?;
    theta_keys.require("rope_theta", theta > 1.0, "a number above 1")?;
    for keys in [Some(keys), nested.as_ref()].into_iter().flatten() {
        keys.only("partial_rotary_factor", 1.0)?;
    }
    let yarn = nested.as_ref().map(yarn).transpose()?.flatten();
    Ok(RopeConfig { width, theta, yarn, interleaved })
}

fn yarn(rope: &Keys) -> Result<Option<Yarn>, ModelError> {
    let kind = |key| rope.one_of(key, &["yarn", "default"]);
    match kind("rope_type")?.or(kind("type")?) {
        Some("yarn") => {}
        Some(_) => return Ok(None),
        None => return Err(rope.missing("rope_type")),
    }
    rope.only("truncate", true)?;
    let factor = rope.positive("factor")?;
    rope.require("factor", factor >= 1.0, "at least 1")?;
    Ok(Some(Yarn {
        factor,
        original_positions: rope.size("original_max_position_embeddings")? as f64,
        beta_fast: rope.optional_positive("beta_fast")?.unwrap_or(32.0),
        beta_slow: rope.optional_positive("beta_slow")?.unwrap_or(1.0),
        attention_factor: rope.optional_positive("attention_factor")?,
        mscale: rope.optional_positive("mscale")?,
        mscale_all_dim: rope.optional_positive("mscale_all_dim")?,
    }))
}
