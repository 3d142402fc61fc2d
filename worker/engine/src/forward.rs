//! The forward pass: one screen, whatever the device and wherever the experts.

use expertmesh_scheduler::Step;

use crate::backend::{Attended, Backend};
use crate::routes::{NotResident, Routes, group};

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
    for layer in 0..backend.config().layers {
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
