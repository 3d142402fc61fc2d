//! Routes: which experts each row of a step goes to, and the rows of each expert.

/// The gate's choice for every row of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Routes {
    pub top_k: usize,
    /// (rows, top_k), ascending within a row.
    pub experts: Vec<u32>,
    /// (rows, top_k), normalised and scaled.
    pub weights: Vec<f32>,
}

/// Rows of one matrix that go through one expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertGroup {
    pub expert: u32,
    /// Indices into the input matrix.
    pub rows: Vec<u32>,
}

/// Routes turned around: the rows of each expert.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Grouped {
    /// Ascending by expert, rows ascending within an expert.
    pub groups: Vec<ExpertGroup>,
    /// For every row of every group, in their order: its place among the answers, row · top_k + slot.
    pub at: Vec<u32>,
}

/// The rows of each expert, of some pairs of row and expert: row · top_k + slot.
pub fn group(routes: &Routes, pairs: impl IntoIterator<Item = u32>) -> Grouped {
    let of_pair = |pair: u32| (routes.experts[pair as usize], pair);
    let mut places: Vec<(u32, u32)> = pairs.into_iter().map(of_pair).collect(); // (expert, place among the answers)
    places.sort_unstable();
    let top_k = routes.top_k as u32;
    let groups = places.chunk_by(|a, b| a.0 == b.0).map(|chunk| ExpertGroup {
        expert: chunk[0].0,
        rows: chunk.iter().map(|&(_, place)| place / top_k).collect(),
    });
    Grouped { groups: groups.collect(), at: places.iter().map(|&(_, place)| place).collect() }
}

/// An expert that was asked to compute and is not resident.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expert {expert} of layer {layer} is not resident")]
pub struct NotResident {
    pub layer: usize,
    pub expert: u32,
}
