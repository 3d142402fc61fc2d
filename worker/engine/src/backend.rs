//! The seam between the layer loop and a device.
//!
//! Every call enqueues on a queue of its caller's; only a [`Pending`] waits. A layer is two calls,
//! [`Backend::attend`], which yields the rows to dispatch, and [`Backend::combine`], which takes the answers, so that the
//! rows of a layer can travel while the shared expert and the resident experts are computed. Routes, groups and the step's
//! inputs stay on the device; what travels to other workers comes down as rows in host memory, and nothing else does.
//!
//! Computing cannot fail: a device that does is lost, and with it its process, which [`Backend::failure`] names. What
//! takes memory can.

use std::ops::Deref;

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::layout::budget::Layout;
use expertmesh_model::sampling::Sampling;
use expertmesh_scheduler::Step;

use crate::pending::Pending;
use crate::routes::{Pair, Routes};
use crate::sample::history::History;
use crate::sample::logprobs::Logprobs;
use crate::store::{ExpertStore, Pinned};

/// What a layer's first half leaves to do.
pub enum Attended<Activations, Routes> {
    /// A dense layer, which is complete.
    Dense,
    /// A mixture-of-experts layer: its normed rows (rows, hidden) and where they go.
    Moe { normed: Activations, routes: Routes },
}

/// What a mixture-of-experts layer's second half adds to the residual stream.
pub struct Answered<B: Backend> {
    /// The shared expert's output: (rows, hidden).
    pub shared: B::Rows,
    pub routes: B::Routes,
    /// The routed experts' outputs, unweighted: (pairs, hidden) in the order of `routes`.
    pub answers: B::Activations,
}

/// One token to be drawn.
pub struct Draw<'a> {
    /// The row of the logits.
    pub row: usize,
    pub sampling: &'a Sampling,
    /// The tokens of the sequence so far.
    pub history: &'a History,
    /// Alternatives to log beside the token; `None`: no log-probabilities at all.
    pub logprobs: Option<usize>,
}

/// A token that was drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    pub token: u32,
    /// Where they were asked for.
    pub logprobs: Option<Logprobs>,
}

/// A device that holds a model and computes its layers. Shared by the threads that run sequences and serve peers, each
/// with a queue of its own. It trusts its caller: a token, a position, a block or a row that does not exist panics, and so
/// may a value that belongs to another queue.
pub trait Backend: ExpertStore {
    /// The order in which a caller's work is done. One thread has it.
    type Queue: Send;
    /// A matrix of f32 rows on the device: the residual stream, logits.
    type Rows: Send;
    /// A matrix of bf16 rows on the device, (n, hidden): what goes into experts and comes out of them, here and elsewhere.
    type Activations: Send;
    /// Pairs of rows and experts on the device, with their weights where a gate chose them.
    type Routes: Send;
    /// A step's tokens, positions, block tables and wanted rows on the device.
    type Step: Send;
    /// The paged cache, all layers.
    type Kv: Send;
    /// Rows of bf16 in host memory that the device can copy to, row-major: (n, hidden).
    type HostRows: Deref<Target = [u16]> + Send;

    fn config(&self) -> &ModelConfig;

    /// How weights and cache lie in the device's memory, which is what budgets count.
    fn layout(&self) -> Layout;

    /// Rows of a step that make good use of the weights that are read for it.
    fn step_rows(&self) -> usize;

    /// What went wrong for good, with the device's name; `None` while it computes.
    fn failure(&self) -> Option<String>;

    /// A queue for a thread that computes.
    fn queue(&self) -> Result<Self::Queue, ModelError>;

    /// A cache of `blocks` blocks of [`BLOCK_TOKENS`](expertmesh_scheduler::BLOCK_TOKENS) positions.
    fn allocate_kv(&self, blocks: usize) -> Result<Self::Kv, ModelError>;

    /// Brings a step to the device, once for all its layers.
    fn begin(&self, queue: &mut Self::Queue, step: &Step) -> Self::Step;

    /// The embeddings of the step's tokens: (rows, hidden).
    fn embed(&self, queue: &mut Self::Queue, step: &Self::Step) -> Self::Rows;

