//! Values on the device: they belong to a queue, and exist once it got to them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use expertmesh_engine::CpuActivations;

/// Values that no queue has used yet.
pub(crate) const NO_QUEUE: u64 = 0;

/// A value of one queue.
pub struct Deferred<T> {
    pub(crate) queue: u64,
    value: Arc<Mutex<Option<T>>>,
}

impl<T> Deferred<T> {
    /// A value that `queue` will put here.
    pub(crate) fn promised(queue: u64) -> Self {
        Self { queue, value: Arc::default() }
    }

    /// A value that is there, and belongs to the queue that uses it first.
    pub(crate) fn unbound(value: T) -> Self {
        Self { queue: NO_QUEUE, value: Arc::new(Mutex::new(Some(value))) }
    }

    /// The same value, for the queue's own thread.
    pub(crate) fn share(&self) -> Self {
        Self { queue: self.queue, value: self.value.clone() }
    }

    pub(crate) fn put(&self, value: T) {
        *self.lock() = Some(value);
    }

    pub(crate) fn take(&self) -> T {
        self.lock().take().expect("a queue computes in order")
    }

    /// Works with the value; on the queue's thread.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        work(self.lock().as_mut().expect("a queue computes in order"))
    }

    fn lock(&self) -> MutexGuard<'_, Option<T>> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Rows, and which of them were written.
pub struct Written {
    pub(crate) rows: CpuActivations,
    written: Vec<bool>,
}

impl Written {
    /// Rows that are all there.
    pub(crate) fn whole(rows: CpuActivations) -> Self {
        Self { rows, written: Vec::new() }
    }

    /// Room for so many rows.
    pub(crate) fn room(rows: CpuActivations, count: usize) -> Self {
        Self { rows, written: vec![false; count] }
    }

    pub(crate) fn write(&mut self, at: impl IntoIterator<Item = usize>) {
        for at in at {
            let before = std::mem::replace(&mut self.written[at], true);
            assert!(!before, "the answer {at} was written twice");
        }
    }

    /// Panics where a row that is about to be read was not written.
    pub(crate) fn check(&self) {
        if let Some(at) = self.written.iter().position(|written| !written) {
            panic!("the answer {at} was not written");
        }
    }
}
