//! The threads that compute: a unit of work at a time, waiting by spinning briefly and then sleeping.
//!
//! Barriers that only spin collapse where another process takes a core: the thread that was put off the core holds all
//! others up, and they burn what it waits for. Here units are small and claimed one by one, so that whoever runs does
//! the work, and whoever waits soon sleeps.

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a thread looks for work before it sleeps: longer than the gap between two operations of a layer.
const SPIN: Duration = Duration::from_micros(60);

/// Callers whose work is under way at the same time: the thread that runs sequences, and the one that serves peers.
const CALLERS: usize = 2;

/// Units of one call at most; `state` counts them in 32 bits.
const MAX_UNITS: usize = u32::MAX as usize / 2;

/// A slice of which each unit of some work takes its own part.
pub(crate) struct Shares<'a, T> {
    start: *mut T,
    length: usize,
    place: PhantomData<&'a mut [T]>,
}

// SAFETY: units take different parts, as `take` demands.
unsafe impl<T: Send> Sync for Shares<'_, T> {}

impl<'a, T> Shares<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), length: slice.len(), place: PhantomData }
    }

    /// # Safety
    /// No two parts that live at the same time overlap.
    #[allow(clippy::mut_from_ref, reason = "that is what it is for")]
    pub(crate) unsafe fn take(&self, part: Range<usize>) -> &mut [T] {
        assert!(part.start <= part.end && part.end <= self.length, "a part outside of its slice");
        // SAFETY: within the slice; the caller promises that nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(part.start), part.len()) }
    }
}

type Work<'a> = dyn Fn(usize) + Sync + 'a;

/// A fixed number of threads, the caller included.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    calls: [Call; CALLERS],
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
}

/// One caller's work while it is under way, and what its units are counted with.
#[derive(Default)]
struct Call {
    /// Held by the caller for as long as its work lasts.
    caller: Mutex<()>,
    /// Units in the upper half, the next unclaimed one in the lower: one addition claims a unit of the work that is
    /// there at that moment, however long ago a thread last looked.
    state: AtomicU64,
    /// Written while all units are claimed and done, read between the claim of a unit and its `done`.
    work: UnsafeCell<Option<*const Work<'static>>>,
    done: AtomicUsize,
    panicked: AtomicBool,
    /// The caller sleeps until all is done.
    sleeping: AtomicBool,
    finished: Mutex<()>,
    finish: Condvar,
}

// SAFETY: `work` is written by the caller that holds the call, before `state` says that there are units, and after all
// of those before are `done`; it is read in between only. What it points to is Sync.
unsafe impl Sync for Call {}
// SAFETY: as above.
unsafe impl Send for Call {}

