//! How a metric is declared: made, and registered under its name.

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts,
};

use crate::Registry;

/// Declares metrics in a registry. Two of one name, or a malformed name, are a mistake of who declares them, which the test
/// of `docs/metrics.md` finds: that is where this panics.
pub struct Declare<'a>(pub &'a Registry);

impl Declare<'_> {
    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.registered(IntGauge::new(name, help))
    }

    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.registered(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    /// Declares a gauge of a share, 0 to 1.
    pub fn share(&self, name: &str, help: &str) -> Gauge {
        self.registered(Gauge::new(name, help))
    }

    /// Gauges of fractions: ratios, or seconds.
    pub fn fractions(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.registered(GaugeVec::new(Opts::new(name, help), labels))
    }

    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.registered(IntCounter::new(name, help))
    }

    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.registered(IntCounterVec::new(Opts::new(name, help), labels))
    }

    /// A histogram whose buckets end at `bounds`, in seconds.
    pub fn histogram(&self, name: &str, help: &str, bounds: &[f64]) -> Histogram {
        self.registered(Histogram::with_opts(HistogramOpts::new(name, help).buckets(bounds.to_vec())))
    }

    /// Histograms by one label, whose buckets end at `bounds`, in seconds.
    pub fn histograms(&self, name: &str, help: &str, label: &str, bounds: &[f64]) -> HistogramVec {
        let options = HistogramOpts::new(name, help).buckets(bounds.to_vec());
        self.registered(HistogramVec::new(options, &[label]))
    }

    fn registered<C: Collector + Clone + 'static>(&self, collector: Result<C, prometheus::Error>) -> C {
        let collector = collector.expect("a metric's name and labels are valid");
        self.0.add(collector).expect("a metric's name is its own")
    }
}

/// `count` bounds from `first` on, each `factor` times the one before.
pub fn geometric(first: f64, factor: f64, count: i32) -> Vec<f64> {
    (0..count).map(|step| first * factor.powi(step)).collect()
}
