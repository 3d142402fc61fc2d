//! The labels of a deployment's series, and how its series end.

use prometheus::core::{Collector, MetricVec, MetricVecBuilder};

use crate::key::Key;

/// The labels of what is told per ModelDeployment.
pub(super) const DEPLOYMENT: [&str; 2] = ["namespace", "name"];

/// The labels of what is told per ModelDeployment, and by more.
pub(super) fn by<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&DEPLOYMENT[..], more].concat()
}

/// The values of the labels [`DEPLOYMENT`].
pub(super) fn of(key: &Key) -> [&str; 2] {
    [&key.namespace, &key.name]
}

/// Removes all series of a deployment, whatever their other labels.
pub(super) fn remove_all<B: MetricVecBuilder>(family: &MetricVec<B>, key: &Key)
where
    MetricVec<B>: Collector,
{
    remove(family, key, |_| true);
}

/// Removes those series of a deployment whose label values, in the order of the declaration, are as `which` says.
pub(super) fn remove<B: MetricVecBuilder>(family: &MetricVec<B>, key: &Key, which: impl Fn(&[&str]) -> bool)
where
    MetricVec<B>: Collector,
{
    let names = family.desc().first().map(|desc| desc.variable_labels.clone()).unwrap_or_default();
    for metric in family.collect().iter().flat_map(|family| family.get_metric()) {
        let value = |name: &String| {
            let label = metric.get_label().iter().find(|label| label.name() == name);
            label.map_or("", |label| label.value())
        };
        let values: Vec<&str> = names.iter().map(value).collect();
        if values[..2] == of(key) && which(&values) {
            let _ = family.remove_label_values(&values);
        }
    }
}
