//! `expertmesh metrics`: the beginning of docs/metrics.md. `expertmesh-worker metrics` prints the rest.

use crate::metrics::Metrics;

const PREAMBLE: &str = "# Metrics

Made by `make generated` from the code that declares them; do not edit.

Every process of a deployment serves `/metrics` in Prometheus' text format, workers and frontends on port 9090. The pods' labels say whose
a series is: `app.kubernetes.io/instance` is the ModelDeployment's name. Names that begin with `vllm:` are vLLM's, with vLLM's
meaning and bounds, so that dashboards, scalers and routers made for it work unchanged. The text format has no exemplars; from a
latency to its trace leads the time (docs/tracing.md).
";

pub(crate) fn run() -> anyhow::Result<()> {
    print!("{}", beginning());
    Ok(())
}

fn beginning() -> String {
    PREAMBLE.to_string() + &Metrics::new().section()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_metrics_is_the_one_that_the_code_makes() {
        let written = include_str!("../../../docs/metrics.md");
        assert!(written.starts_with(&beginning()), "run `make generated`");
    }
}
