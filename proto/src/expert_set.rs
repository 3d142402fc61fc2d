//! Sets of experts, as placements and reports name them: ranges on the wire and in JSON.
//!
//! ```json
//! {"1": "0-7", "2": "0-3,8-11"}
//! ```

use std::collections::{BTreeMap, BTreeSet};

use expertmesh_model::expert::ExpertId;
use serde::{Deserialize, Serialize};

use crate::invalid::Invalid;
use crate::v1;

/// More routed experts per layer than any open model has; bounds what a message can make us allocate.
pub const MAX_EXPERTS: u32 = 4096;

/// Experts by layer; each set ascending. A layer without experts is the same as none, and is none in JSON and on the wire.
#[derive(Debug, Clone, Default, Eq)]
pub struct ExpertSet(pub BTreeMap<u32, BTreeSet<u32>>);

impl PartialEq for ExpertSet {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl ExpertSet {
    /// How many experts the set has, those of all layers together.
    pub fn len(&self) -> usize {
        self.0.values().map(BTreeSet::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.values().all(BTreeSet::is_empty)
    }

    pub fn contains(&self, ExpertId { layer, expert }: ExpertId) -> bool {
        self.0.get(&layer).is_some_and(|experts| experts.contains(&expert))
    }

    /// Adds an expert; says whether it was not in the set.
    pub fn insert(&mut self, ExpertId { layer, expert }: ExpertId) -> bool {
        self.0.entry(layer).or_default().insert(expert)
    }

    /// Every expert of the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = ExpertId> + '_ {
        self.0
            .iter()
            .flat_map(|(&layer, experts)| experts.iter().map(move |&expert| ExpertId { layer, expert }))
    }

    pub fn to_proto(&self) -> Vec<v1::LayerExperts> {
        let ranges = |experts: &BTreeSet<u32>| {
            ranges(experts).into_iter().map(|(first, last)| v1::ExpertRange { first, last }).collect()
        };
        let filled = self.0.iter().filter(|(_, experts)| !experts.is_empty());
        filled.map(|(&layer, experts)| v1::LayerExperts { layer, ranges: ranges(experts) }).collect()
    }

    /// Fails where a range runs backwards or names an expert above [`MAX_EXPERTS`].
    pub fn from_proto(layers: &[v1::LayerExperts]) -> Result<Self, Invalid> {
        let mut set = Self::default();
        for v1::LayerExperts { layer, ranges } in layers {
            for &v1::ExpertRange { first, last } in ranges {
                set.insert_range(*layer, first, last)
                    .map_err(|problem| Invalid::new("experts.ranges", problem))?;
            }
        }
        Ok(set)
    }

    fn insert_range(&mut self, layer: u32, first: u32, last: u32) -> Result<(), String> {
        if first > last || last >= MAX_EXPERTS {
            return Err(format!(
                "layer {layer} has the range {first}-{last}; it must ascend and stay below {MAX_EXPERTS}"
            ));
        }
        self.0.entry(layer).or_default().extend(first..=last);
        Ok(())
    }
}

impl Extend<ExpertId> for ExpertSet {
    fn extend<I: IntoIterator<Item = ExpertId>>(&mut self, experts: I) {
        for expert in experts {
            self.insert(expert);
        }
    }
}

impl FromIterator<ExpertId> for ExpertSet {
    fn from_iter<I: IntoIterator<Item = ExpertId>>(experts: I) -> Self {
        let mut set = Self::default();
        set.extend(experts);
        set
    }
}

fn ranges(experts: &BTreeSet<u32>) -> Vec<(u32, u32)> {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for &expert in experts {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == expert => *last = expert,
            _ => ranges.push((expert, expert)),
        }
    }
    ranges
}

impl Serialize for ExpertSet {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = |experts: &BTreeSet<u32>| {
            let range =
                |(first, last)| if first == last { format!("{first}") } else { format!("{first}-{last}") };
            ranges(experts).into_iter().map(range).collect::<Vec<_>>().join(",")
        };
        serializer
            .collect_map(self.0.iter().filter(|(_, e)| !e.is_empty()).map(|(layer, e)| (layer, text(e))))
    }
}

impl<'de> Deserialize<'de> for ExpertSet {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut set = Self::default();
        for (layer, text) in BTreeMap::<u32, String>::deserialize(deserializer)? {
            for range in text.split(',').filter(|range| !range.is_empty()) {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                let number = |text: &str| {
                    text.parse::<u32>()
                        .map_err(|_| format!("layer {layer} has {range:?}, which is not a range"))
                };
                let result = number(first).and_then(|first| set.insert_range(layer, first, number(last)?));
                result.map_err(serde::de::Error::custom)?;
            }
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_read_as_ranges() {
        let experts = [(1, 0), (1, 1), (1, 2), (1, 7), (3, 5)];
        let set: ExpertSet = experts.iter().map(|&(layer, expert)| ExpertId { layer, expert }).collect();
        let json = serde_json::to_string(&set).unwrap();
        assert_eq!(json, r#"{"1":"0-2,7","3":"5"}"#);
        assert_eq!(serde_json::from_str::<ExpertSet>(&json).unwrap(), set);
    }

    #[test]
    fn a_range_without_end_is_refused() {
        let wild = v1::LayerExperts { layer: 1, ranges: vec![v1::ExpertRange { first: 0, last: u32::MAX }] };
        assert_eq!(ExpertSet::from_proto(&[wild]).unwrap_err().field, "experts.ranges");
    }
}
