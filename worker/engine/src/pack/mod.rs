//! The packed model: a directory whose blobs are mapped as they are, instead of being packed while loading.
//!
//! | file | holds |
//! |---|---|
//! | `packed.json` | the index: layout, format, the checkpoint's fingerprint; of each blob that is there its file, place and CRC-32C |
//! | `dense.bin` | embeddings and head, then every layer without its routed experts |
//! | `layer-NNN.bin` | a layer's routed experts, each where its number puts it; those of no subset are holes, which take no space |
//! | `config.json`, `tokenizer.json`, … | copies of the checkpoint's |
//! | `packed.journal` | while `prepare` runs, and after it was killed: the blobs that it has written |
//! | `packed.lock` | locked by the one process that prepares |
//!
//! A blob begins on a page and has the bytes that [`Plan`](expertmesh_model::layout::plan::Plan) says, so that the index states no
//! shapes. Numerics are not in it either: they say how the same weights are added.

pub(crate) mod durable;
mod journal;
pub(crate) mod mapped;
pub(crate) mod prepare;
pub(crate) mod source;
pub(crate) mod supply;
