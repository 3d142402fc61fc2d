//! The seam between the layer loop and a device.
//!
//! Operations enqueue; only [`Backend::download`] waits. A layer is two calls, [`Backend::attend`] (which yields
//! the rows to dispatch) and [`Backend::combine`] (which takes the answers), so that the rows of a layer can
//! travel while the shared expert and the resident experts are computed.

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_scheduler::Step;

use crate::routes::{ExpertGroup, NotResident, Routes};

/// What a layer's first half leaves to do.
pub enum Attended<Activations> {
    /// A dense layer: complete.
    Dense,
    /// A mixture-of-experts layer: its normed rows (rows, hidden) and where they go.
    Moe { normed: Activations, routes: Routes },
}

/// A device that holds a model and computes its layers. Shared by the thread that runs sequences and the one that
/// serves peers, so that computing takes `&self`. It trusts its caller: a token, a position, a block or a row that
/// does not exist panics.
pub trait Backend: Send + Sync + 'static {
    /// A matrix of f32 rows on the device: the residual stream, logits.
    type Rows: Send;
    /// A matrix of bf16 rows on the device, (n, hidden): what goes into experts and comes out of them, here and elsewhere.
    type Activations: Send;
    /// The paged cache, all layers.
    type Kv: Send;

    fn config(&self) -> &ModelConfig;

    /// A cache of `blocks` blocks of [`expertmesh_scheduler::BLOCK_TOKENS`] positions.
    fn allocate_kv(&self, blocks: usize) -> Self::Kv;

    /// The embeddings of the step's tokens: (rows, hidden).
    fn embed(&self, step: &Step) -> Self::Rows;

    /// Attention over the cache, residual added to `hidden`, then norm and gate. Writes the step's latents to `kv`.
    /// A dense layer also runs its feed-forward part.
    fn attend(
        &self,
        layer: usize,
        step: &Step,
        hidden: &mut Self::Rows,
        kv: &mut Self::Kv,
    ) -> Attended<Self::Activations>;

    /// The shared expert of every row: (rows, hidden); zeros where the model has none.
    fn shared(&self, layer: usize, normed: &Self::Activations) -> Self::Rows;

    /// Experts of their groups' rows: (Σ rows of groups, hidden), in the groups' order, unweighted. A row's
    /// result depends on nothing else that is in `inputs`.
    fn experts(
        &self,
        layer: usize,
        inputs: &Self::Activations,
        groups: &[ExpertGroup],
    ) -> Result<Self::Activations, NotResident>;

    /// `hidden + (shared + Σ wₑ·yₑ)`, e ascending; `answers` is (rows · top_k, hidden) in the order of `routes`.
    fn combine(
        &self,
        layer: usize,
        hidden: &mut Self::Rows,
        shared: &Self::Rows,
        routes: &Routes,
        answers: &Self::Activations,
    );

    /// The last norm and the head for every span that wants logits: (spans, vocabulary).
    fn logits(&self, step: &Step, hidden: &Self::Rows) -> Self::Rows;

    /// Zeros: (rows, hidden).
    fn zeros(&self, rows: usize) -> Self::Activations;

    /// Copies row i of `from` to row `at[i]` of `into`.
    fn scatter(&self, from: &Self::Activations, at: &[u32], into: &mut Self::Activations);

    /// Bits of bf16 from host memory: (n, hidden).
    fn upload(&self, rows: &[u16]) -> Self::Activations;

    /// To host memory, row-major: (n, hidden). Waits for what was enqueued.
    fn download_activations(&self, rows: &Self::Activations) -> Vec<u16>;

    /// To host memory, row-major. Waits for what was enqueued.
    fn download(&self, rows: &Self::Rows) -> Vec<f32>;

    /// Reads, checks and packs an expert and makes it resident. Returns its bytes. Resident already: does nothing.
    fn load(&self, layer: usize, expert: u32) -> Result<u64, ModelError>;

    /// Drops an expert; a computation that uses it now finishes first.
    fn evict(&self, layer: usize, expert: u32);

    fn is_resident(&self, layer: usize, expert: u32) -> bool;
}
