//! When each expert was last used: a number each, written by the engine's thread without a lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use expertmesh_model::expert::ExpertId;

/// The last uses of all experts of a model.
pub(crate) struct Uses {
    began: Instant,
    /// Experts of a layer.
    experts: usize,
    /// Nanoseconds from the beginning to the last use, by layer and then by expert.
    last: Box<[AtomicU64]>,
}

impl Uses {
    /// None was used yet.
    pub(crate) fn new(layers: usize, experts: usize) -> Self {
        Self {
            began: Instant::now(),
            experts,
            last: (0..layers * experts).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// These experts of a layer are used now.
    pub(super) fn touch(&self, layer: u32, experts: &[u32]) {
        let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        for &expert in experts {
            if let Some(last) = self.of(ExpertId::new(layer, expert)) {
                last.store(now, Ordering::Relaxed);
            }
        }
    }

    /// When an expert was last used; one that never was: at the beginning.
    pub(super) fn last(&self, expert: ExpertId) -> Instant {
        let nanoseconds = self.of(expert).map_or(0, |last| last.load(Ordering::Relaxed));
        self.began + Duration::from_nanos(nanoseconds)
    }

    fn of(&self, expert: ExpertId) -> Option<&AtomicU64> {
        let at = Some(expert.expert as usize).filter(|expert| *expert < self.experts)?;
        self.last.get(expert.layer as usize * self.experts + at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_use_is_of_its_expert_alone() {
        let uses = Uses::new(3, 4);
        let all = || (0..3).flat_map(|layer| (0..4).map(move |expert| ExpertId::new(layer, expert)));
        let used = |uses: &Uses| all().filter(|id| uses.last(*id) > uses.began).collect::<Vec<_>>();
        uses.touch(1, &[3, 4]);
        uses.touch(3, &[0]);
        assert_eq!(used(&uses), [ExpertId::new(1, 3)], "what the model has not is nobody's");
        uses.touch(2, &[0, 1]);
        assert_eq!(used(&uses), [(1, 3), (2, 0), (2, 1)].map(|(layer, expert)| ExpertId::new(layer, expert)));
        assert!(uses.last(ExpertId::new(2, 0)) > uses.last(ExpertId::new(1, 3)));
        assert_eq!(uses.last(ExpertId::new(2, 9)), uses.began);
    }
}
