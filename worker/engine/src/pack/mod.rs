//! The packed model: a directory whose blobs are mapped as they are, instead of being packed while loading.
//!
//! | file | holds |
//! |---|---|
//! | `packed.json` | the index: layout, format, the checkpoint's fingerprint; of each blob that is there its file, place and CRC-32C |
//! | `dense.bin` | embeddings and head, then every layer without its routed experts |
//! | `layer-NNN.bin` | a layer's routed experts, each where its number puts it; those of no subset are holes, which take no space |
//! | `config.json`, `tokenizer.json`, … | copies of the checkpoint's |
//! | `packed.journal` | the blobs that were written and the index does not name: while `prepare` runs, after it was killed, and in a cache |
//! | `packed.lock` | locked by the one process that prepares, or by those together that use it as a cache |
//! | `packed.turns` | in a cache: a byte of it is locked while a blob is packed |
//!
//! A blob begins on a page and has the bytes that [`Plan`](expertmesh_model::layout::plan::Plan) says, so that the index states no
//! shapes. Numerics are not in it either: they say how the same weights are added.

pub(crate) mod cache;
mod directory;
pub(crate) mod durable;
mod journal;
pub(crate) mod mapped;
mod packing;
pub(crate) mod prepare;
pub(crate) mod source;
pub(crate) mod supply;
mod turns;
