//! What the decisions drive: a set of workers and frontends that can be seen and acted upon.

pub(crate) mod kubernetes;
pub(crate) mod process;

use expertmesh_decide::action::Action;
use expertmesh_decide::observation::Observation;

/// Kubernetes or processes. Thin: it looks and does, and decides nothing.
pub(crate) trait Fleet {
    type Error: std::error::Error + Send + Sync + 'static;

    /// What there is now. Reads only; answers from memory where a stream or a watch keeps it fresh.
    async fn observe(&mut self) -> Result<Observation, Self::Error>;

    /// Does the actions in their order and stops at the first that fails: what follows a `Place` assumes that
    /// the placement was written durably. Every action may come again; doing it twice does it once.
    async fn act(&mut self, actions: &[Action]) -> Result<(), Self::Error>;
}
