//! The placement as every part of ExpertMesh holds it: checked, hashed, and readable as JSON.
//!
//! ```json
//! {"epoch": 3, "workers": [
//!   {"slot": 0, "name": "tiny-r1-1a2b3c4d-0", "addresses": ["10.244.1.7:7070"], "draining": false,
//!    "experts": {"1": "0-7", "2": "0-3,8-11"}}]}
//! ```

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::invalid::Invalid;
use crate::v1;

/// Experts by layer; each set ascending. A layer without experts is the same as none, and is none in JSON and on the wire.
#[derive(Debug, Clone, Default, Eq)]
pub struct ExpertSet(pub BTreeMap<u32, BTreeSet<u32>>);

impl PartialEq for ExpertSet {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl ExpertSet {
    /// The number of (layer, expert) pairs.
    pub fn len(&self) -> usize {
        self.0.values().map(BTreeSet::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.values().all(BTreeSet::is_empty)
    }

    pub fn contains(&self, layer: u32, expert: u32) -> bool {
        self.0.get(&layer).is_some_and(|experts| experts.contains(&expert))
    }

    pub fn insert(&mut self, layer: u32, expert: u32) -> bool {
        self.0.entry(layer).or_default().insert(expert)
    }

    /// Every (layer, expert) of the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.0.iter().flat_map(|(&layer, experts)| experts.iter().map(move |&expert| (layer, expert)))
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

/// More routed experts per layer than any open model has; bounds what a message can make us allocate.
pub const MAX_EXPERTS: u32 = 4096;

/// Workers of one deployment at most: slots are below.
pub const MAX_WORKERS: u32 = 1024;

/// Pairs of worker and expert that a placement may name.
const MAX_PLACED: u64 = 1 << 24;

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

/// One worker of a placement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlacedWorker {
    pub slot: u32,
    /// The name of its pod or process.
    pub name: String,
    /// Its gRPC services as `host:port`, in the order to try.
    pub addresses: Vec<String>,
    /// The experts that should be resident there.
    pub experts: ExpertSet,
    /// Whether it takes no new sequences, and still serves experts.
    #[serde(default)]
    pub draining: bool,
}

/// Which worker should hold which experts, as of an epoch. Advice: a stale one is slower, never wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Fields")]
pub struct Placement {
    epoch: u64,
    workers: Vec<PlacedWorker>,
    #[serde(skip)]
    hash: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    epoch: u64,
    workers: Vec<PlacedWorker>,
}

impl TryFrom<Fields> for Placement {
    type Error = Invalid;

    fn try_from(fields: Fields) -> Result<Self, Invalid> {
        Self::new(fields.epoch, fields.workers)
    }
}

impl Placement {
    /// Sorts by slot. Fails where a slot appears twice or is not below [`MAX_WORKERS`].
    pub fn new(epoch: u64, mut workers: Vec<PlacedWorker>) -> Result<Self, Invalid> {
        workers.sort_by_key(|worker| worker.slot);
        if let Some(worker) = workers.last().filter(|worker| worker.slot >= MAX_WORKERS) {
            return Err(Invalid::new("workers.slot", format!("{} is not below {MAX_WORKERS}", worker.slot)));
        }
        if let Some(pair) = workers.windows(2).find(|pair| pair[0].slot == pair[1].slot) {
            return Err(Invalid::new("workers.slot", format!("slot {} appears twice", pair[0].slot)));
        }
        let hash = hash(epoch, &workers);
        Ok(Self { epoch, workers, hash })
    }

    /// The placement's number, which only grows; 0 where none was made yet.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The placed workers, ascending by slot.
    pub fn workers(&self) -> &[PlacedWorker] {
        &self.workers
    }

    pub fn worker(&self, slot: u32) -> Option<&PlacedWorker> {
        self.workers.binary_search_by_key(&slot, |worker| worker.slot).ok().map(|at| &self.workers[at])
    }

    /// Hex SHA-256 of everything but the addresses, which change without a decision.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    pub fn to_proto(&self) -> v1::Placement {
        let worker = |worker: &PlacedWorker| v1::PlacedWorker {
            slot: worker.slot,
            name: worker.name.clone(),
            addresses: worker.addresses.clone(),
            experts: worker.experts.to_proto(),
            draining: worker.draining,
        };
        v1::Placement {
            epoch: self.epoch,
            hash: self.hash.clone(),
            workers: self.workers.iter().map(worker).collect(),
        }
    }