impl Pool {
    /// A pool of so many threads in all; 1 computes on the caller alone.
    pub(crate) fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            calls: std::array::from_fn(|_| Call::default()),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let spawn = |index: usize| {
            let shared = shared.clone();
            thread::Builder::new().name(format!("compute-{index}")).spawn(move || shared.serve())
        };
        // Where the system gives fewer threads than asked, those that are there do the work.
        let workers = (1..threads).map_while(|index| spawn(index).ok()).collect();
        Self { shared, workers }
    }

    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work` once with each of 0..`rows`, on all threads where there are many. For what takes a microsecond a row.
    pub(crate) fn run_rows(&self, rows: usize, work: &Work) {
        const TOGETHER: usize = 8;
        self.run(rows.div_ceil(TOGETHER), &|unit| {
            (unit * TOGETHER..rows.min((unit + 1) * TOGETHER)).for_each(work);
        });
    }

    /// Calls `work` once with each of 0..`units`, on all threads, and returns when all are done. Units should take
    /// microseconds. A unit that panics makes the caller panic.
    pub(crate) fn run(&self, units: usize, work: &Work) {
        if units <= 1 || self.workers.is_empty() {
            return (0..units).for_each(work);
        }
        assert!(units <= MAX_UNITS, "{units} units are too many");
        let (call, _held) = self.shared.call();
        call.publish(units, work);
        self.shared.wake_sleepers();
        while call.work_on_one() {}
        call.wait(units);
        assert!(!call.panicked.swap(false, Ordering::SeqCst), "a computing thread panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake_sleepers();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// A call that no other caller uses, for as long as the guard lives.
    fn call(&self) -> (&Call, MutexGuard<'_, ()>) {
        for call in &self.calls {
            match call.caller.try_lock() {
                Ok(guard) => return (call, guard),
                Err(TryLockError::Poisoned(poison)) => return (call, poison.into_inner()),
                Err(TryLockError::WouldBlock) => {}
            }
        }
        let call = &self.calls[0];
        (call, call.caller.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn wake_sleepers(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }

    /// What a thread of the pool does until the pool is dropped: it looks for units, and sleeps where there are none for long.
    fn serve(&self) {
        let mut idle_since = Instant::now();
        while !self.stop.load(Ordering::SeqCst) {
            let mut worked = false;
            for call in &self.calls {
                worked |= call.work_on_one();
            }
            if worked {
                idle_since = Instant::now();
            } else if idle_since.elapsed() < SPIN {
                std::hint::spin_loop();
            } else {
                self.sleep_until_work();
                idle_since = Instant::now();
            }
        }
    }

    fn sleep_until_work(&self) {
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !self.stop.load(Ordering::SeqCst) && !self.calls.iter().any(Call::has_work) {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Call {
    fn publish(&self, units: usize, work: &Work) {
        self.done.store(0, Ordering::SeqCst);
        // SAFETY: the same pointer, whose lifetime is forgotten. It is followed only between the claim of a unit and its
        // `done`, and `run` does not return before every unit is done, so that the work lives then.
        let work = unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(work) };
        // SAFETY: no unit is claimed and not done, so that nobody reads.
        unsafe { *self.work.get() = Some(work) };
        self.state.store((units as u64) << 32, Ordering::SeqCst);
    }

    fn has_work(&self) -> bool {
        let state = self.state.load(Ordering::SeqCst);
        (state & u64::from(u32::MAX)) < state >> 32
    }

    /// Claims a unit and computes it; whether there was one.
    fn work_on_one(&self) -> bool {
        if !self.has_work() {
            return false;
        }
        let state = self.state.fetch_add(1, Ordering::SeqCst);
        let (units, unit) = (state >> 32, state & u64::from(u32::MAX));
        if unit >= units {
            return false;
        }
        // SAFETY: see `publish`: the claimed unit is not done, so that this is the work it is of, and its caller still
        // waits.
        let work = || unsafe { (*self.work.get()).map(|work| (*work)(unit as usize)) };
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        if caught.is_err() {
            self.panicked.store(true, Ordering::SeqCst);
        }
        if self.done.fetch_add(1, Ordering::SeqCst) + 1 == units as usize
            && self.sleeping.load(Ordering::SeqCst)
        {
            drop(self.finished.lock().unwrap_or_else(PoisonError::into_inner));
            self.finish.notify_all();
        }
        true
    }

    /// Waits until all units are done.
    fn wait(&self, units: usize) {
        let start = Instant::now();
        while self.done.load(Ordering::SeqCst) < units {
            if start.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            let mut guard = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
            self.sleeping.store(true, Ordering::SeqCst);
            while self.done.load(Ordering::SeqCst) < units {
                guard = self.finish.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
            self.sleeping.store(false, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_computed_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for units in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..units).map(|_| AtomicUsize::new(0)).collect();
                pool.run(units, &|unit| {
                    counts[unit].fetch_add(1, Ordering::SeqCst);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::SeqCst) == 1), "{threads} {units}");
            }
        }
    }

    #[test]
    fn callers_beside_each_other_all_get_their_work_done() {
        let pool = Pool::new(3);
        thread::scope(|scope| {
            for caller in 0..4 {
                let pool = &pool;
                scope.spawn(move || {
                    for round in 0..2000 {
                        let sum = AtomicUsize::new(0);
                        let units = 1 + (round * 7 + caller) % 23;
                        pool.run(units, &|unit| {
                            sum.fetch_add(unit + 1, Ordering::SeqCst);
                        });
                        assert_eq!(sum.into_inner(), units * (units + 1) / 2);
                    }
                });
            }
        });
    }

    #[test]
    fn work_after_a_sleep_is_done_too() {
        let pool = Pool::new(2);
        for _ in 0..3 {
            while pool.shared.sleepers.load(Ordering::SeqCst) < 1 {
                thread::yield_now();
            }
            let count = AtomicUsize::new(0);
            pool.run(50, &|_| {
                count.fetch_add(1, Ordering::SeqCst);
            });
            assert_eq!(count.into_inner(), 50);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(2);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(10, &|unit| assert!(unit != 3, "unit 3"));
        }));
        assert!(caught.is_err());
        let count = AtomicUsize::new(0);
        pool.run(10, &|_| {
            count.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(count.into_inner(), 10);
    }
}
