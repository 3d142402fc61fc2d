//! How fast all threads together read memory that no cache holds: what bounds the decode of one sequence.

use std::hint::black_box;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use expertmesh_model::threads::compute_threads;

/// All threads' buffers together, in bytes: some machines report 480 MiB of last-level cache.
const BYTES: usize = 2 << 30;

/// Words of two cache lines, which are fetched together.
const LINES: usize = 16;

/// Passes over the buffers; the best counts.
const PASSES: usize = 5;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Threads that read; default: one per physical core
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let threads = args.threads.unwrap_or_else(compute_threads).max(1);
    println!("{:.1} GB/s read by {threads} threads", measure(threads) / 1e9);
    Ok(())
}

/// Bytes per second, the best of five passes and of several ways to read.
pub(crate) fn measure(threads: usize) -> f64 {
    let barrier = Barrier::new(threads);
    thread::scope(|scope| {
        let readers: Vec<_> =
            (0..threads).map(|_| scope.spawn(|| read(&barrier, BYTES / threads / 8))).collect();
        let passes = readers.into_iter().filter_map(|reader| reader.join().ok());
        // A pass takes as long as its slowest thread: all begin it together.
        let seconds =
            passes.reduce(|slowest, reader| slowest.iter().zip(&reader).map(|(a, b)| a.max(*b)).collect());
        let best = seconds.unwrap_or_default().into_iter().fold(f64::INFINITY, f64::min);
        BYTES as f64 / best
    })
}

/// The seconds of each pass over so many words, which this thread has touched first.
fn read(barrier: &Barrier, words: usize) -> Vec<f64> {
    let buffer: Vec<u64> = (0..words as u64).collect();
    let ways: [fn(&[u64]) -> u64; 3] = [streams::<1>, streams::<2>, streams::<4>];
    let passes = ways.into_iter().flat_map(|way| [way; PASSES]);
    passes
        .map(|way| {
            barrier.wait();
            let start = Instant::now();
            black_box(way(black_box(&buffer)));
            start.elapsed().as_secs_f64()
        })
        .collect()
}

/// Sums S parts side by side, two cache lines of each at a time: prefetchers end at a page's border.
fn streams<const S: usize>(words: &[u64]) -> u64 {
    let part = words.len() / S;
    let parts: [_; S] = std::array::from_fn(|s| words[s * part..(s + 1) * part].as_chunks::<LINES>().0);
    let mut sums = [[0u64; LINES]; S];
    for at in 0..part / LINES {
        for (sums, part) in sums.iter_mut().zip(&parts) {
            add(sums, &part[at]);
        }
    }
    sums.as_flattened().iter().fold(0, |all, sum| all.wrapping_add(*sum))
}

#[inline(always)]
fn add(sums: &mut [u64; LINES], words: &[u64; LINES]) {
    for (sum, word) in sums.iter_mut().zip(words) {
        *sum = sum.wrapping_add(*word);
    }
}
