//! Sequences over scripted workers.

use expertmesh_proto::slot::Slot;
use expertmesh_proto::v1::report_response::State;

use super::*;
use crate::frontend::scripted::{Act, QUEUE_TIMEOUT, Stage, fingerprint, stage, token_at};
use crate::frontend::sequence::Generated;
use crate::frontend::setback::MAX_FAILURES;

impl Stage {
    fn sequence(&self, max_tokens: u32, patience: Patience) -> Sequence {
        let request = SequenceRequest {
            id: "s".to_string(),
            prompt: vec![7; 3],
            max_tokens,
            min_tokens: 0,
            stop_tokens: vec![1],
            sampling: v1::Sampling { seed: 5, ..v1::Sampling::default() },
            logprobs: Some(0),
        };
        Sequence::new(request, self.workers.clone(), self.metrics.clone(), patience, Parent::default())
    }

    async fn run(&self, max_tokens: u32) -> Result<(Vec<u32>, End), SequenceError> {
        let patience = Patience { stall: Duration::from_millis(300), queue: QUEUE_TIMEOUT };
        collect(self.sequence(max_tokens, patience)).await
    }
}

async fn collect(mut sequence: Sequence) -> Result<(Vec<u32>, End), SequenceError> {
    let mut tokens = Vec::new();
    loop {
        match sequence.next().await? {
            Step::Token(Generated { id, .. }) => tokens.push(id),
            Step::Ended(end) => return Ok((tokens, end)),
        }
    }
}

fn tokens(count: usize) -> Vec<u32> {
    (3..3 + count).map(token_at).collect()
}

#[tokio::test]
async fn a_sequence_that_meets_every_misfortune_has_all_its_tokens_once() {
    for act in
        [Act::Die(5), Act::Move(5), Act::Stall(5), Act::Repeat(5), Act::Skip(5), Act::Die(0), Act::Move(0)]
    {
        let stage = stage(&[&[act], &[Act::Die(3)], &[]]).await;
        assert_eq!(stage.run(20).await.unwrap(), (tokens(20), End::Length), "{act:?}");
        let last = stage.seen(2).pop().unwrap();
        let before = last.tokens.len() - 3;
        assert_eq!((last.max_tokens as usize, last.caller.unwrap().attempt), (20 - before, 2), "{act:?}");
        assert_eq!(last.tokens[3..], tokens(before), "{act:?}");
        assert_eq!((last.prompt_tokens, last.logprobs), (3, Some(0)), "{act:?}");
    }
}

#[tokio::test]
async fn a_worker_that_is_full_passes_the_sequence_on() {
    let stage = stage(&[&[Act::Refuse(Code::ResourceExhausted)], &[]]).await;
    assert_eq!(stage.run(4).await.unwrap(), (tokens(4), End::Length));
    assert_eq!((stage.seen(0).len(), stage.seen(1).len()), (1, 1));
}

#[tokio::test]
async fn the_only_worker_is_tried_again_once_it_has_room() {
    let full = [Act::Refuse(Code::ResourceExhausted); 4];
    let stage = stage(&[&full]).await;
    assert_eq!(stage.run(4).await.unwrap(), (tokens(4), End::Length));
}

#[tokio::test]
async fn a_sequence_ends_with_its_stop_token_even_where_the_worker_cannot_say_so() {
    for script in [&[][..], &[Act::DieAfterLast]] {
        let stage = stage(&[script, &[]]).await;
        assert_eq!(stage.run(100).await.unwrap(), (tokens(38), End::Stop));
        assert_eq!(stage.seen(1).len(), 0, "there was nothing left to do");
    }
    let stage = stage(&[&[Act::DieAfterLast], &[]]).await;
    assert_eq!(stage.run(6).await.unwrap(), (tokens(6), End::Length));
}

#[tokio::test]
async fn what_no_worker_would_take_is_not_tried_twice() {
    let stage = stage(&[&[Act::Refuse(Code::InvalidArgument)], &[]]).await;
    assert_eq!(stage.run(4).await, Err(SequenceError::Refused("scripted".to_string())));
    assert_eq!(stage.seen(1).len(), 0);
}

#[tokio::test]
async fn failures_in_a_row_are_bounded() {
    let dead = [Act::Die(0); MAX_FAILURES as usize];
    let stage = stage(&[&dead]).await;
    let error = stage.run(4).await.unwrap_err();
    assert!(matches!(error, SequenceError::GaveUp { failures: MAX_FAILURES, .. }), "{error}");
}

#[tokio::test]
async fn a_sequence_waits_for_a_worker_that_becomes_ready_and_not_for_ever() {
    let stage = stage(&[&[]]).await;
    stage.players[0].state.send_replace(State::Draining);
    stage.until_eligible(0).await;
    let waiting = tokio::spawn(collect(
        stage.sequence(4, Patience { stall: Duration::from_secs(9), queue: Duration::from_secs(9) }),
    ));
    tokio::task::yield_now().await;
    stage.players[0].state.send_replace(State::Ready);
    assert_eq!(waiting.await.unwrap().unwrap().0, tokens(4));
    stage.players[0].state.send_replace(State::Draining);
    stage.until_eligible(0).await;
    let expected = NoWorker::NoneReady("no worker can take a sequence: 0 draining".to_string());
    assert_eq!(stage.run(4).await, Err(SequenceError::NoWorker(expected)));
}

#[tokio::test]
async fn a_sequence_under_way_waits_though_the_queue_is_full() {
    let stage = stage(&[&[Act::Die(2)]]).await;
    stage.workers.fill_queue();
    let patience = Patience { stall: Duration::from_secs(9), queue: QUEUE_TIMEOUT };
    let mut sequence = stage.sequence(4, patience);
    sequence.next().await.unwrap();
    stage.players[0].state.send_replace(State::Draining);
    stage.until_eligible(0).await;
    assert_eq!(stage.run(4).await, Err(SequenceError::NoWorker(NoWorker::QueueFull)));
    let rest = tokio::spawn(collect(sequence));
    sleep(Duration::from_millis(50)).await;
    stage.players[0].state.send_replace(State::Ready);
    assert_eq!(rest.await.unwrap().unwrap().0, tokens(4)[1..]);
}

#[tokio::test]
async fn a_worker_of_another_model_gets_nothing() {
    let stage = stage(&[&[], &[]]).await;
    *stage.players[0].fingerprint.lock().unwrap() = fingerprint("other");
    stage.players[0].state.send_replace(State::Ready);
    stage.until_eligible(1).await;
    assert_eq!(stage.run(4).await.unwrap().0, tokens(4));
    assert_eq!((stage.seen(0).len(), stage.seen(1).len()), (0, 1));
}

#[tokio::test]
async fn dropping_a_sequence_frees_its_worker() {
    let stage = stage(&[&[Act::Stall(2)]]).await;
    let mut sequence =
        stage.sequence(9, Patience { stall: Duration::from_secs(9), queue: Duration::from_secs(9) });
    sequence.next().await.unwrap();
    assert_eq!(stage.workers.in_flight(Slot(0)), Some(1));
    drop(sequence);
    assert_eq!(stage.workers.in_flight(Slot(0)), Some(0));
}
