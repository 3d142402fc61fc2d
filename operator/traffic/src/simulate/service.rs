//! How long a worker takes: a step's time as a line through what `make bench` measured, and how long workers take to come and go.

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use expertmesh_model::files;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Fitted from what README.md publishes; the file says how.
pub(crate) const DEFAULT: &str = include_str!("bench.yaml");
/// A file of a few numbers, or of a bench's samples.
const MAX_BYTES: u64 = 1 << 20;

/// How long steps and workers take, in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ServiceModel {
    pub(crate) step: StepTime,
    pub(crate) batch: Batch,
    pub(crate) worker: Lifecycle,
}

/// A step's time: fixed + decodeRow · (rows of sequences that have a token) + prefillRow · (rows of prompts) +
/// contextToken · (positions that all rows attend to).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct StepTime {
    pub(crate) fixed: f64,
    pub(crate) decode_row: f64,
    pub(crate) prefill_row: f64,
    #[serde(default)]
    pub(crate) context_token: f64,
}

/// What bounds a step, as in the worker's scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Batch {
    /// The most rows of a step.
    pub(crate) rows: u32,
    /// Sequences in the batch, and waiting on a worker.
    pub(crate) running: u32,
    pub(crate) waiting: u32,
}

/// How long a worker takes to come, phase by phase, and to go.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Lifecycle {
    /// Until its pod is on a node; until the process runs; until its experts are there and placed.
    pub(crate) schedule: f64,
    pub(crate) start: f64,
    pub(crate) load: f64,
    /// Until the others have copies of a leaving worker's experts; it serves meanwhile, and then its sequences move.
    pub(crate) copy: f64,
}

impl ServiceModel {
    pub(crate) fn read(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else { return Self::parse(DEFAULT).context("the built-in service model") };
        Self::parse(&read(path)?).with_context(|| path.display().to_string())
    }

    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let model: Self = serde_yaml::from_str(text)?;
        model.check()?;
        Ok(model)
    }

    fn check(&self) -> anyhow::Result<()> {
        let StepTime { fixed, decode_row, prefill_row, context_token } = self.step;
        let Lifecycle { schedule, start, load, copy } = self.worker;
        let times = [
            ("step.decodeRow", decode_row),
            ("step.prefillRow", prefill_row),
            ("step.contextToken", context_token),
            ("worker.schedule", schedule),
            ("worker.start", start),
            ("worker.load", load),
            ("worker.copy", copy),
        ];
        ensure!((1e-5..=60.0).contains(&fixed), "step.fixed: {fixed} is not from 0.00001 to 60 seconds");
        for (field, time) in times {
            ensure!((0.0..=86_400.0).contains(&time), "{field}: {time} is not from 0 to 86400 seconds");
        }
        let Batch { rows, running, waiting } = self.batch;
        for (field, bound) in [("rows", rows), ("running", running), ("waiting", waiting)] {
            ensure!((1..=1 << 20).contains(&bound), "batch.{field}: {bound} is not from 1 to {}", 1 << 20);
        }
        ensure!(running <= rows, "batch.running: {running} sequences do not fit in {rows} rows");
        Ok(())
    }

    /// From the decision to a ready worker, in seconds.
    pub(crate) fn start_up(&self) -> f64 {
        let Lifecycle { schedule, start, load, .. } = self.worker;
        schedule + start + load
    }

    /// The step's times of a summary of `make bench`, of bf16, the one format with all three rows; the rest as in `self`.
    ///
    /// decode-1 and decode-16 are steps of 1 and 16 rows whose contexts are short; prefill-512 is one step of 512 rows which
    /// attend to 256 positions in the mean.
    pub(crate) fn fitted(&self, summary: &Path) -> anyhow::Result<Self> {
        let text = read(summary)?;
        let fit = || {
            let summary: Value = serde_json::from_str(&text)?;
            let row = |name: &str| ours(&summary, &format!("{name}-bf16"));
            let (one, sixteen, prompt) =
                (1.0 / row("decode-1")?, 16.0 / row("decode-16")?, 512.0 / row("prefill-512")?);
            let step = StepTime::fit(one, sixteen, prompt, self.step.context_token)?;
            Ok::<_, anyhow::Error>(Self { step, ..self.clone() })
        };
        let fitted = fit().with_context(|| summary.display().to_string())?;
        fitted.check()?;
        Ok(fitted)
    }

    /// Time to the first token and per token of a request alone on a worker, in seconds.
    pub(crate) fn unloaded(&self, prompt: f64, output: f64) -> (f64, f64) {
        let StepTime { fixed, decode_row, prefill_row, context_token } = self.step;
        let steps = (prompt / f64::from(self.batch.rows)).ceil().max(1.0);
        let first = steps * fixed + prefill_row * prompt + context_token * prompt * prompt / 2.0;
        (first, fixed + decode_row + context_token * (prompt + output / 2.0))
    }
}

