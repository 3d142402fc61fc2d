//! How a metric is declared: made, and registered under its name.

use expertmesh_metrics::Registry;
use prometheus::core::Collector;
use prometheus::{Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts};

/// Declares metrics in a registry. Two of one name, or a malformed name, are a mistake of this module's users, which
/// the test of `docs/metrics.md` finds.
pub(super) struct Declare<'a>(pub(super) &'a Registry);

impl Declare<'_> {
    pub(super) fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.registered(IntGauge::new(name, help))
    }

    /// A gauge of a share, 0 to 1.
    pub(super) fn share(&self, name: &str, help: &str) -> Gauge {
        self.registered(Gauge::new(name, help))
    }

    pub(super) fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.registered(IntCounter::new(name, help))
    }

    pub(super) fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.registered(IntCounterVec::new(Opts::new(name, help), labels))
    }

    /// A histogram whose buckets end at `bounds`, in seconds.
    pub(super) fn histogram(&self, name: &str, help: &str, bounds: &[f64]) -> Histogram {
        self.registered(Histogram::with_opts(HistogramOpts::new(name, help).buckets(bounds.to_vec())))
    }

    /// Histograms by one label, whose buckets end at `bounds`, in seconds.
    pub(super) fn histograms(&self, name: &str, help: &str, label: &str, bounds: &[f64]) -> HistogramVec {
        let options = HistogramOpts::new(name, help).buckets(bounds.to_vec());
        self.registered(HistogramVec::new(options, &[label]))
    }

    fn registered<C: Collector + Clone + 'static>(&self, collector: Result<C, prometheus::Error>) -> C {
        let collector = collector.expect("a metric's name and labels are valid");
        self.0.add(collector).expect("a metric's name is its own")
    }
}

/// `count` bounds from `first` on, each `factor` times the one before.
pub(super) fn geometric(first: f64, factor: f64, count: i32) -> Vec<f64> {
    (0..count).map(|step| first * factor.powi(step)).collect()
}