    /// Attention over the cache, residual added to `hidden`, then norm and gate. Writes the step's latents to `kv`.
    /// A dense layer also runs its feed-forward part.
    fn attend(
        &self,
        queue: &mut Self::Queue,
        layer: usize,
        step: &Self::Step,
        hidden: &mut Self::Rows,
        kv: &mut Self::Kv,
    ) -> Attended<Self::Activations, Self::Routes>;

    /// The shared expert of every row: (rows, hidden); zeros where the model has none.
    fn shared(&self, queue: &mut Self::Queue, layer: usize, normed: &Self::Activations) -> Self::Rows;

    /// Room for the answers of all pairs of some routes: (pairs, hidden). Every row is to be written, by
    /// [`Self::experts`] or [`Self::place`], before it is read.
    fn answers(&self, queue: &mut Self::Queue, routes: &Self::Routes) -> Self::Activations;

    /// Computes the pairs whose expert is pinned, each into its place among the answers, unweighted. A row's result
    /// depends on nothing else that is in `inputs`.
    fn experts(
        &self,
        queue: &mut Self::Queue,
        here: &Pinned,
        inputs: &Self::Activations,
        routes: &Self::Routes,
        into: &mut Self::Activations,
    );

    /// `hidden + (shared + Σ wₑ·yₑ)`, e ascending.
    fn combine(
        &self,
        queue: &mut Self::Queue,
        layer: usize,
        answered: &Answered<Self>,
        hidden: &mut Self::Rows,
    ) where
        Self: Sized;

    /// From one layer's answers to the next layer's rows: [`Self::combine`], then [`Self::attend`] of the layer after it,
    /// where there is one. A device that records its work has one record for both.
    #[allow(clippy::too_many_arguments, reason = "those of both calls")]
    fn advance(
        &self,
        queue: &mut Self::Queue,
        layer: usize,
        answered: Option<&Answered<Self>>,
        step: &Self::Step,
        hidden: &mut Self::Rows,
        kv: &mut Self::Kv,
    ) -> Option<Attended<Self::Activations, Self::Routes>>
    where
        Self: Sized,
    {
        if let Some(answered) = answered {
            self.combine(queue, layer, answered, hidden);
        }
        let next = layer + 1;
        (next < self.config().layers).then(|| self.attend(queue, next, step, hidden, kv))
    }

    /// The last norm and the head for every span that wants logits: (spans, vocabulary).
    fn logits(&self, queue: &mut Self::Queue, step: &Self::Step, hidden: &Self::Rows) -> Self::Rows;

    /// Draws a token of each of some rows of logits; `None` where a row is not finite.
    fn sample(
        &self,
        queue: &mut Self::Queue,
        logits: &Self::Rows,
        draws: &[Draw],
    ) -> Pending<Vec<Option<Sampled>>>;

    /// Routes in host memory, for whoever sends rows elsewhere. Only those that a gate chose.
    fn routes(&self, queue: &mut Self::Queue, routes: &Self::Routes) -> Pending<Routes>;

    /// Pairs on the device, of rows that came from elsewhere; they have no weights.
    fn pairs(&self, queue: &mut Self::Queue, pairs: &[Pair]) -> Self::Routes;

    /// Some rows in host memory, in the order of `rows`.
    fn gather(
        &self,
        queue: &mut Self::Queue,
        from: &Self::Activations,
        rows: &[u32],
    ) -> Pending<Self::HostRows>;

    /// Rows of bf16 from host memory (n, hidden), which may change once this returns.
    fn upload(&self, queue: &mut Self::Queue, rows: &[u16]) -> Self::Activations;

    /// Puts row i of `rows` (n, hidden), in host memory, into row `at[i]`, which no other i has.
    fn place(&self, queue: &mut Self::Queue, rows: &[u16], at: &[u32], into: &mut Self::Activations);

    /// To host memory, row-major: for whoever compares.
    fn download(&self, queue: &mut Self::Queue, rows: &Self::Rows) -> Pending<Vec<f32>>;
}
