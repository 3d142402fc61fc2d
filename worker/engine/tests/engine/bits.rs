//! A row's bits depend on its own sequence and on nothing else.

use expertmesh_engine::{ExpertStore, Isa, Level, NotResident, Pair};
use expertmesh_model::expert::ExpertId;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::budget::Layout;
use expertmesh_model::numerics::Numerics;
use expertmesh_scheduler::BLOCK_TOKENS;

use super::*;

/// The golden's model with the longest context: more than one partial of the softmax.
const LONG: &str = "golden/v3-yarn";
const LONG_LENGTH: usize = 1100;

fn tokens(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 31 + i * 7 + seed * 13 + 5) % 256).collect()
}

/// Every kind of attention and of gate; the first has more than one partial of the softmax in bf16.
const MODELS: [&str; 5] = [LONG, "golden/qwen3-moe", "golden/v2-lite", "golden/mixtral", "golden/olmoe"];

const FORMATS: [WeightFormat; 4] =
    [WeightFormat::Bf16, WeightFormat::Fp8, WeightFormat::Int8, WeightFormat::Int4];

/// How long the texts are: more than two blocks of the cache.
fn length(folder: &str, weights: WeightFormat) -> usize {
    if folder == LONG && weights == WeightFormat::Bf16 { LONG_LENGTH } else { 150 }
}

/// Everything that is computed in chunks of these lengths, repeated; of the logits the last chunk's.
fn in_chunks(backend: &CpuBackend, tokens: &[u32], lengths: &[usize], blocks: &[u32]) -> Record {
    let mut kv = backend.allocate_kv(blocks.iter().max().map_or(0, |&last| last as usize + 1)).unwrap();
    let (mut start, mut record, mut lengths) = (0, Record::default(), lengths.iter().cycle());
    while start < tokens.len() {
        let end = tokens.len().min(start + lengths.next().unwrap());
        let span = Span { tokens: tokens[start..end].to_vec(), start, blocks: blocks.to_vec(), logits: true };
        record.append(compute(backend, &Step { spans: vec![span] }, &mut kv));
        start = end;
    }
    record
}

#[test]
fn every_instruction_set_and_any_number_of_threads_give_the_same_bits_in_all_formats_and_numerics() {
    for level in Level::ALL.into_iter().filter(|&level| Isa::new(level).is_none()) {
        eprintln!("skipped: this machine has no {level}, whose bits are compared where it is");
    }
    let sets = Isa::available().zip([2, 5, 1, 2]);
    let best = [(Isa::detect(), 2), (Isa::detect(), 5)];
    let others: Vec<(Isa, usize)> = sets.chain(best).collect();
    for folder in MODELS {
        for weights in FORMATS {
            let tokens = tokens(length(folder, weights), 10);
            for numerics in Numerics::ALL {
                let compute = |isa, threads| {
                    let backend = load_as(folder, &LoadOptions { weights, numerics, isa, threads });
                    in_chunks(&backend, &tokens, &[tokens.len()], &blocks(tokens.len()))
                };
                let expected = compute(Isa::detect(), 1);
                for &(isa, threads) in &others {
                    let same = compute(isa, threads) == expected;
                    assert!(same, "{folder} {weights} {numerics}: {isa} on {threads} threads differs");
                }
            }
        }
    }
}

#[test]
fn chunks_block_tables_and_batches_change_no_bit_in_any_format_and_numerics() {
    for folder in MODELS {
        for weights in FORMATS {
            for numerics in Numerics::ALL {
                let options = LoadOptions { weights, numerics, threads: 2, ..LoadOptions::default() };
                let backend = load_as(folder, &options);
                let (first, second) = (tokens(150, 11), tokens(90, 12));
                let expected = in_chunks(&backend, &first, &[150], &[0, 1, 2]);
                for (lengths, table) in [(&[1][..], [2, 0, 1]), (&[63, 1, 65], [7, 3, 5]), (&[17], [0, 9, 1])]
                {
                    let chunked = in_chunks(&backend, &first, lengths, &table);
                    assert!(chunked == expected, "{folder} {weights} {numerics}: chunks of {lengths:?}");
                }
                // The end of one sequence beside the beginning of another.
                let alone = in_chunks(&backend, &second, &[90], &[0, 1]);
                let (mut kv, table) = (backend.allocate_kv(6).unwrap(), vec![4, 1, 2]);
                let span = |tokens: &[u32], start, blocks| Span {
                    tokens: tokens.to_vec(),
                    start,
                    blocks,
                    logits: true,
                };
                compute(&backend, &Step { spans: vec![span(&first[..140], 0, table.clone())] }, &mut kv);
                let spans = vec![span(&second, 0, vec![5, 0]), span(&first[140..], 140, table)];
                let together = compute(&backend, &Step { spans }, &mut kv);
                let logits = [alone.logits, expected.logits].concat();
                assert!(together.logits == logits, "{folder} {weights} {numerics}: a batch differs");
            }
        }
    }
}

#[test]
fn chunks_of_a_prompt_give_the_bits_of_one_pass() {
    let backend = load(LONG);
    let (tokens, blocks) = (tokens(LONG_LENGTH, 1), blocks(LONG_LENGTH));
    let whole = in_chunks(&backend, &tokens, &[LONG_LENGTH], &blocks);
    for lengths in [&[1][..], &[63, 1, 65], &[256], &[1023, 77]] {
        let chunked = in_chunks(&backend, &tokens, lengths, &blocks);
        assert_eq!(chunked.logits, whole.logits, "chunks of {lengths:?}");
    }
}

