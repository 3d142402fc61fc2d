//! How far a backend's rounding takes it from the reference, and how far it may.

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::expert::ExpertId;
use expertmesh_model::format::WeightFormat;
use expertmesh_scheduler::{BlockAllocator, Span, Step};

use crate::backend::Backend;
use crate::forward::{Exchange, Seen, forward};
use crate::math::widen;
use crate::reference::forward::{Reference, Trace};
use crate::routes::Routes;
use crate::store::Pinned;

/// What is within a format's rounding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Mean KL divergence from the reference, in nats, of text that a model was trained for.
    pub divergence: f64,
    /// The same of a model whose weights are random, as those of tests/golden are: every choice in it is a close one, and
    /// a token that goes to another expert comes out as another.
    pub untrained: f64,
    /// Relative error of what a layer's gate sees, and of the layer's rows whose experts are the reference's, from the
    /// same residual stream.
    pub layer: f64,
    /// Other experts than the reference's are excused where its margin ([`Gated::margins`](crate::Gated)) is below.
    pub margin: f32,
    /// The share of rows that may need that excuse.
    pub rerouted: f64,
}

impl Tolerance {
    /// Of a model that is held in a format.
    ///
    /// Rounding to bf16 errs by 2⁻⁸ of a number at most, and it happens four times between the residual stream and a
    /// gate: what attention takes in, its latents or keys and values, what it mixed, and what the gate takes in. Hence
    /// the margin of weights that are held as they are stored. Others add their own rounding, and int8 and int4 that
    /// of rows to int8; int4 is for feed-forward parts only.
    pub fn of(weights: WeightFormat, config: &ModelConfig) -> Self {
        let (held, stored) = (weights.resolved(config), WeightFormat::Native.resolved(config));
        let (divergence, untrained, layer, margin, rerouted) = match held {
            WeightFormat::Fp8 if held != stored => (1e-3, 5e-2, 0.08, 1.0 / 16.0, 0.15),
            WeightFormat::Native | WeightFormat::Bf16 | WeightFormat::Fp8 => {
                (1e-3, 1e-2, 0.01, 1.0 / 64.0, 0.02)
            }
            WeightFormat::Int8 => (5e-3, 2e-2, 0.03, 1.0 / 32.0, 0.05),
            WeightFormat::Int4 => (3e-2, 1e-1, 0.15, 1.0 / 32.0, 0.05),
        };
        Self { divergence, untrained, layer, margin, rerouted }
    }
}

/// A backend's pass over a sequence beside the reference's. Layers are compared from the same residual stream, the
/// backend's, so that none answers for those before it.
#[derive(Debug, Clone, PartialEq)]
pub struct Deviation {
    pub layers: Vec<LayerDeviation>,
    /// ‖ours − theirs‖ / ‖theirs‖ of all logits, after all layers.
    pub logits: f64,
    /// Mean KL(reference ‖ ours) of the next token, in nats, after all layers.
    pub divergence: f64,
}

/// How far one layer of the backend is from the reference's.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerDeviation {
    /// ‖ours − theirs‖ / ‖theirs‖ of the residual stream after it, in rows whose experts are the reference's.
    pub hidden: f64,
    /// The same of what its gate saw, in all rows; 0 where there is none.
    pub gate: f64,
    /// Rows that a gate routed.
    pub routed: usize,
    /// Of each row that got other experts than the reference's: the row, and the reference's margin there.
    pub rerouted: Vec<(usize, f32)>,
}

impl LayerDeviation {
    /// Whether errors are within the tolerance, and other experts excused and rare: two rows, or the share.
    pub fn is_within(&self, tolerance: &Tolerance) -> bool {
        let most = (self.routed as f64 * tolerance.rerouted).max(2.0);
        self.hidden <= tolerance.layer
            && self.gate <= tolerance.layer
            && self.unexcused(tolerance) == 0
            && self.rerouted.len() as f64 <= most
    }

    /// Rows whose experts are not the reference's, and its margin does not excuse it.
    pub fn unexcused(&self, tolerance: &Tolerance) -> usize {
        // A margin that is no number excuses nothing.
        let excused = |margin: f32| margin < tolerance.margin;
        self.rerouted.iter().filter(|(_, margin)| !excused(*margin)).count()
    }
}

