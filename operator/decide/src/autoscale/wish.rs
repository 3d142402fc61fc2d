//! The size that the load alone calls for, without limits and bounds.

use expertmesh_proto::slot::Slot;

use super::interval::HIGH;
use super::load::Load;
use super::policy::Size;
use super::verdict::Reason;
use super::window::Summary;

/// A load at which fewer workers may do.
const LOW: f64 = 0.40;
/// The load that the workers which stay may be expected to have.
const CARRIED: f64 = 0.50;
/// The share of the latent caches that they may fill.
const KV_CARRIED: f32 = 0.9;

/// A size, and why it is called for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wish {
    pub(super) workers: u32,
    pub(super) reason: Reason,
}

/// What a wish follows from.
pub(super) struct Grounds<'a> {
    pub(super) summary: Summary,
    pub(super) size: &'a Size,
    /// The load as it was last looked at.
    pub(super) now: Option<&'a Load>,
    /// The load of one request alone; 0 while unknown.
    pub(super) alone: f64,
    /// Whether more workers would change no latency.
    pub(super) is_hopeless: bool,
}

impl Grounds<'_> {
    pub(super) fn wish(&self) -> Wish {
        let (summary, n) = (&self.summary, self.size.workers);
        // With a worker for each request there is nobody to wait for: more workers would make none faster.
        let is_alone = summary.alone && !summary.by_queue;
        if summary.load > HIGH && !is_alone {
            return self.more();
        }
        if !summary.complete {
            return Wish { workers: n, reason: Reason::Unseen };
        }
        if summary.load >= LOW && !is_alone {
            return Wish { workers: n, reason: Reason::Steady };
        }
        let enough = (self.size.at_least.max(1)..n).find(|&workers| self.carry(workers));
        enough.map_or(Wish { workers: n, reason: Reason::Steady }, |workers| Wish {
            workers,
            reason: Reason::Spare,
        })
    }

    /// As many workers as bring the load to [`HIGH`], where more would help.
    fn more(&self) -> Wish {
        let (summary, n) = (&self.summary, self.size.workers);
        let workers = n.max((summary.demand / HIGH - 1e-9).ceil() as u32);
        // A queue is no latency: it is worked off by more of them all the same.
        let reason = match workers > n {
            false => Reason::Steady,
            true if self.size.failing.is_some() => Reason::Failing,
            true if self.is_hopeless => Reason::Unattainable,
            true if summary.by_queue => Reason::Queue,
            true => Reason::Goal,
        };
        let grows = matches!(reason, Reason::Queue | Reason::Goal);
        Wish { workers: if grows { workers } else { n }, reason }
    }

    /// Whether so many could do what all do now. What a request takes alone stays; what it takes beyond that grows as the
    /// workers become fewer: at least in proportion, at most like the time in a single queue, alone / (1 − busy). The truth
    /// is taken to be in the middle.
    fn carry(&self, workers: u32) -> bool {
        let Some(now) = self.now else { return false };
        // The highest slots leave, also where the lowest are those that are not ready.
        let staying = now.slots.range(..Slot(workers)).count() as f64;
        let ready = f64::from(now.ready);
        if staying == 0.0 || now.queued() > 0 {
            return false;
        }
        let shrinks = ready / staying;
        let load = self.summary.demand / ready;
        let alone = self.alone.min(load);
        let in_proportion = alone + (load - alone) * shrinks;
        let idle = 1.0 - (1.0 - alone / load) * shrinks;
        let expected = match alone > 0.0 {
            true if idle <= 0.0 => f64::INFINITY,
            true => (in_proportion + alone / idle) / 2.0,
            false => in_proportion,
        };
        let is_alone = self.summary.alone && self.summary.together <= staying;
        (expected <= CARRIED || is_alone) && now.kv_usage * shrinks as f32 <= KV_CARRIED
    }
}
