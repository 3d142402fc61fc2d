//! The share of tiny-r1's held-out questions that the fast path answers exactly, beside transformers': tests/models/ask.py
//! recorded that. `--nocapture` prints the shares.

use std::collections::HashMap;

use expertmesh_model::format::WeightFormat;
use expertmesh_model::numerics::Numerics;

use super::*;

/// Tokens of an answer at most, as in ask.py.
const MOST: usize = 160;

#[derive(serde::Deserialize)]
struct Question {
    want: String,
    ids: Vec<u32>,
    /// What transformers answered, greedily, in float32.
    answer: Vec<u32>,
}

fn questions() -> Vec<Question> {
    let answers = std::fs::read(model(TINY).join("answers.json")).unwrap();
    let questions: Vec<Question> = serde_json::from_slice(&answers).unwrap();
    assert_eq!(questions.len(), 200);
    questions
}

/// Tokens to text, as far as answers to these questions go: they are ASCII.
struct Text(HashMap<u32, String>);

impl Text {
    fn of_tiny_r1() -> Self {
        let tokenizer = std::fs::read(model(TINY).join("tokenizer.json")).unwrap();
        let tokenizer: serde_json::Value = serde_json::from_slice(&tokenizer).unwrap();
        let vocabulary = tokenizer["model"]["vocab"].as_object().unwrap();
        // Byte-level vocabularies spell the space and the end of a line so.
        let text = |token: &String| token.replace('Ġ', " ").replace('Ċ', "\n");
        Self(vocabulary.iter().map(|(token, id)| (id.as_u64().unwrap() as u32, text(token))).collect())
    }

    /// What follows the reasoning, as grade.py takes it.
    fn answer(&self, tokens: &[u32]) -> String {
        const END: u32 = 1;
        const REASONED: u32 = 5; // </think>
        let after = tokens.iter().rposition(|&token| token == REASONED).map_or(0, |at| at + 1);
        let text = tokens[after..].iter().filter(|&&token| token != END);
        text.map(|token| self.0.get(token).map_or("", String::as_str)).collect::<String>().trim().to_owned()
    }
}

/// Greedy, all questions in one batch.
fn ask(backend: &CpuBackend, questions: &[Question]) -> Vec<Vec<u32>> {
    let mut allocator = BlockAllocator::new(questions.len() * BlockAllocator::needed(MOST + 64));
    let mut kv = backend.allocate_kv(allocator.total()).unwrap();
    let (mut queue, mut exchange) = (backend.queue().unwrap(), LocalExchange::new(backend).unwrap());
    let (mut tables, mut answers) = (vec![Vec::new(); questions.len()], vec![Vec::new(); questions.len()]);
    let mut open: Vec<usize> = (0..questions.len()).collect();
    while !open.is_empty() {
        let spans = open.iter().map(|&at| {
            let (prompt, answer): (&[u32], &Vec<u32>) = (&questions[at].ids, &answers[at]);
            allocator.grow(&mut tables[at], prompt.len() + answer.len()).unwrap();
            let (tokens, start) = match answer.last() {
                None => (prompt.to_vec(), 0),
                Some(&last) => (vec![last], prompt.len() + answer.len() - 1),
            };
            Span { tokens, start, blocks: tables[at].clone(), logits: true }
        });
        let step = Step { spans: spans.collect() };
        let logits = forward(backend, &mut queue, &step, &mut kv, &mut exchange, None).unwrap();
        let logits = backend.download(&mut queue, &logits).wait();
        for (&at, logits) in open.iter().zip(logits.chunks_exact(backend.config().vocabulary)) {
            // Of equal ones the first, as everywhere.
            let best = (0..logits.len() as u32).zip(logits).rev().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
            answers[at].push(best.0);
        }
        open.retain(|&at| {
            answers[at].len() < MOST && !backend.config().eos.contains(&answers[at][answers[at].len() - 1])
        });
    }
    answers
}

#[test]
fn held_out_questions_are_answered_exactly_as_often_as_by_transformers() {
    let (questions, text) = (questions(), Text::of_tiny_r1());
    let share = |answers: &[Vec<u32>]| {
        let exact =
            questions.iter().zip(answers).filter(|(question, answer)| text.answer(answer) == question.want);
        exact.count() as f64 * 100.0 / questions.len() as f64
    };
    let theirs: Vec<Vec<u32>> = questions.iter().map(|question| question.answer.clone()).collect();
    let transformers = share(&theirs);
    println!("transformers: {transformers} % exact");
    assert!(transformers > 80.0, "the text is read wrongly");
    for (weights, most) in [
        (WeightFormat::Bf16, 1.0),
        (WeightFormat::Fp8, 1.0),
        (WeightFormat::Int8, 1.0),
        (WeightFormat::Int4, 3.0),
    ] {
        for numerics in Numerics::ALL {
            let options = LoadOptions { weights, numerics, ..LoadOptions::default() };
            let ours = ask(&load_as(TINY, &options), &questions);
            let (exact, same) = (share(&ours), ours.iter().zip(&theirs).filter(|(a, b)| a == b).count());
            println!(
                "{weights} {numerics}: {exact} % exact, {same} of {} answers the same tokens",
                ours.len()
            );
            assert!(exact >= transformers - most, "{weights} {numerics}: {exact} % of {transformers} %");
        }
    }
}