impl Deviation {
    /// Computes a sequence on `backend`, which loads the experts that it lacks, and each layer of it with the
    /// reference; `trace` is the reference's own pass over the same tokens.
    pub fn measure<B: Backend>(
        backend: &B,
        reference: &Reference,
        tokens: &[u32],
        trace: &Trace,
    ) -> Result<Self, ModelError> {
        let (passed, logits) = pass(backend, tokens)?;
        let mut before = reference.embed(tokens)?; // (T, hidden)
        let mut layers = Vec::with_capacity(passed.len());
        for (layer, ours) in passed.into_iter().enumerate() {
            layers.push(ours.compare(reference, layer, &before)?);
            before = ours.hidden;
        }
        let vocabulary = backend.config().vocabulary;
        Ok(Self {
            layers,
            logits: relative(&logits, &trace.logits),
            divergence: mean_divergence(&trace.logits, &logits, vocabulary),
        })
    }
}

/// What a backend's layer left behind.
struct Passed {
    /// (T, hidden)
    hidden: Vec<f32>,
    /// What its gate saw, (T, hidden), and chose.
    gate: Option<(Vec<f32>, Routes)>,
}

impl Passed {
    fn compare(
        &self,
        reference: &Reference,
        layer: usize,
        before: &[f32],
    ) -> Result<LayerDeviation, ModelError> {
        let (theirs, width) = (reference.layer_from(layer, before)?, reference.config().hidden);
        let (Some((normed, routes)), Some(gated)) = (&self.gate, &theirs.gate) else {
            let hidden = relative(&self.hidden, &theirs.hidden);
            return Ok(LayerDeviation { hidden, gate: 0.0, routed: 0, rerouted: Vec::new() });
        };
        let choices = |routes: &Routes| -> Vec<Vec<u32>> {
            routes.experts.chunks_exact(routes.top_k).map(<[u32]>::to_vec).collect()
        };
        let (ours, references) = (choices(routes), choices(&gated.routes));
        let same = |row: &usize| ours[*row] == references[*row];
        let of_same = |hidden: &[f32]| -> Vec<f32> {
            (0..ours.len()).filter(same).flat_map(|row| &hidden[row * width..][..width]).copied().collect()
        };
        Ok(LayerDeviation {
            hidden: relative(&of_same(&self.hidden), &of_same(&theirs.hidden)),
            gate: relative(normed, &gated.normed),
            routed: ours.len(),
            rerouted: (0..ours.len()).filter(|row| !same(row)).map(|row| (row, gated.margins[row])).collect(),
        })
    }
}

/// A sequence in one step, with the logits of every row, a span per token: (T, vocabulary).
fn pass<B: Backend>(backend: &B, tokens: &[u32]) -> Result<(Vec<Passed>, Vec<f32>), ModelError> {
    let blocks = BlockAllocator::needed(tokens.len());
    let table: Vec<u32> = (0..blocks as u32).collect();
    let span = |(start, &token)| Span { tokens: vec![token], start, blocks: table.clone(), logits: true };
    let step = Step { spans: tokens.iter().enumerate().map(span).collect() };
    let (mut queue, mut kv) = (backend.queue()?, backend.allocate_kv(blocks)?);
    let (mut watched, mut passed) = (Watched::default(), Vec::new());
    let mut observe = |queue: &mut B::Queue, seen: Seen<'_, B>| {
        let routes = seen.routes.map(|routes| backend.routes(queue, routes).wait());
        passed.push((backend.download(queue, seen.hidden).wait(), routes));
    };
    let logits = forward(backend, &mut queue, &step, &mut kv, &mut watched, Some(&mut observe))?;
    let logits = backend.download(&mut queue, &logits).wait();
    let mut inputs = watched.0.into_iter();
    let layer = |(hidden, routes): (Vec<f32>, Option<Routes>)| {
        let gate = routes.and_then(|routes| Some((inputs.next()?, routes)));
        Passed { hidden, gate }
    };
    Ok((passed.into_iter().map(layer).collect(), logits))
}

/// Keeps what every gate saw: (T, hidden) each.
#[derive(Default)]
struct Watched(Vec<Vec<f32>>);

impl<B: Backend> Exchange<B> for Watched {
    /// The experts that were chosen.
    type InFlight = Pinned;
    type Error = ModelError;

