//! A queue: a thread that does what was enqueued, in order, later.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use expertmesh_engine::{Backend, CpuBackend, CpuQueue, Pending};
use expertmesh_model::error::ModelError;

use crate::fault::Faults;
use crate::value::{Deferred, NO_QUEUE};

/// How long a copy takes, so that whoever does not wait for it is early.
const COPY: Duration = Duration::from_micros(50);

/// Calls that may be enqueued; more wait.
const DEPTH: usize = 256;

static NEXT: AtomicU64 = AtomicU64::new(NO_QUEUE + 1);

type Work = Box<dyn FnOnce(&CpuBackend, &mut CpuQueue) + Send>;

/// The order of one caller's work. Dropping it ends its thread once all is done.
pub struct DeferredQueue {
    id: u64,
    work: SyncSender<Work>,
    faults: Arc<Faults>,
}

impl DeferredQueue {
    pub(crate) fn start(cpu: Arc<CpuBackend>, faults: Arc<Faults>) -> Result<Self, ModelError> {
        let own = cpu.queue()?;
        let (work, queued) = sync_channel(DEPTH);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let seen = faults.clone();
        thread::spawn(move || run(&cpu, own, &queued, &seen));
        Ok(Self { id, work, faults })
    }

    /// A value of this queue, for a closure of its thread. Panics where it belongs to another queue.
    pub(crate) fn own<T>(&self, value: &Deferred<T>) -> Deferred<T> {
        assert!(value.queue == self.id || value.queue == NO_QUEUE, "a value of another queue");
        value.share()
    }

    /// The same of a value that is about to be changed, which belongs to this queue from now on.
    pub(crate) fn own_mut<T>(&self, value: &mut Deferred<T>) -> Deferred<T> {
        let shared = self.own(value);
        value.queue = self.id;
        shared
    }

    /// A value that this queue will have.
    pub(crate) fn promise<T>(&self) -> Deferred<T> {
        Deferred::promised(self.id)
    }

    pub(crate) fn enqueue(&self, work: impl FnOnce(&CpuBackend, &mut CpuQueue) + Send + 'static) {
        // A device that is lost takes no work; who waits for it hears so.
        let _ = self.work.send(Box::new(work));
    }

    /// A value that `work` computes.
    pub(crate) fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce(&CpuBackend, &mut CpuQueue) -> T + Send + 'static,
    ) -> Deferred<T> {
        let value = self.promise();
        let computed = value.share();
        self.enqueue(move |cpu, queue| computed.put(work(cpu, queue)));
        value
    }

    /// A value that `work` computes and that is then copied to the host. Panics where nobody waits for it.
    pub(crate) fn copy<T: Send + 'static>(
        &self,
        work: impl FnOnce(&CpuBackend, &mut CpuQueue) -> T + Send + 'static,
    ) -> Pending<T> {
        let (copied, copy) = sync_channel(1);
        let faults = self.faults.clone();
        self.enqueue(move |cpu, queue| {
            // The failure is told before the waiter hears that there is no value.
            let value = faults.guard(|| work(cpu, queue));
            thread::sleep(COPY);
            let _ = copied.send(value);
        });
        let (unwaited, faults) = (Unwaited, self.faults.clone());
        Pending::later(move || {
            std::mem::forget(unwaited);
            copy.recv().unwrap_or_else(|_| panic!("{}", faults.failure().unwrap_or_default()))
        })
    }
}

/// Something that was asked for and is to be waited for.
struct Unwaited;

impl Drop for Unwaited {
    fn drop(&mut self) {
        if !thread::panicking() {
            panic!("a value was asked for, and nobody waited for it");
        }
    }
}

fn run(cpu: &CpuBackend, mut own: CpuQueue, queued: &Receiver<Work>, faults: &Faults) {
    while let Ok(work) = queued.recv() {
        if !faults.call() {
            return;
        }
        if catch_unwind(AssertUnwindSafe(|| faults.guard(|| work(cpu, &mut own)))).is_err() {
            return;
        }
    }
}
