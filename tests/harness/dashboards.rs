//! deploy/dashboards as Grafana reads them: panels, and what they ask Prometheus.

use serde_json::Value;

use crate::{prometheus, root};

pub struct Dashboard {
    /// `models.json`.
    pub file: String,
    pub json: Value,
}

/// One query of a panel.
#[derive(Debug, Clone)]
pub struct Query {
    /// `models.json, panel 3, "Workers", A`.
    pub place: String,
    /// As it is in the file, with Grafana's variables.
    pub expression: String,
}

/// All of them, by name.
pub fn all() -> Vec<Dashboard> {
    let folder = root().join("deploy/dashboards");
    let entries = std::fs::read_dir(folder).expect("dashboards").map(|entry| entry.expect("a file").path());
    let mut files: Vec<_> = entries.collect();
    files.sort();
    let read = |path: &std::path::PathBuf| {
        let file = path.file_name().and_then(|name| name.to_str()).expect("a plain name").to_string();
        let text = std::fs::read_to_string(path).expect("a text");
        let json = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{file}: {error}"));
        Dashboard { file, json }
    };
    files.iter().map(read).collect()
}

impl Dashboard {
    /// Its panels, rows included, in the file's order.
    pub fn panels(&self) -> &[Value] {
        self.json["panels"].as_array().map_or(&[], Vec::as_slice)
    }

    pub fn variables(&self) -> &[Value] {
        self.json["templating"]["list"].as_array().map_or(&[], Vec::as_slice)
    }

    pub fn queries(&self) -> Vec<Query> {
        let of_panel = |panel: &Value| -> Vec<Query> {
            let targets = panel["targets"].as_array().map_or(&[][..], Vec::as_slice);
            let query = |target: &Value| Query {
                place: format!(
                    "{}, panel {}, {}, {}",
                    self.file, panel["id"], panel["title"], target["refId"]
                ),
                expression: target["expr"].as_str().unwrap_or_default().into(),
            };
            targets.iter().map(query).collect()
        };
        self.panels().iter().flat_map(of_panel).collect()
    }
}

impl Query {
    /// The expression with the variables' values in it.
    pub fn of(&self, namespace: &str, name: &str) -> String {
        let interval = self.expression.replace("$__rate_interval", "1m");
        interval.replace("$namespace", namespace).replace("$name", name)
    }
}

/// The queries that the Prometheus beside the cluster has no number for, each with its expression: a panel that shows nothing.
pub fn silent(namespace: &str, name: &str) -> Result<Vec<String>, String> {
    let mut silent = Vec::new();
    for query in all().iter().flat_map(Dashboard::queries) {
        let expression = query.of(namespace, name);
        if prometheus::query(&expression)?.iter().all(|series| series.value.is_nan()) {
            silent.push(format!("{}: {expression}", query.place));
        }
    }
    Ok(silent)
}