#[test]
fn the_order_of_a_block_table_changes_no_bit() {
    let backend = load(LONG);
    let tokens = tokens(LONG_LENGTH, 2);
    let ascending = blocks(LONG_LENGTH);
    let descending: Vec<u32> = ascending.iter().rev().copied().collect();
    let scattered: Vec<u32> = ascending.iter().map(|block| block * 7 % 19 + 3).collect();
    let whole = in_chunks(&backend, &tokens, &[200], &ascending);
    for table in [descending, scattered] {
        assert_eq!(in_chunks(&backend, &tokens, &[200], &table), whole, "{table:?}");
    }
}

#[test]
fn a_sequence_in_a_batch_has_the_bits_that_it_has_alone() {
    let backend = load("models/tiny-r1");
    // A long prompt, a chunk that continues one, a single token and a short prompt, ragged, in one step.
    let sequences: Vec<Vec<u32>> =
        [(130, 3), (70, 4), (66, 5), (5, 6)].map(|(n, seed)| tokens(n, seed)).to_vec();
    let starts = [0, 40, 65, 0];
    let tables = [vec![7, 1, 4], vec![0, 9], vec![8, 2], vec![3]];
    let span = |i: usize, from: usize, to: usize| Span {
        tokens: sequences[i][from..to].to_vec(),
        start: from,
        blocks: tables[i].clone(),
        logits: true,
    };
    let mut kv = backend.allocate_kv(10).unwrap();
    let before = Step { spans: vec![span(1, 0, 40), span(2, 0, 65)] };
    compute(&backend, &before, &mut kv);
    let batch = Step { spans: (0..4).map(|i| span(i, starts[i], sequences[i].len())).collect() };
    let together = compute(&backend, &batch, &mut kv);

    let vocabulary = backend.config().vocabulary;
    for (i, tokens) in sequences.iter().enumerate() {
        let mut kv = backend.allocate_kv(3).unwrap();
        let alone = compute(&backend, &whole(tokens), &mut kv);
        assert_eq!(together.logits[i * vocabulary..][..vocabulary], alone.logits, "sequence {i}");
    }
}

#[test]
fn blocks_that_another_sequence_left_dirty_change_no_bit() {
    let backend = load("golden/v3");
    let (first, second) = (tokens(100, 7), tokens(80, 8));
    let mut clean = backend.allocate_kv(2).unwrap();
    let expected = compute(&backend, &whole(&second), &mut clean);
    let mut dirty = backend.allocate_kv(2).unwrap();
    compute(&backend, &whole(&first), &mut dirty);
    assert_eq!(compute(&backend, &whole(&second), &mut dirty), expected);
}

#[test]
fn an_expert_gives_a_row_the_same_bits_in_every_group() {
    let backend = load("golden/v3");
    let hidden = backend.config().hidden;
    let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 25.0;
    let values: Vec<u16> = (0..9 * hidden).map(|i| (value(i).to_bits() >> 16) as u16).collect();
    let mut queue = backend.queue().unwrap();
    let inputs = backend.upload(&mut queue, &values);
    let here = backend.pin(1, &[2, 5]);
    let mut answers = |pairs: &[Pair]| {
        let routes = backend.pairs(&mut queue, pairs);
        let mut answers = backend.answers(&mut queue, &routes);
        backend.experts(&mut queue, &here, &inputs, &routes, &mut answers);
        let all: Vec<u32> = (0..pairs.len() as u32).collect();
        backend.gather(&mut queue, &answers, &all).wait() // (pairs, hidden)
    };
    let all: Vec<Pair> = (0..9).map(|row| Pair { row, expert: 5 }).collect();
    let all = answers(&all);
    for rows in [vec![8], vec![3, 0, 8], vec![7, 7]] {
        let fives = rows.iter().map(|&row| Pair { row, expert: 5 });
        let pairs: Vec<Pair> = [Pair { row: 1, expert: 2 }].into_iter().chain(fives).collect();
        let some = answers(&pairs);
        for (at, &row) in rows.iter().enumerate() {
            assert_eq!(some[(1 + at) * hidden..][..hidden], all[row as usize * hidden..][..hidden]);
        }
    }
}

#[test]
fn an_expert_that_is_not_resident_is_named_and_computes_the_same_after_it_was_loaded_again() {
    let backend = load("golden/v3");
    let tokens = tokens(BLOCK_TOKENS, 9);
    let before = compute(&backend, &whole(&tokens), &mut backend.allocate_kv(1).unwrap());
    let expert = before.routes[1].experts[0];
    let (evicted, kept) = (ExpertId::new(2, expert), ExpertId::new(1, expert));
    backend.evict(evicted);
    assert!(!backend.is_resident(evicted) && backend.is_resident(kept));
    assert_eq!(LocalExchange::new(&backend).err(), Some(NotResident(evicted)));
    let bytes = backend.load(evicted).unwrap();
    assert_eq!(bytes, Layout::Cpu1.expert_bytes(backend.config(), WeightFormat::Native));
    assert_eq!(compute(&backend, &whole(&tokens), &mut backend.allocate_kv(1).unwrap()), before);
}
