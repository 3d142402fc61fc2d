//! The seam fits a device: a backend whose queues run later gives the processor's bits, misuse is noticed, and its
//! failures have names.

use std::panic::{AssertUnwindSafe, catch_unwind};

use expertmesh_deferred::DeferredCpu;
use expertmesh_engine::{Attended, Draw, ExpertStore, History};
use expertmesh_model::sampling::{Sampling, SamplingParams};

use super::*;

const MODEL: &str = "golden/v3";

fn tokens() -> Vec<u32> {
    (0..70).map(|at| (at * 31 + 5) % 256).collect()
}

/// What a panic said.
fn panicked(work: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(work)).expect_err("it panics");
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or_default().to_owned()
}

#[test]
fn a_backend_whose_queues_run_later_gives_the_bits_of_the_processor() {
    for folder in [MODEL, "golden/qwen3-moe", "golden/v2-lite", "golden/mixtral", "golden/olmoe", TINY] {
        let (processor, deferred) = (load(folder), DeferredCpu::new(load(folder)));
        let step = every_row(&tokens(), &blocks(70));
        let expected = compute(&processor, &step, &mut processor.allocate_kv(2).unwrap());
        let found = compute(&deferred, &step, &mut deferred.allocate_kv(2).unwrap());
        assert!(found == expected, "{folder}");
    }
}

#[test]
fn what_nobody_looks_at_has_the_same_bits_and_a_drawn_token_is_the_processors() {
    fn logits_and_token<B: Backend>(backend: &B) -> (Vec<f32>, u32) {
        let (mut queue, mut kv) = (backend.queue().unwrap(), backend.allocate_kv(2).unwrap());
        let (mut exchange, step) = (LocalExchange::new(backend).unwrap(), whole(&tokens()));
        let logits = forward(backend, &mut queue, &step, &mut kv, &mut exchange, None).unwrap();
        let sampling = Sampling::new(SamplingParams { seed: 7, ..SamplingParams::default() }).unwrap();
        let history = History::new(&sampling, &tokens(), 70);
        let draw = Draw { row: 0, sampling: &sampling, history: &history, logprobs: Some(2) };
        let drawn = backend.sample(&mut queue, &logits, &[draw]).wait().remove(0).unwrap();
        (backend.download(&mut queue, &logits).wait(), drawn.token)
    }
    let (processor, deferred) = (load(MODEL), DeferredCpu::new(load(MODEL)));
    let seen = compute(&processor, &whole(&tokens()), &mut processor.allocate_kv(2).unwrap());
    let unseen = logits_and_token(&processor);
    assert_eq!(unseen.0, seen.logits);
    assert_eq!(logits_and_token(&deferred), unseen);
}

#[test]
fn a_value_of_another_queue_and_a_wait_that_was_forgotten_are_noticed() {
    let backend = DeferredCpu::new(load(MODEL));
    let (mut one, mut other) = (backend.queue().unwrap(), backend.queue().unwrap());
    let step = backend.begin(&mut one, &whole(&[1, 2]));
    assert_eq!(panicked(|| drop(backend.embed(&mut other, &step))), "a value of another queue");
    let rows = backend.embed(&mut one, &step);
    let forgotten = panicked(|| drop(backend.download(&mut one, &rows)));
    assert_eq!(forgotten, "a value was asked for, and nobody waited for it");
    assert_eq!(backend.failure(), None);
}

#[test]
fn an_answer_that_nobody_wrote_loses_the_device_with_its_name() {
    let backend = DeferredCpu::new(load(MODEL));
    let (mut queue, mut kv) = (backend.queue().unwrap(), backend.allocate_kv(1).unwrap());
    let step = backend.begin(&mut queue, &whole(&[1, 2]));
    let mut hidden = backend.embed(&mut queue, &step);
    let layer = backend.config().first_moe_layer();
    let Attended::Moe { normed, routes } = backend.attend(&mut queue, layer, &step, &mut hidden, &mut kv)
    else {
        panic!("layer {layer} has experts")
    };
    let mut answers = backend.answers(&mut queue, &routes);
    backend.experts(&mut queue, &backend.pin(layer, &[0]), &normed, &routes, &mut answers);
    let lost = panicked(|| drop(backend.gather(&mut queue, &answers, &[0]).wait()));
    assert!(lost.starts_with("deferred-cpu: the answer ") && lost.ends_with("was not written"), "{lost}");
    assert_eq!(backend.failure(), Some(lost));
}

#[test]
fn what_is_enqueued_outlives_an_eviction() {
    let (processor, deferred) = (load(MODEL), DeferredCpu::new(load(MODEL)));
    let step = whole(&tokens());
    let expected = compute(&processor, &step, &mut processor.allocate_kv(2).unwrap());
    let (mut queue, mut kv) = (deferred.queue().unwrap(), deferred.allocate_kv(2).unwrap());
    let mut exchange = LocalExchange::new(&deferred).unwrap();
    let bytes = deferred.bytes();
    assert!(bytes > 0);
    let logits = forward(&deferred, &mut queue, &step, &mut kv, &mut exchange, None).unwrap();
    drop(exchange);
    for layer in deferred.config().moe_layers() {
        (0..16).for_each(|expert| deferred.evict(ExpertId::new(layer as u32, expert)));
    }
    assert_eq!(deferred.download(&mut queue, &logits).wait(), expected.logits);
    assert_eq!(deferred.bytes(), 0);
}

#[test]
fn a_lost_device_ends_every_wait_with_its_name() {
    let backend = DeferredCpu::new(load(MODEL));
    backend.lose_after(9);
    let lost = panicked(|| {
        compute(&backend, &whole(&tokens()), &mut backend.allocate_kv(2).unwrap());
    });
    assert_eq!(lost, "deferred-cpu: lost on command");
    assert_eq!(backend.failure(), Some(lost));
}

#[test]
fn memory_that_cannot_be_had_is_an_error_with_its_bytes() {
    let backend = DeferredCpu::new(load(MODEL));
    let expert = ExpertId::new(1, 3);
    backend.evict(expert);
    backend.refuse_above(1000);
    let error = backend.allocate_kv(2).err().unwrap();
    assert_eq!(
        (error.reason(), error.to_string()),
        ("OutOfMemory", "no memory for 24576 bytes of the cache: deferred-cpu has none".to_owned())
    );
    let error = backend.load(expert).unwrap_err();
    assert!(error.to_string().ends_with("bytes of weights: deferred-cpu has none"), "{error}");
    assert!(!backend.is_resident(expert));
}
