//! A registry of metrics that can say what was declared with it, so that `docs/metrics.md` follows from the code.

pub mod declare;

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::Collector;
use prometheus::proto::{MetricFamily, MetricType};

/// Metrics that are exported together, and how each was declared; clones share them.
#[derive(Clone, Default)]
pub struct Registry {
    registry: prometheus::Registry,
    declared: Arc<Mutex<Vec<Declared>>>,
}

/// A metric as it was declared, whether or not it has a series.
struct Declared {
    name: String,
    kind: MetricType,
    labels: Vec<String>,
    help: String,
}

impl Registry {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a metric, and gives it back.
    ///
    /// # Errors
    ///
    /// Where there is one of that name.
    pub fn add<C: Collector + Clone + 'static>(&self, collector: C) -> Result<C, prometheus::Error> {
        self.registry.register(Box::new(collector.clone()))?;
        // A family without series is collected too, and knows its type; its labels are known to the description only.
        let declared = collector.desc().into_iter().zip(collector.collect()).map(|(desc, family)| {
            let constant = desc.const_label_pairs.iter().map(|pair| pair.name().to_string());
            Declared {
                name: desc.fq_name.clone(),
                kind: family.get_field_type(),
                labels: constant.chain(desc.variable_labels.iter().cloned()).collect(),
                help: desc.help.clone(),
            }
        });
        self.declared.lock().unwrap_or_else(PoisonError::into_inner).extend(declared);
        Ok(collector)
    }

    /// All series with their values of now.
    #[must_use]
    pub fn gather(&self) -> Vec<MetricFamily> {
        self.registry.gather()
    }

    /// A section of `docs/metrics.md`: what `exporter` exports, by name.
    #[must_use]
    pub fn section(&self, exporter: &str) -> String {
        let declared = self.declared.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rows: Vec<&Declared> = declared.iter().collect();
        rows.sort_by_key(|metric| &metric.name);
        let mut text =
            format!("\n## {exporter}\n\n| name | type | labels | unit | meaning |\n|---|---|---|---|---|\n");
        for Declared { name, kind, labels, help } in rows {
            let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
            let (kind, unit, help) = (type_name(*kind), unit(name), help.replace('|', "\\|"));
            // Writing to a string cannot fail.
            let _ = writeln!(text, "| `{name}` | {kind} | {} | {unit} | {help} |", labels.join(", "));
        }
        text
    }
}

fn type_name(kind: MetricType) -> &'static str {
    match kind {
        MetricType::COUNTER => "counter",
        MetricType::GAUGE => "gauge",
        MetricType::HISTOGRAM => "histogram",
        MetricType::SUMMARY => "summary",
        MetricType::UNTYPED => "untyped",
    }
}

/// The unit of a metric, which its name's suffix says; a count has none.
fn unit(name: &str) -> &'static str {
    let name = name.strip_suffix("_total").unwrap_or(name);
    let units =
        [("_seconds", "seconds"), ("_bytes", "bytes"), ("_ratio", "ratio"), ("_perc", "share, 0 to 1")];
    units.into_iter().find(|(suffix, _)| name.ends_with(suffix)).map_or("", |(_, unit)| unit)
}

#[cfg(test)]
mod tests {
    use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts};

    use super::*;

    #[test]
    fn what_was_declared_is_listed_also_without_a_series() {
        let registry = Registry::new();
        registry.add(IntGauge::new("b", "B.").unwrap()).unwrap();
        registry
            .add(IntCounterVec::new(Opts::new("c_bytes_total", "C, or d|e."), &["x", "y"]).unwrap())
            .unwrap();
        registry.add(HistogramVec::new(HistogramOpts::new("a_seconds", "A."), &["x"]).unwrap()).unwrap();
        let expected = "\n## Here\n\n| name | type | labels | unit | meaning |\n|---|---|---|---|---|\n\
                        | `a_seconds` | histogram | `x` | seconds | A. |\n\
                        | `b` | gauge |  |  | B. |\n\
                        | `c_bytes_total` | counter | `x`, `y` | bytes | C, or d\\|e. |\n";
        assert_eq!(registry.section("Here"), expected);
    }

    #[test]
    fn a_name_is_taken_once() {
        let registry = Registry::new();
        registry.add(IntGauge::new("b", "B.").unwrap()).unwrap();
        assert!(registry.add(IntGauge::new("b", "B.").unwrap()).is_err());
    }
}
