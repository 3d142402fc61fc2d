//! The fence between a worker and an older process of a peer's name.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use tonic::Status;

/// The latest incarnation seen of every slot: a twin that wakes up late is fenced.
#[derive(Debug, Default)]
pub(crate) struct Fence(Mutex<BTreeMap<u32, u64>>);

impl Fence {
    pub(crate) fn admit(&self, slot: u32, incarnation: u64) -> Result<(), Status> {
        let mut latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = latest.entry(slot).or_insert(incarnation);
        if incarnation < *known {
            let message = format!("slot {slot} has a later incarnation, {known}; {incarnation} is fenced");
            return Err(Status::failed_precondition(message));
        }
        *known = incarnation;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_twin_that_wakes_up_late_is_fenced() {
        let fence = Fence::default();
        fence.admit(3, 20).unwrap();
        fence.admit(3, 20).unwrap();
        assert!(fence.admit(3, 19).is_err());
        fence.admit(2, 19).unwrap();
        fence.admit(3, 21).unwrap();
        assert!(fence.admit(3, 20).is_err());
    }
}
