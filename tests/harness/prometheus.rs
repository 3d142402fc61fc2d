//! The Prometheus beside the test cluster: a real one, with deploy/prometheus.yaml, its alerts, and a scrape every two seconds.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde_json::Value;

use crate::http;
use crate::kubernetes::run;

/// One series of an answer.
#[derive(Debug, Clone)]
pub struct Series {
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

/// Where it answers: `http://ADDRESS:PORT`, for pods too. Started by the first test that asks; it ends with the cluster.
pub fn url() -> &'static str {
    static URL: OnceLock<String> = OnceLock::new();
    URL.get_or_init(|| run("tests/cluster/prometheus.sh", &[], None).expect("Prometheus starts"))
}

/// An instant query: a series per label set, none where there is nothing.
pub fn query(expression: &str) -> Result<Vec<Series>, String> {
    let asked = format!("{}/api/v1/query", url());
    let (status, text) = http::get_about(&asked, "query", expression)?;
    let answer: Value = serde_json::from_str(&text).map_err(|error| format!("{status}: {text}: {error}"))?;
    let result = answer["data"]["result"].as_array().ok_or(format!("{status}: {text}"))?;
    result.iter().map(|series| one(series).ok_or(format!("not a vector: {series}"))).collect()
}

fn one(series: &Value) -> Option<Series> {
    let labels = series["metric"].as_object()?.iter();
    let labels = labels.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_string())));
    Some(Series { labels: labels.collect(), value: series["value"][1].as_str()?.parse().ok()? })
}
