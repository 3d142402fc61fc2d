//! How many workers the goals need: a load from latencies and queues, a wish from the load, a size from the wish.
//!
//! The load s is the mean over 45 s of min(2, max(P90 TTFT / goal, P90 TPOT / goal)). Above 0.55, n workers of which r are
//! ready become max(n, n + ⌈n·(s·(r/n)/0.55 − 1)⌉), each part of the window counting the workers that were ready then.
//! Below 0.40 fewer may do. What is wished is made within the limits of `behavior`; what is silent is never taken for idle.

pub mod autoscaler;
mod effect;
mod interval;
pub mod limits;
pub mod load;
pub mod policy;
mod scaler;
pub mod schedule;
pub mod verdict;
mod window;
mod wish;
