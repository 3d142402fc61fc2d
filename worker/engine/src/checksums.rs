//! What a store has read of its model, as checksums: two copies of one model have equal ones.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use expertmesh_model::error::ModelError;
use expertmesh_model::expert::ExpertId;

/// CRC-32C of the packed bytes that were read: of all that is no routed expert, and of each expert in the order in which
/// they came. What was read once stays known, also where the expert was evicted since.
#[derive(Debug, Default)]
pub struct Checksums {
    dense: u32,
    read: Mutex<Read>,
    /// The length of [`Read::order`].
    count: AtomicUsize,
}

#[derive(Debug, Default)]
struct Read {
    by_expert: BTreeMap<ExpertId, u32>,
    order: Vec<(ExpertId, u32)>,
}

impl Checksums {
    /// Nothing is known of the experts yet.
    pub fn new(dense: u32) -> Self {
        Self { dense, ..Self::default() }
    }

    /// The checksum of all that is no routed expert.
    pub fn dense(&self) -> u32 {
        self.dense
    }

    /// An expert's checksum, where it was read.
    pub fn of(&self, expert: ExpertId) -> Option<u32> {
        self.lock().by_expert.get(&expert).copied()
    }

    /// How many experts are known. Never falls.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// The experts that became known after the first so many.
    pub fn since(&self, count: usize) -> Vec<(ExpertId, u32)> {
        self.lock().order.get(count..).unwrap_or_default().to_vec()
    }

    /// An expert was read. To be called before anything is computed with it.
    ///
    /// # Errors
    /// `WeightsChanged` where it was read before, and was another.
    pub fn record(&self, expert: ExpertId, crc32c: u32) -> Result<(), ModelError> {
        let mut read = self.lock();
        match read.by_expert.insert(expert, crc32c) {
            None => {
                read.order.push((expert, crc32c));
                self.count.store(read.order.len(), Ordering::Release);
                Ok(())
            }
            Some(before) if before == crc32c => Ok(()),
            Some(before) => {
                read.by_expert.insert(expert, before);
                let ExpertId { layer, expert } = expert;
                Err(ModelError::WeightsChanged { layer: layer as usize, expert, before, now: crc32c })
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Read> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_became_known_is_told_once_and_an_expert_that_is_another_by_now_is_an_error() {
        let checksums = Checksums::new(7);
        let id = |expert| ExpertId::new(1, expert);
        checksums.record(id(3), 30).unwrap();
        checksums.record(id(2), 20).unwrap();
        checksums.record(id(3), 30).unwrap();
        assert_eq!((checksums.count(), checksums.since(1)), (2, vec![(id(2), 20)]));
        assert!(checksums.since(2).is_empty() && checksums.since(9).is_empty());
        let changed = checksums.record(id(3), 31).unwrap_err().to_string();
        assert!(changed.contains("expert 3 of layer 1"), "{changed}");
        assert_eq!((checksums.of(id(3)), checksums.of(id(4)), checksums.dense()), (Some(30), None, 7));
    }
}
