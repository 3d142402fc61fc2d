//! Failures of the device and of allocations, on command.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use expertmesh_model::error::ModelError;

/// What is to go wrong, and what has.
#[derive(Debug)]
pub(crate) struct Faults {
    /// Calls until the device is lost.
    left: AtomicU64,
    /// Bytes that an allocation gets at most.
    most: AtomicU64,
    failure: Mutex<Option<String>>,
}

impl Default for Faults {
    fn default() -> Self {
        Self { left: AtomicU64::new(u64::MAX), most: AtomicU64::new(u64::MAX), failure: Mutex::new(None) }
    }
}

impl Faults {
    /// Loses the device after so many more calls.
    pub(crate) fn lose_after(&self, calls: u64) {
        self.left.store(calls, Ordering::SeqCst);
    }

    /// Refuses allocations of more than so many bytes.
    pub(crate) fn refuse_above(&self, bytes: u64) {
        self.most.store(bytes, Ordering::SeqCst);
    }

    /// Memory of so many bytes, or the error of a device that has none.
    pub(crate) fn allocate(&self, what: &'static str, bytes: u64) -> Result<(), ModelError> {
        if bytes <= self.most.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(ModelError::OutOfMemory {
            what,
            bytes: bytes as usize,
            problem: "deferred-cpu has none".to_owned(),
        })
    }

    /// Counts a call; false once the device is lost.
    pub(crate) fn call(&self) -> bool {
        let count = |left: u64| match left {
            u64::MAX => Some(u64::MAX),
            left => left.checked_sub(1),
        };
        let alive = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, count).is_ok();
        if !alive {
            self.fail("lost on command");
        }
        alive
    }

    /// The device is lost; what it was lost by first stays.
    pub(crate) fn fail(&self, problem: &str) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert_with(|| format!("deferred-cpu: {problem}"));
    }

    /// Does some work; a panic in it loses the device.
    pub(crate) fn guard<T>(&self, work: impl FnOnce() -> T) -> T {
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
            let problem = panic.downcast_ref::<String>().map(String::as_str);
            let problem = problem.or(panic.downcast_ref::<&str>().copied());
            self.fail(problem.unwrap_or("a panic"));
            resume_unwind(panic)
        })
    }

    /// What the device was lost by.
    pub(crate) fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
