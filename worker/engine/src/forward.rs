//! The forward pass: one screen, whatever the device and wherever the experts.

use expertmesh_scheduler::Step;

use crate::{Attended, Backend, ExpertGroup, NotResident, Routes};

/// How the rows of a mixture-of-experts layer reach their experts.
pub trait Exchange<B: Backend> {
    type Error;

    /// Sends rows to experts that are elsewhere; does not wait.
    fn dispatch(
        &mut self,
        backend: &B,
        layer: usize,
        normed: &B::Activations,
        routes: &Routes,
    ) -> Result<(), Self::Error>;

    /// Computes what is here, waits for the rest: (rows · top_k, hidden) in the order of `routes`, unweighted.
    fn collect(
        &mut self,
        backend: &B,
        layer: usize,
        normed: &B::Activations,
        routes: &Routes,
    ) -> Result<B::Activations, Self::Error>;
}

/// What a layer left behind, for whoever compares.
pub struct Seen<'a, B: Backend> {
    pub layer: usize,
    /// (rows, hidden), the residual stream after the layer.
    pub hidden: &'a B::Rows,
    /// The gate's choice; a dense layer has none.
    pub routes: Option<&'a Routes>,
}

/// Computes a step: (spans that want logits, vocabulary). The latents of its rows are in `kv` afterwards.
pub fn forward<B: Backend, X: Exchange<B>>(
    backend: &B,
    step: &Step,
    kv: &mut B::Kv,
    exchange: &mut X,
    observe: &mut impl FnMut(Seen<'_, B>),
) -> Result<B::Rows, X::Error> {
    let mut hidden = backend.embed(step); // (rows, hidden)
    for layer in 0..backend.config().layers() {
        match backend.attend(layer, step, &mut hidden, kv) {
            Attended::Dense => observe(Seen { layer, hidden: &hidden, routes: None }),
            Attended::Moe { normed, routes } => {
                exchange.dispatch(backend, layer, &normed, &routes)?;
                let shared = backend.shared(layer, &normed); // (rows, hidden)
                let answers = exchange.collect(backend, layer, &normed, &routes)?; // (rows · top_k, hidden)
                backend.combine(layer, &mut hidden, &shared, &routes, &answers);
                observe(Seen { layer, hidden: &hidden, routes: Some(&routes) });
            }
        }
    }
    Ok(backend.logits(step, &hidden)) // (spans, vocabulary)
}

/// Routes turned around: the rows of each expert.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Grouped {
    /// Ascending by expert, rows ascending within an expert.
    pub groups: Vec<ExpertGroup>,
    /// For every row of every group, in their order: its place among the answers, row · top_k + slot.
    pub at: Vec<u32>,
}

/// The rows of each expert, of some pairs of row and expert: row · top_k + slot.
pub fn group(routes: &Routes, pairs: impl IntoIterator<Item = u32>) -> Grouped {
    let of_pair = |pair: u32| (routes.experts[pair as usize], pair);
    let mut places: Vec<(u32, u32)> = pairs.into_iter().map(of_pair).collect(); // (expert, place among the answers)
    places.sort_unstable();
    let top_k = routes.top_k as u32;
    let groups = places.chunk_by(|a, b| a.0 == b.0).map(|chunk| ExpertGroup {
        expert: chunk[0].0,
        rows: chunk.iter().map(|&(_, place)| place / top_k).collect(),
    });
    Grouped { groups: groups.collect(), at: places.iter().map(|&(_, place)| place).collect() }
}

/// One process: every expert is computed here and must be resident.
#[derive(Debug, Clone, Copy, Default)]
pub struct LocalExchange;

impl<B: Backend> Exchange<B> for LocalExchange {
    type Error = NotResident;

    fn dispatch(&mut self, _: &B, _: usize, _: &B::Activations, _: &Routes) -> Result<(), NotResident> {
        Ok(())
    }

    fn collect(
        &mut self,
        backend: &B,
        layer: usize,
        normed: &B::Activations,
        routes: &Routes,
    ) -> Result<B::Activations, NotResident> {
        let grouped = group(routes, 0..routes.experts.len() as u32);
        let computed = backend.experts(layer, normed, &grouped.groups)?; // (rows · top_k, hidden), by expert
        let mut answers = backend.zeros(routes.experts.len()); // (rows · top_k, hidden), by row
        backend.scatter(&computed, &grouped.at, &mut answers);
        Ok(answers)
    }
}
