//! Routes: which experts each row of a step goes to, and the rows of each expert.

/// The gate's choice for every row of a step, in host memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Routes {
    /// Experts that each row goes to.
    pub top_k: usize,
    /// (rows, top_k), ascending within a row.
    pub experts: Vec<u32>,
    /// (rows, top_k), normalised and scaled.
    pub weights: Vec<f32>,
}

impl Routes {
    /// The pairs in the order of their answers: row by row, experts ascending.
    pub fn pairs(&self) -> impl Iterator<Item = Pair> + '_ {
        let row = |place: usize| (place / self.top_k) as u32;
        self.experts.iter().enumerate().map(move |(place, &expert)| Pair { row: row(place), expert })
    }
}

/// A row of a matrix and one of the experts that it goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    pub row: u32,
    pub expert: u32,
}

/// Rows of one matrix that go through one expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertGroup {
    pub expert: u32,
    /// Indices into the input matrix.
    pub rows: Vec<u32>,
}

/// Pairs turned around: the rows of each expert.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Grouped {
    /// Ascending by expert; within an expert, rows in the order of their pairs.
    pub groups: Vec<ExpertGroup>,
    /// The place of every row of every group among all pairs, group by group.
    pub at: Vec<u32>,
}

/// The rows of each expert that is `wanted`.
pub fn group(pairs: impl IntoIterator<Item = Pair>, wanted: impl Fn(u32) -> bool) -> Grouped {
    let places = pairs.into_iter().zip(0u32..).filter(|(pair, _)| wanted(pair.expert));
    let mut places: Vec<(u32, u32, u32)> =
        places.map(|(Pair { row, expert }, place)| (expert, place, row)).collect();
    places.sort_unstable();
    let groups = places
        .chunk_by(|a, b| a.0 == b.0)
        .map(|chunk| ExpertGroup { expert: chunk[0].0, rows: chunk.iter().map(|&(.., row)| row).collect() });
    Grouped { groups: groups.collect(), at: places.iter().map(|&(_, place, _)| place).collect() }
}
