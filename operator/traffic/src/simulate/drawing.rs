//! The picture of a comparison: requests, workers, the load, and what clients waited for, over time.

use super::compare::{Comparison, Kind, Row, Setting};
use super::picture::{BLUE, Color, GREEN, GREY, Line, ORANGE, Panel, Picture};
use super::requests::Micros;

/// Points of a line, from left to right.
const POINTS: usize = 288;

/// Draws ours, and of the others those that are as good.
pub(crate) fn draw(title: &str, setting: &Setting<'_>, comparison: &Comparison) -> Picture {
    let length = setting.trace.length.as_secs_f64();
    let reached = comparison.rows.first().map_or(0.0, |ours| ours.attainment);
    let kinds = [(Kind::Fixed, GREEN), (Kind::Threshold, ORANGE), (Kind::Ours, BLUE)];
    let shown: Vec<(&Row, Color)> = kinds
        .into_iter()
        .filter_map(|(kind, color)| Some((comparison.best(kind, reached)?, color)))
        .collect();
    let goals = setting.policy.goals;
    let panels = vec![
        Panel {
            title: "requests/s".into(),
            lines: vec![line("", GREY, requests(setting, length))],
            marks: vec![],
        },
        Panel {
            title: "workers".into(),
            lines: shown
                .iter()
                .map(|(row, color)| Line { stairs: true, ..line(&row.name(), *color, sizes(row, length)) })
                .collect(),
            marks: vec![],
        },
        Panel {
            title: "load s".into(),
            lines: vec![line("ours", BLUE, loads(&comparison.loads, length))],
            marks: vec![(0.55, "more above 0.55".into()), (0.40, "fewer below 0.40".into())],
        },
        Panel {
            title: "TTFT p90, s".into(),
            lines: shown
                .iter()
                .map(|(row, color)| line(&row.name(), *color, first_tokens(row, length)))
                .collect(),
            marks: vec![(goals.ttft.as_secs_f64(), format!("goal {:?}", goals.ttft))],
        },
        Panel {
            title: "TPOT p90, ms".into(),
            lines: shown
                .iter()
                .map(|(row, color)| line(&row.name(), *color, per_token(row, length)))
                .collect(),
            marks: vec![(1e3 * goals.tpot.as_secs_f64(), format!("goal {:?}", goals.tpot))],
        },
    ];
    Picture { title: title.into(), panels, length }
}

fn line(name: &str, color: Color, points: Vec<(f64, Option<f64>)>) -> Line {
    Line { name: name.into(), color, points, stairs: false }
}

/// The middle of each of equal parts of the time, and a value.
fn evenly(length: f64, values: impl ExactSizeIterator<Item = Option<f64>>) -> Vec<(f64, Option<f64>)> {
    let part = length / values.len().max(1) as f64;
    values.enumerate().map(|(at, value)| ((at as f64 + 0.5) * part, value)).collect()
}

fn requests(setting: &Setting<'_>, length: f64) -> Vec<(f64, Option<f64>)> {
    let mut counts = vec![0.0; POINTS];
    for request in &setting.trace.requests {
        let part = request.at.as_secs_f64() / length * POINTS as f64;
        counts[(part as usize).min(POINTS - 1)] += 1.0;
    }
    evenly(length, counts.into_iter().map(|count| Some(count * POINTS as f64 / length)))
}

fn sizes(row: &Row, length: f64) -> Vec<(f64, Option<f64>)> {
    let sizes = &row.outcome.history.sizes;
    let last = sizes.last().map(|(_, size)| (length, Some(f64::from(*size))));
    sizes.iter().map(|(at, size)| (seconds(*at), Some(f64::from(*size)))).chain(last).collect()
}

/// The highest of each part: a mean would hide what made a decision.
fn loads(loads: &[(Micros, f64)], length: f64) -> Vec<(f64, Option<f64>)> {
    let mut highest = vec![None::<f64>; 2 * POINTS];
    for (at, load) in loads {
        let part = seconds(*at) / length * highest.len() as f64;
        let last = highest.len() - 1;
        let highest = &mut highest[(part as usize).min(last)];
        *highest = Some(highest.map_or(*load, |before| before.max(*load)));
    }
    evenly(length, highest.into_iter())
}

fn first_tokens(row: &Row, length: f64) -> Vec<(f64, Option<f64>)> {
    evenly(length, row.outcome.ttft_over_time.iter().copied())
}

fn per_token(row: &Row, length: f64) -> Vec<(f64, Option<f64>)> {
    evenly(length, row.outcome.tpot_over_time.iter().map(|time| time.map(|seconds| 1e3 * seconds)))
}

fn seconds(at: Micros) -> f64 {
    at as f64 / 1e6
}