    /// Fails on a slot that appears twice, a range that is none, too many experts, or a hash that is not of this content.
    pub fn from_proto(message: v1::Placement) -> Result<Self, Invalid> {
        let ranges =
            message.workers.iter().flat_map(|worker| &worker.experts).flat_map(|layer| &layer.ranges);
        let placed: u64 = ranges.map(|range| u64::from(range.last.saturating_sub(range.first)) + 1).sum();
        if placed > MAX_PLACED {
            return Err(Invalid::new(
                "experts.ranges",
                format!("{placed} experts are more than {MAX_PLACED}"),
            ));
        }
        let worker = |worker: v1::PlacedWorker| {
            let experts = ExpertSet::from_proto(&worker.experts)?;
            let v1::PlacedWorker { slot, name, addresses, draining, .. } = worker;
            Ok(PlacedWorker { slot, name, addresses, experts, draining })
        };
        let workers = message.workers.into_iter().map(worker).collect::<Result<_, Invalid>>()?;
        let placement = Self::new(message.epoch, workers)?;
        if placement.hash != message.hash {
            return Err(Invalid::new(
                "placement.hash",
                format!("{} is not the hash of the content, {}", message.hash, placement.hash),
            ));
        }
        Ok(placement)
    }
}

fn hash(epoch: u64, workers: &[PlacedWorker]) -> String {
    let mut sha = Sha256::new();
    sha.update(epoch.to_le_bytes());
    for PlacedWorker { slot, name, experts, draining, .. } in workers {
        sha.update(slot.to_le_bytes());
        sha.update((name.len() as u64).to_le_bytes());
        sha.update(name);
        sha.update([*draining as u8]);
        sha.update((experts.len() as u64).to_le_bytes());
        for (layer, expert) in experts.iter() {
            sha.update(layer.to_le_bytes());
            sha.update(expert.to_le_bytes());
        }
    }
    sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn worker(slot: u32, experts: &[(u32, u32)]) -> PlacedWorker {
        let mut set = ExpertSet::default();
        experts.iter().for_each(|&(layer, expert)| {
            set.insert(layer, expert);
        });
        PlacedWorker {
            slot,
            name: format!("w-{slot}"),
            addresses: vec![format!("10.0.0.{slot}:7070")],
            experts: set,
            draining: false,
        }
    }

    proptest! {
        #[test]
        fn a_placement_survives_json_and_proto(pairs in proptest::collection::vec((0u32..4, 0u32..40), 0..60), epoch: u64) {
            let mut idle = worker(0, &[]);
            idle.experts.0.insert(1, BTreeSet::new());
            let placement = Placement::new(epoch, vec![worker(1, &pairs), idle]).unwrap();
            let json = serde_json::to_string(&placement).unwrap();
            prop_assert_eq!(&serde_json::from_str::<Placement>(&json).unwrap(), &placement);
            prop_assert_eq!(&Placement::from_proto(placement.to_proto()).unwrap(), &placement);
        }
    }

    #[test]
    fn experts_read_as_ranges() {
        let json =
            serde_json::to_string(&worker(0, &[(1, 0), (1, 1), (1, 2), (1, 7), (3, 5)]).experts).unwrap();
        assert_eq!(json, r#"{"1":"0-2,7","3":"5"}"#);
    }

    #[test]
    fn the_hash_ignores_addresses_and_nothing_else() {
        let base = Placement::new(1, vec![worker(0, &[(1, 0)])]).unwrap();
        let mut moved = worker(0, &[(1, 0)]);
        moved.addresses = vec!["elsewhere:1".into()];
        assert_eq!(Placement::new(1, vec![moved]).unwrap().hash(), base.hash());
        let mut draining = worker(0, &[(1, 0)]);
        draining.draining = true;
        for other in [
            Placement::new(2, vec![worker(0, &[(1, 0)])]),
            Placement::new(1, vec![worker(0, &[(1, 1)])]),
            Placement::new(1, vec![draining]),
        ] {
            assert_ne!(other.unwrap().hash(), base.hash());
        }
    }

    #[test]
    fn what_is_no_placement_is_refused_by_field() {
        let twice = Placement::new(1, vec![worker(2, &[]), worker(2, &[])]).unwrap_err();
        assert_eq!(twice.to_string(), "workers.slot: slot 2 appears twice");
        let beyond = Placement::new(1, vec![worker(MAX_WORKERS, &[])]).unwrap_err();
        assert_eq!(beyond.to_string(), "workers.slot: 1024 is not below 1024");
        let all = |layer| v1::LayerExperts { layer, ranges: vec![v1::ExpertRange { first: 0, last: 4095 }] };
        let greedy = v1::PlacedWorker { experts: (0..5000).map(all).collect(), ..Default::default() };
        let greedy = v1::Placement { workers: vec![greedy], ..Default::default() };
        assert_eq!(Placement::from_proto(greedy).unwrap_err().field, "experts.ranges");
        let mut forged = Placement::new(1, vec![worker(0, &[])]).unwrap().to_proto();
        forged.epoch = 2;
        assert_eq!(Placement::from_proto(forged).unwrap_err().field, "placement.hash");
        let wild = v1::LayerExperts { layer: 1, ranges: vec![v1::ExpertRange { first: 0, last: u32::MAX }] };
        assert_eq!(ExpertSet::from_proto(&[wild]).unwrap_err().field, "experts.ranges");
    }
}
