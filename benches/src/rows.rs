//! What is measured: each row is one number of ours beside one of llama.cpp's.

use expertmesh_model::format::WeightFormat;
use expertmesh_model::numerics::Numerics;

/// What one sample computes; every context starts empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// So many sequences, a token each per step, for so many steps.
    Decode { sequences: usize, steps: usize },
    /// One prompt in one step.
    Prefill { tokens: usize },
}

impl Work {
    /// Tokens that a sample computes.
    pub(crate) fn tokens(self) -> usize {
        match self {
            Self::Decode { sequences, steps } => sequences * steps,
            Self::Prefill { tokens } => tokens,
        }
    }

    pub(crate) fn tokens_per_step(self) -> usize {
        match self {
            Self::Decode { sequences, .. } => sequences,
            Self::Prefill { tokens } => tokens,
        }
    }

    /// What is computed before a sample, as llama-bench does too: one step.
    pub(crate) fn warm_up(self) -> Self {
        match self {
            Self::Decode { sequences, .. } => Self::Decode { sequences, steps: 1 },
            prefill @ Self::Prefill { .. } => prefill,
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    /// Stable: other tools find a row by it.
    pub(crate) name: &'static str,
    pub(crate) weights: WeightFormat,
    pub(crate) numerics: Numerics,
    pub(crate) work: Work,
    /// Whether another process keeps a core busy meanwhile.
    pub(crate) busy: bool,
}

impl Row {
    const fn new(name: &'static str, weights: WeightFormat, work: Work) -> Self {
        Self { name, weights, numerics: Numerics::Pair, work, busy: false }
    }

    /// Whether one loaded model serves both rows.
    pub(crate) fn same_model(&self, other: &Self) -> bool {
        self.weights == other.weights && self.numerics == other.numerics
    }
}

const DECODE: Work = Work::Decode { sequences: 1, steps: 64 };
const DECODE_16: Work = Work::Decode { sequences: 16, steps: 32 };
/// Short, since a peer whose barriers spin computes one token per second then.
const DECODE_BUSY: Work = Work::Decode { sequences: 1, steps: 16 };
const PREFILL: Work = Work::Prefill { tokens: 512 };

/// Rows of the same weights and numerics follow each other, so that a model is loaded once.
pub(crate) const ROWS: [Row; 7] = [
    Row::new("decode-1-bf16", WeightFormat::Bf16, DECODE),
    Row::new("decode-16-bf16", WeightFormat::Bf16, DECODE_16),
    Row::new("prefill-512-bf16", WeightFormat::Bf16, PREFILL),
    Row { busy: true, ..Row::new("decode-1-bf16-busy", WeightFormat::Bf16, DECODE_BUSY) },
    Row { numerics: Numerics::Tile, ..Row::new("prefill-512-bf16-tile", WeightFormat::Bf16, PREFILL) },
    Row::new("decode-1-int8", WeightFormat::Int8, DECODE),
    Row::new("decode-1-int4", WeightFormat::Int4, DECODE),
];

/// The rows with these names; all where none is named.
pub(crate) fn named(names: &[String]) -> anyhow::Result<Vec<Row>> {
    let known = || ROWS.map(|row| row.name).join(", ");
    if let Some(unknown) = names.iter().find(|name| ROWS.iter().all(|row| row.name != **name)) {
        anyhow::bail!("there is no row {unknown}; there are {}", known());
    }
    let wanted = |row: &Row| names.is_empty() || names.iter().any(|name| name == row.name);
    Ok(ROWS.into_iter().filter(wanted).collect())
}
