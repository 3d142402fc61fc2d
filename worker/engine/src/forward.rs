//! The forward pass: one screen, whatever the device and wherever the experts.

use std::convert::Infallible;

use expertmesh_model::expert::ExpertId;
use expertmesh_scheduler::Step;

use crate::backend::{Answered, Attended, Backend};
use crate::store::{NotResident, Pinned};

/// How the rows of a mixture-of-experts layer reach their experts.
pub trait Exchange<B: Backend> {
    /// Rows that are on their way.
    type InFlight;
    type Error;

    /// Sends rows to experts that are elsewhere; does not wait for them.
    fn dispatch(
        &mut self,
        backend: &B,
        queue: &mut B::Queue,
        layer: usize,
        normed: &B::Activations,
        routes: &B::Routes,
    ) -> Result<Self::InFlight, Self::Error>;

    /// Computes what is here, waits for the rest: (pairs, hidden) in the order of `routes`, unweighted.
    fn collect(
        &mut self,
        backend: &B,
        queue: &mut B::Queue,
        normed: &B::Activations,
        routes: &B::Routes,
        in_flight: Self::InFlight,
    ) -> Result<B::Activations, Self::Error>;
}

/// What a layer left behind, for whoever compares.
pub struct Seen<'a, B: Backend> {
    pub layer: usize,
    /// (rows, hidden), the residual stream after the layer.
    pub hidden: &'a B::Rows,
    /// The gate's choice; a dense layer has none.
    pub routes: Option<&'a B::Routes>,
}

/// Looks at what each layer leaves behind.
pub type Observer<'a, B> = &'a mut dyn FnMut(&mut <B as Backend>::Queue, Seen<'_, B>);

/// Computes a step: (spans that want logits, vocabulary). The latents of its rows are in `kv` afterwards.
pub fn forward<B: Backend, X: Exchange<B>>(
    backend: &B,
    queue: &mut B::Queue,
    step: &Step,
    kv: &mut B::Kv,
    exchange: &mut X,
    mut observer: Option<Observer<'_, B>>,
) -> Result<B::Rows, X::Error> {
    let step = backend.begin(queue, step);
    let mut hidden = backend.embed(queue, &step); // (rows, hidden)
    let mut next = Some(backend.attend(queue, 0, &step, &mut hidden, kv));
    let mut layer = 0;
    while let Some(attended) = next {
        let answered = match attended {
            Attended::Dense => None,
            Attended::Moe { normed, routes } => {
                let in_flight = exchange.dispatch(backend, queue, layer, &normed, &routes)?;
                let shared = backend.shared(queue, layer, &normed); // (rows, hidden)
                let answers = exchange.collect(backend, queue, &normed, &routes, in_flight)?; // (pairs, hidden)
                Some(Answered { shared, routes, answers })
            }
        };
        next = match &mut observer {
            None => backend.advance(queue, layer, answered.as_ref(), &step, &mut hidden, kv),
            Some(observe) => {
                if let Some(answered) = &answered {
                    backend.combine(queue, layer, answered, &mut hidden);
                }
                let routes = answered.as_ref().map(|answered| &answered.routes);
                observe(queue, Seen { layer, hidden: &hidden, routes });
                backend.advance(queue, layer, None, &step, &mut hidden, kv)
            }
        };
        layer += 1;
    }
    Ok(backend.logits(queue, &step, &hidden)) // (spans, vocabulary)
}

/// One process: every expert is computed here, and pinned for as long as this lives.
pub struct LocalExchange(Vec<Pinned>);

impl LocalExchange {
    /// Pins all experts of the model; an error names the first that is not resident.
    pub fn new<B: Backend>(backend: &B) -> Result<Self, NotResident> {
        let all: Vec<u32> = (0..backend.config().experts() as u32).collect();
        let layers = (0..backend.config().layers).map(|layer| match backend.config().is_moe(layer) {
            true => backend.pin(layer, &all),
            false => Pinned::default(),
        });
        let layers: Vec<Pinned> = layers.collect();
        let missing = layers.iter().find_map(|pinned| Some((pinned.layer(), *pinned.missing().first()?)));
        match missing {
            None => Ok(Self(layers)),
            Some((layer, expert)) => Err(NotResident(ExpertId::new(layer as u32, expert))),
        }
    }
}

impl<B: Backend> Exchange<B> for LocalExchange {
    /// The layer whose experts compute next.
    type InFlight = usize;
    type Error = Infallible;

    fn dispatch(
        &mut self,
        _: &B,
        _: &mut B::Queue,
        layer: usize,
        _: &B::Activations,
        _: &B::Routes,
    ) -> Result<usize, Infallible> {
        Ok(layer)
    }

    fn collect(
        &mut self,
        backend: &B,
        queue: &mut B::Queue,
        normed: &B::Activations,
        routes: &B::Routes,
        layer: usize,
    ) -> Result<B::Activations, Infallible> {
        let mut answers = backend.answers(queue, routes);
        backend.experts(queue, &self.0[layer], normed, routes, &mut answers);
        Ok(answers)
    }
}
