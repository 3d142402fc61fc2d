//! The fast path beside the reference: a table of layers, then what they lead to.

use expertmesh_engine::{Backend, CpuBackend, Deviation, LayerDeviation, Reference, Tolerance, Trace};
use expertmesh_model::error::ModelError;

use super::verdict::word;

/// Prints the table, and says whether all is within what the format's rounding explains.
pub(super) fn fast_and_reference(
    backend: &CpuBackend,
    reference: &Reference,
    tokens: &[u32],
    trace: &Trace,
) -> Result<bool, ModelError> {
    let options = backend.options();
    let tolerance = Tolerance::of(options.weights, backend.config());
    let deviation = Deviation::measure(backend, reference, tokens, trace)?;

    println!(
        "\nthe fast path beside the reference: {} weights, {} on {}, {} threads; layers from the same input",
        options.weights, options.numerics, options.isa, options.threads
    );
    println!(
        "{:<12} {:<12} {:<12} {:>10} {:>10} {:>10} {:>10}",
        "layer", "rows", "verdict", "hidden", "gate", "rerouted", "margin"
    );
    let mut all_ok = true;
    for (layer, found) in deviation.layers.iter().enumerate() {
        all_ok &= print_layer(layer, found, tokens.len(), &tolerance);
    }
    // A NaN is not within anything.
    let divergence_ok = deviation.divergence <= tolerance.untrained;
    print_whole(&deviation, tokens.len(), divergence_ok);
    print_tolerance(&tolerance);
    Ok(all_ok && divergence_ok)
}

/// Prints how far the logits are from the reference's, over all layers.
fn print_whole(deviation: &Deviation, rows: usize, ok: bool) {
    println!("{:<12} {rows:<12} {:<12} {:>10.2e}", "logits", "", deviation.logits);
    println!("{:<12} {rows:<12} {:<12} {:>10.2e}", "mean KL", word(ok), deviation.divergence);
}

/// Prints how far each of the numbers above may be from the reference's.
fn print_tolerance(tolerance: &Tolerance) {
    println!(
        "{:<12} {:<12} {:<12} {:>10.2e} {:>10.2e} {:>9}% {:>10.4}",
        "at most",
        "",
        "",
        tolerance.layer,
        tolerance.layer,
        tolerance.rerouted * 100.0,
        tolerance.margin
    );
    println!(
        "{:<12} {:<12} {:<12} {:>10.2e} (of text that the model knows: {:.2e})\n",
        "", "", "mean KL", tolerance.untrained, tolerance.divergence
    );
}

fn print_layer(layer: usize, found: &LayerDeviation, rows: usize, tolerance: &Tolerance) -> bool {
    let ok = found.is_within(tolerance);
    let gate = match found.routed {
        0 => String::new(),
        _ => {
            let margin = found.rerouted.iter().map(|(_, margin)| *margin).fold(0.0, f32::max);
            format!(" {:>10.2e} {:>10} {margin:>10.4}", found.gate, found.rerouted.len())
        }
    };
    println!("{layer:<12} {rows:<12} {:<12} {:>10.2e}{gate}", word(ok), found.hidden);
    ok
}