    fn dispatch(
        &mut self,
        backend: &B,
        queue: &mut B::Queue,
        layer: usize,
        normed: &B::Activations,
        routes: &B::Routes,
    ) -> Result<Pinned, ModelError> {
        let Routes { top_k, mut experts, .. } = backend.routes(queue, routes).wait();
        let rows: Vec<u32> = (0..(experts.len() / top_k) as u32).collect();
        let widened = backend.gather(queue, normed, &rows).wait().iter().copied().map(widen).collect();
        self.0.push(widened);
        experts.sort_unstable();
        experts.dedup();
        for &expert in &experts {
            backend.load(ExpertId::new(layer as u32, expert))?;
        }
        Ok(backend.pin(layer, &experts))
    }

    fn collect(
        &mut self,
        backend: &B,
        queue: &mut B::Queue,
        normed: &B::Activations,
        routes: &B::Routes,
        chosen: Pinned,
    ) -> Result<B::Activations, ModelError> {
        let mut answers = backend.answers(queue, routes);
        backend.experts(queue, &chosen, normed, routes, &mut answers);
        Ok(answers)
    }
}

/// ‖ours − theirs‖ / ‖theirs‖; 0 where both are the same, and NaN where anything is.
pub fn relative(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len(), "of the same shape");
    let square = |x: f64| x * x;
    let difference: f64 = ours.iter().zip(theirs).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let size: f64 = theirs.iter().map(|&b| square(f64::from(b))).sum();
    if difference == 0.0 { 0.0 } else { (difference / size).sqrt() }
}

/// KL(reference ‖ ours) in nats, the mean over rows of logits (rows, vocabulary).
pub fn mean_divergence(reference: &[f32], ours: &[f32], vocabulary: usize) -> f64 {
    let rows = reference.chunks_exact(vocabulary).zip(ours.chunks_exact(vocabulary));
    let count = rows.len() as f64;
    rows.map(|(reference, ours)| {
        let (reference, ours) = (log_softmax(reference), log_softmax(ours));
        reference.iter().zip(ours).map(|(p, q)| libm::exp(*p) * (p - q)).sum::<f64>()
    })
    .sum::<f64>()
        / count
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| libm::exp(f64::from(logit - max))).sum();
    logits.iter().map(|&logit| f64::from(logit - max) - libm::log(sum)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divergence_is_that_of_the_distributions_whatever_is_added_to_the_logits() {
        let (half, quarter) = (0.0f32, [0.75f32.ln(), 0.25f32.ln()]);
        let expected = 0.5 * (0.5f64 / 0.75).ln() + 0.5 * (0.5f64 / 0.25).ln();
        let divergence = mean_divergence(&[half, half], &quarter, 2);
        assert!((divergence - expected).abs() < 1e-6, "{divergence}");
        let moved = [quarter[0] + 9.0, quarter[1] + 9.0];
        assert!(
            (mean_divergence(&[5.0, 5.0, 1.0, 1.0], &[moved, moved].concat(), 2) - expected).abs() < 1e-6
        );
        assert_eq!(mean_divergence(&quarter, &quarter, 2), 0.0);
        assert!(mean_divergence(&quarter, &[f32::NAN, 0.0], 2).is_nan());
    }

    #[test]
    fn what_is_not_a_number_is_no_small_error() {
        assert_eq!((relative(&[1.0, 2.0], &[1.0, 2.0]), relative(&[3.0], &[0.0])), (0.0, f64::INFINITY));
        assert!(relative(&[f32::NAN, 2.0], &[1.0, 2.0]).is_nan());
        let layer =
            LayerDeviation { hidden: 0.0, gate: 0.0, routed: 2, rerouted: vec![(0, 0.001), (1, 0.1)] };
        let tolerance =
            Tolerance { divergence: 1.0, untrained: 1.0, layer: 1.0, margin: 0.01, rerouted: 1.0 };
        assert_eq!((layer.unexcused(&tolerance), layer.is_within(&tolerance)), (1, false));
        assert!(layer.is_within(&Tolerance { margin: 0.2, ..tolerance }));
        assert!(
            !LayerDeviation { hidden: f64::NAN, ..layer.clone() }
                .is_within(&Tolerance { margin: 0.2, ..tolerance })
        );
        let broken = LayerDeviation { rerouted: vec![(0, f32::NAN)], ..layer };
        assert_eq!(broken.unexcused(&tolerance), 1);
    }
}
