//! The placement as every part of ExpertMesh holds it: checked, hashed, and readable as JSON.
//!
//! ```json
//! {"epoch": 3, "workers": [
//!   {"slot": 0, "name": "tiny-r1-1a2b3c4d-0", "addresses": ["10.244.1.7:7070"], "draining": false,
//!    "experts": {"1": "0-7", "2": "0-3,8-11"}}]}
//! ```

use expertmesh_model::expert::ExpertId;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::epoch::Epoch;
use crate::expert_set::ExpertSet;
use crate::invalid::Invalid;
use crate::slot::{MAX_WORKERS, Slot};
use crate::v1;

/// Pairs of worker and expert that a placement may name.
const MAX_PLACED: u64 = 1 << 24;

/// One worker of a placement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlacedWorker {
    pub slot: Slot,
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
    #[serde(skip_serializing_if = "is_zero")]
    term: u64,
    epoch: u64,
    workers: Vec<PlacedWorker>,
    #[serde(skip)]
    hash: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    #[serde(default)]
    term: u64,
    epoch: u64,
    workers: Vec<PlacedWorker>,
}

impl TryFrom<Fields> for Placement {
    type Error = Invalid;

    fn try_from(fields: Fields) -> Result<Self, Invalid> {
        Self::new(Epoch { term: fields.term, counter: fields.epoch }, fields.workers)
    }
}

impl Placement {
    /// Sorts by slot. Fails where a slot appears twice or is not below [`MAX_WORKERS`].
    pub fn new(epoch: Epoch, mut workers: Vec<PlacedWorker>) -> Result<Self, Invalid> {
        workers.sort_by_key(|worker| worker.slot);
        if let Some(worker) = workers.last().filter(|worker| worker.slot.0 >= MAX_WORKERS) {
            return Err(Invalid::new("workers.slot", format!("{} is not below {MAX_WORKERS}", worker.slot)));
        }
        if let Some(pair) = workers.windows(2).find(|pair| pair[0].slot == pair[1].slot) {
            return Err(Invalid::new("workers.slot", format!("slot {} appears twice", pair[0].slot)));
        }
        let hash = hash(epoch, &workers);
        Ok(Self { term: epoch.term, epoch: epoch.counter, workers, hash })
    }

    /// The placement's number; none where none was made yet.
    pub fn epoch(&self) -> Epoch {
        Epoch { term: self.term, counter: self.epoch }
    }

    /// The placed workers, ascending by slot.
    pub fn workers(&self) -> &[PlacedWorker] {
        &self.workers
    }

    pub fn worker(&self, slot: Slot) -> Option<&PlacedWorker> {
        self.workers.binary_search_by_key(&slot, |worker| worker.slot).ok().map(|at| &self.workers[at])
    }

    /// Hex SHA-256 of everything but the addresses, which change without a decision.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    pub fn to_proto(&self) -> v1::Placement {
        let worker = |worker: &PlacedWorker| v1::PlacedWorker {
            slot: worker.slot.0,
            name: worker.name.clone(),
            addresses: worker.addresses.clone(),
            experts: worker.experts.to_proto(),
            draining: worker.draining,
        };
        v1::Placement {
            term: self.term,
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
            Ok(PlacedWorker { slot: Slot(slot), name, addresses, experts, draining })
        };
        let workers = message.workers.into_iter().map(worker).collect::<Result<_, Invalid>>()?;
        let placement = Self::new(Epoch { term: message.term, counter: message.epoch }, workers)?;
        if placement.hash != message.hash {
            return Err(Invalid::new(
                "placement.hash",
                format!("{} is not the hash of the content, {}", message.hash, placement.hash),
            ));
        }
        Ok(placement)
    }
}

fn is_zero(term: &u64) -> bool {
    *term == 0
}

/// The first term is not in it, so that a placement of before there were terms keeps its hash.
fn hash(epoch: Epoch, workers: &[PlacedWorker]) -> String {
    let mut sha = Sha256::new();
    sha.update(epoch.counter.to_le_bytes());
    if epoch.term > 0 {
        sha.update(epoch.term.to_le_bytes());
    }
    for PlacedWorker { slot, name, experts, draining, .. } in workers {
        sha.update(slot.0.to_le_bytes());
        sha.update((name.len() as u64).to_le_bytes());
        sha.update(name);
        sha.update([*draining as u8]);
        sha.update((experts.len() as u64).to_le_bytes());
        for ExpertId { layer, expert } in experts.iter() {
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
        PlacedWorker {
            slot: Slot(slot),
            name: format!("w-{slot}"),
            addresses: vec![format!("10.0.0.{slot}:7070")],
            experts: experts.iter().map(|&(layer, expert)| ExpertId { layer, expert }).collect(),
            draining: false,
        }
    }

    proptest! {
        #[test]
        fn a_placement_survives_json_and_proto(pairs in proptest::collection::vec((0u32..4, 0u32..40), 0..60), term in 0u64..3, counter: u64) {
            let mut idle = worker(0, &[]);
            idle.experts.0.insert(1, Default::default());
            let placement = Placement::new(Epoch { term, counter }, vec![worker(1, &pairs), idle]).unwrap();
            let json = serde_json::to_string(&placement).unwrap();
            prop_assert_eq!(&serde_json::from_str::<Placement>(&json).unwrap(), &placement);
            prop_assert_eq!(&Placement::from_proto(placement.to_proto()).unwrap(), &placement);
        }
    }

    #[test]
    fn the_hash_ignores_addresses_and_nothing_else() {
        let base = Placement::new(Epoch::FIRST, vec![worker(0, &[(1, 0)])]).unwrap();
        let mut moved = worker(0, &[(1, 0)]);
        moved.addresses = vec!["elsewhere:1".into()];
        assert_eq!(Placement::new(Epoch::FIRST, vec![moved]).unwrap().hash(), base.hash());
        let mut draining = worker(0, &[(1, 0)]);
        draining.draining = true;
        for other in [
            Placement::new(Epoch::FIRST.next(), vec![worker(0, &[(1, 0)])]),
            Placement::new(Epoch { term: 1, counter: 1 }, vec![worker(0, &[(1, 0)])]),
            Placement::new(Epoch::FIRST, vec![worker(0, &[(1, 1)])]),
            Placement::new(Epoch::FIRST, vec![draining]),
        ] {
            assert_ne!(other.unwrap().hash(), base.hash());
        }
    }

    #[test]
    fn what_is_no_placement_is_refused_by_field() {
        let twice = Placement::new(Epoch::FIRST, vec![worker(2, &[]), worker(2, &[])]).unwrap_err();
        assert_eq!(twice.to_string(), "workers.slot: slot 2 appears twice");
        let beyond = Placement::new(Epoch::FIRST, vec![worker(MAX_WORKERS, &[])]).unwrap_err();
        assert_eq!(beyond.to_string(), "workers.slot: 1024 is not below 1024");
        let all = |layer| v1::LayerExperts { layer, ranges: vec![v1::ExpertRange { first: 0, last: 4095 }] };
        let greedy = v1::PlacedWorker { experts: (0..5000).map(all).collect(), ..Default::default() };
        let greedy = v1::Placement { workers: vec![greedy], ..Default::default() };
        assert_eq!(Placement::from_proto(greedy).unwrap_err().field, "experts.ranges");
        let mut forged = Placement::new(Epoch::FIRST, vec![worker(0, &[])]).unwrap().to_proto();
        forged.epoch = 2;
        assert_eq!(Placement::from_proto(forged).unwrap_err().field, "placement.hash");
    }
}