impl StepTime {
    /// From the seconds of steps of one row, of sixteen, and of a prompt of 512.
    fn fit(one: f64, sixteen: f64, prompt: f64, context_token: f64) -> anyhow::Result<Self> {
        let decode_row = (sixteen - one) / 15.0;
        let fixed = one - decode_row;
        let prefill_row = (prompt - fixed) / 512.0 - 256.0 * context_token;
        if !(decode_row >= 0.0 && fixed > 0.0 && prefill_row > 0.0) {
            bail!("steps of {one:.4} s, {sixteen:.4} s and {prompt:.4} s lie on no line with positive terms");
        }
        Ok(Self {
            fixed: round(fixed),
            decode_row: round(decode_row),
            prefill_row: round(prefill_row),
            context_token,
        })
    }
}

/// To a tenth of a microsecond.
fn round(seconds: f64) -> f64 {
    (seconds * 1e7).round() / 1e7
}

/// Our tokens a second of a row.
fn ours(summary: &Value, name: &str) -> anyhow::Result<f64> {
    let rows =
        summary["rows"].as_array().context("rows: missing; expected the summary.json of `make bench`")?;
    let row =
        rows.iter().find(|row| row["name"] == name).with_context(|| format!("rows: none is named {name}"))?;
    let rate = row["ours"].as_f64().filter(|rate| *rate > 0.0);
    rate.with_context(|| format!("rows: {name} has no tokens/s of ours"))
}

fn read(path: &Path) -> anyhow::Result<String> {
    let named = || path.display().to_string();
    let bytes = files::read(path, MAX_BYTES).with_context(named)?;
    String::from_utf8(bytes).map_err(|error| error.utf8_error()).with_context(named)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn default() -> ServiceModel {
        ServiceModel::parse(DEFAULT).unwrap()
    }

    /// README.md's table.
    const MEASURED: &str = r#"{"rows": [{"name": "decode-1-bf16", "ours": 48.9}, {"name": "decode-16-bf16", "ours": 158.8},
        {"name": "prefill-512-bf16", "ours": 423.0}]}"#;

    fn fitted(summary: &str) -> anyhow::Result<ServiceModel> {
        let path =
            std::env::temp_dir().join(format!("expertmesh-fit-{}-{}", std::process::id(), summary.len()));
        fs::write(&path, summary).unwrap();
        let fitted = default().fitted(&path);
        fs::remove_file(path).unwrap();
        fitted
    }

    #[test]
    fn what_is_no_small_file_is_told_at_once() {
        let error = |path: &str| format!("{:#}", default().fitted(Path::new(path)).unwrap_err());
        assert_eq!(error("/dev/zero"), "/dev/zero: a device or a pipe, not a file");
        assert_eq!(error("/nowhere/summary.json"), "/nowhere/summary.json: no such file");
        let large = format!("{:#}", fitted(&" ".repeat(MAX_BYTES as usize + 1)).unwrap_err());
        assert!(large.ends_with(": more than 1048576 bytes, which no such file has"), "{large}");
    }

    #[test]
    fn the_built_in_model_is_fitted_from_the_published_table() {
        assert_eq!(fitted(MEASURED).unwrap(), default());
    }

    #[test]
    fn a_fit_goes_through_the_measured_points() {
        let StepTime { fixed, decode_row, prefill_row, context_token } = default().step;
        let near =
            |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-3, "{found} {expected}");
        near(1.0 / (fixed + decode_row), 48.9);
        near(16.0 / (fixed + 16.0 * decode_row), 158.8);
        near(512.0 / (fixed + 512.0 * prefill_row + 512.0 * 256.0 * context_token), 423.0);
    }

    #[test]
    fn a_summary_without_the_rows_is_an_error_that_names_them() {
        let error = |summary: &str| format!("{:#}", fitted(summary).unwrap_err());
        assert!(error(&MEASURED.replace("-16", "-8")).ends_with("rows: none is named decode-16-bf16"));
        assert!(
            error(&MEASURED.replace("48.9", "null")).ends_with("rows: decode-1-bf16 has no tokens/s of ours")
        );
        assert!(error("{}").contains("expected the summary.json of `make bench`"));
        assert!(error(&MEASURED.replace("158.8", "15880.0")).contains("lie on no line"));
    }

    #[test]
    fn a_model_that_cannot_be_is_refused_by_field() {
        let error =
            |from, to: &str| format!("{:#}", ServiceModel::parse(&DEFAULT.replace(from, to)).unwrap_err());
        assert!(error("fixed: ", "fixed: -").starts_with("step.fixed: -"));
        assert!(error("running: 64", "running: 640").starts_with("batch.running: 640 sequences"));
        assert!(error("copy:", "copies:").contains("unknown field"));
    }
}
