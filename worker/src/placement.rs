//! The placement that a process follows, and the rules by which another one replaces it.

use std::path::Path;
use std::sync::Arc;

use expertmesh_model::files::{self, FileError};
use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::placement::Placement;
use tokio::sync::watch;
use tonic::Status;

use crate::process::Fatal;

/// The current placement: read from a file at the start, then pushed by the operator.
#[derive(Debug, Clone)]
pub(crate) struct CurrentPlacement(Arc<watch::Sender<Arc<Placement>>>);

impl CurrentPlacement {
    /// Starts from a file (JSON), or from no placement where there is no file or it is empty.
    pub(crate) fn load(file: Option<&Path>) -> Result<Self, Fatal> {
        let placement = match file.map(|path| (path, files::read_json(path, files::TABLE))) {
            None | Some((_, Err(FileError::Missing))) => Placement::default(),
            Some((_, Ok(text))) if text.trim_ascii().is_empty() => Placement::default(),
            Some((path, Err(error))) => return Err(invalid(path, &error)),
            Some((path, Ok(text))) => serde_json::from_slice(&text).map_err(|error| invalid(path, &error))?,
        };
        Ok(Self(Arc::new(watch::Sender::new(Arc::new(placement)))))
    }

    pub(crate) fn get(&self) -> Arc<Placement> {
        self.0.borrow().clone()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Placement>> {
        self.0.subscribe()
    }

    /// Takes a later placement, or fresh addresses for this one.
    pub(crate) fn apply(&self, next: Placement) -> Result<(), Refused> {
        let mut verdict = Ok(());
        self.0.send_if_modified(|current| {
            verdict = judge(current, &next);
            let changes = verdict.is_ok() && **current != next;
            if changes {
                *current = Arc::new(next);
            }
            changes
        });
        verdict
    }
}

/// Why a placement was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error("epoch {offered} is behind the current epoch {current}")]
    Stale { offered: Epoch, current: Epoch },
    #[error("epoch {epoch} is already another placement: its hash is {current}, not {offered}")]
    Conflict { epoch: Epoch, offered: String, current: String },
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Stale { .. } => Status::failed_precondition(refused.to_string()),
            Refused::Conflict { .. } => Status::already_exists(refused.to_string()),
        }
    }
}

fn judge(current: &Placement, next: &Placement) -> Result<(), Refused> {
    let (epoch, current_epoch) = (next.epoch(), current.epoch());
    if epoch != current_epoch {
        let replaces = epoch.replaces(current_epoch);
        return replaces.then_some(()).ok_or(Refused::Stale { offered: epoch, current: current_epoch });
    }
    if next.hash() != current.hash() {
        let (offered, current) = (next.hash().to_string(), current.hash().to_string());
        return Err(Refused::Conflict { epoch, offered, current });
    }
    Ok(())
}

fn invalid(path: &Path, error: &dyn std::error::Error) -> Fatal {
    Fatal::new("InvalidPlacement", format!("--placement {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use expertmesh_proto::expert_set::ExpertSet;
    use expertmesh_proto::placement::PlacedWorker;
    use expertmesh_proto::slot::Slot;

    use super::*;

    fn placement(counter: u64, name: &str, address: &str) -> Placement {
        let addresses = vec![address.to_string()];
        let worker = PlacedWorker {
            slot: Slot(0),
            name: name.into(),
            addresses,
            experts: ExpertSet::default(),
            draining: false,
        };
        Placement::new(Epoch { term: 0, counter }, vec![worker]).unwrap()
    }

    #[test]
    fn a_later_epoch_and_fresh_addresses_are_taken_and_nothing_else() {
        let current = CurrentPlacement::load(None).unwrap();
        current.apply(placement(2, "a", "10.0.0.1:1")).unwrap();
        current.apply(placement(2, "a", "10.0.0.2:1")).unwrap();
        assert_eq!(current.get().workers()[0].addresses, ["10.0.0.2:1"]);
        let stale = current.apply(placement(1, "a", "10.0.0.1:1")).unwrap_err();
        assert_eq!(stale.to_string(), "epoch 1 is behind the current epoch 2");
        assert!(matches!(
            current.apply(placement(2, "b", "10.0.0.1:1")),
            Err(Refused::Conflict { epoch: Epoch { term: 0, counter: 2 }, .. })
        ));
        current.apply(placement(3, "b", "10.0.0.1:1")).unwrap();
        assert_eq!(current.get().epoch(), Epoch { term: 0, counter: 3 });
    }
}
