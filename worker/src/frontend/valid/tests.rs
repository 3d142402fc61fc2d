use serde_json::{Value, json};

use super::*;
use crate::tokenizer::tests::tiny_r1;

/// The seed of requests that name none.
const DRAWN: u64 = 77;

fn model() -> Model {
    Model::load(&tiny_r1(), "tiny-r1".to_string(), None).unwrap()
}

fn hello(more: Value) -> Value {
    merged(json!({"model": "tiny-r1", "messages": [{"role": "user", "content": "What is 46 + 37?"}]}), more)
}

fn merged(mut body: Value, more: Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn chat(body: Value) -> Result<ValidRequest, ApiError> {
    ValidRequest::chat(&model(), body.to_string().as_bytes(), DRAWN)
}

fn completion(more: Value) -> Result<ValidRequest, ApiError> {
    let body = merged(json!({"model": "tiny-r1"}), more);
    ValidRequest::completion(&model(), body.to_string().as_bytes(), DRAWN)
}

fn only(request: ValidRequest) -> ValidChoice {
    let mut choices = request.choices("id");
    assert_eq!(choices.len(), 1);
    choices.remove(0)
}

/// The param and message of a refusal.
fn refusal(result: Result<ValidRequest, ApiError>) -> (String, String) {
    let error = result.unwrap_err();
    let param = error.body()["error"]["param"].as_str().unwrap_or_default().to_string();
    (param, error.to_string())
}

#[test]
fn what_a_request_leaves_out_comes_from_the_model() {
    let choice = only(chat(hello(json!({}))).unwrap());
    let SequenceRequest { prompt, max_tokens, min_tokens, stop_tokens, sampling, .. } = choice.sequence;
    assert_eq!((prompt.len(), max_tokens, min_tokens, stop_tokens), (15, 1024 - 15, 0, vec![1]));
    let expected = v1::Sampling {
        temperature: 0.6,
        top_p: 0.95,
        repetition_penalty: 1.0,
        seed: DRAWN,
        ..Default::default()
    };
    assert_eq!((sampling, choice.sequence.logprobs), (expected, None));
    assert!(choice.reasoning.is_some() && choice.stops.is_empty());
}

#[test]
fn what_a_request_says_is_done() {
    let wishes = json!({"max_tokens": 9, "temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "seed": -2,
        "repetition_penalty": 1.1, "presence_penalty": -2, "frequency_penalty": 0.5,
        "logit_bias": {"5": -100, "12": 1.5}, "logprobs": true, "top_logprobs": 4, "min_tokens": 2, "stop": "x", "stop_token_ids": [7, 1, 7], "stream": true,
        "stream_options": {"include_usage": true}, "return_token_ids": true});
    let request = chat(hello(wishes)).unwrap();
    assert_eq!(request.reply(), Reply { stream: true, include_usage: true, return_token_ids: true });
    let choice = only(request);
    assert_eq!(choice.stops, ["x"]);
    let SequenceRequest { max_tokens, min_tokens, stop_tokens, sampling, .. } = choice.sequence;
    assert_eq!((max_tokens, min_tokens, stop_tokens), (9, 2, vec![1, 7]));
    let expected = v1::Sampling {
        temperature: 0.0,
        top_p: 0.5,
        top_k: 0,
        min_p: 0.1,
        seed: u64::MAX - 1,
        repetition_penalty: 1.1,
        presence_penalty: -2.0,
        frequency_penalty: 0.5,
        logit_bias: vec![v1::TokenBias { id: 12, bias: 1.5 }, v1::TokenBias { id: 5, bias: -100.0 }],
    };
    assert_eq!((sampling, choice.sequence.logprobs), (expected, Some(4)));
    let both =
        only(chat(hello(json!({"max_tokens": 9, "max_completion_tokens": 5, "ignore_eos": true}))).unwrap());
    assert_eq!((both.sequence.max_tokens, both.sequence.stop_tokens), (5, vec![]));
}

#[test]
fn every_choice_has_its_own_seed_and_every_prompt_its_own_tokens() {
    let request = completion(json!({"prompt": ["One", [2, 3]], "n": 2})).unwrap_err();
    assert_eq!(request.status(), 400, "a list holds one kind of prompt");
    let request =
        completion(json!({"prompt": [[5, 6, 7], [8]], "n": 2, "seed": 3, "temperature": 1})).unwrap();
    let choices = request.choices("cmpl-0");
    let seen: Vec<_> = choices
        .iter()
        .map(|c| (c.sequence.id.as_str(), c.sequence.prompt.len(), c.sequence.sampling.seed))
        .collect();
    assert_eq!(seen, [("cmpl-0-0", 3, 3), ("cmpl-0-1", 3, 4), ("cmpl-0-2", 1, 3), ("cmpl-0-3", 1, 4)]);
    assert_eq!(
        (request.prompt_of(1), request.prompt_of(2), request.prompt_tokens()),
        (&[5, 6, 7][..], &[8][..], 4)
    );
}

#[test]
fn a_seed_that_is_not_given_is_the_drawn_one() {
    let seed = |more: Value| chat(hello(more)).unwrap().seed();
    for none in [json!({}), json!({"seed": null}), json!({"seed": -1})] {
        assert_eq!(seed(none), DRAWN);
    }
    assert_eq!((seed(json!({"seed": 0})), seed(json!({"seed": u64::MAX - 1}))), (0, u64::MAX - 1));
    let several = chat(hello(json!({"n": 2}))).unwrap().choices("id");
    assert_eq!([0, 1].map(|at| several[at].sequence.sampling.seed), [DRAWN, DRAWN + 1]);
}

#[test]
fn completions_take_text_and_token_ids_and_sixteen_tokens_by_default() {
    let text = only(completion(json!({"prompt": "The capital of"})).unwrap());
    assert_eq!(text.sequence.prompt, model().tokenizer.encode("The capital of").unwrap());
    assert_eq!(text.sequence.max_tokens, 16);
    assert!(text.reasoning.is_none());
    assert_eq!(only(completion(json!({"prompt": [4, 5, 6]})).unwrap()).sequence.prompt, [4, 5, 6]);
    assert_eq!(only(completion(json!({"prompt": vec![4; 1020]})).unwrap()).sequence.max_tokens, 4);
}

#[test]
fn content_may_be_text_parts_and_a_developer_is_the_system() {
    let parts = json!({"model": "tiny-r1", "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "46 + 37?"}]},
        {"role": "assistant", "content": null},
        {"role": "user", "content": "Well?", "name": "me"}]});
    let tokens = only(chat(parts).unwrap()).sequence.prompt;
    let text = "<｜begin▁of▁sentence｜>Be brief.<｜User｜>What is\n46 + 37?<｜Assistant｜><｜end▁of▁sentence｜><｜User｜>Well?<｜Assistant｜><think>\n";
    assert_eq!(tokens, model().tokenizer.encode(text).unwrap());
}

#[test]
fn a_part_without_text_is_named() {
    let parts = json!({"model": "tiny-r1", "messages": [{"role": "user", "content": [{"type": "text"}]}]});
    let expected = ApiError::invalid("messages[0].content[0].text", "messages[0].content[0].text: missing");
    assert_eq!(chat(parts).unwrap_err(), expected);
}

#[test]
fn a_bad_field_is_named() {
    for (param, value) in [
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!("many")),
        ("temperature", json!(-0.1)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("min_p", json!(2)),
        ("top_k", json!(-2)),
        ("seed", json!(1.5)),
        ("n", json!(0)),
        ("n", json!(129)),
        ("stop", json!([""])),
        ("stop", json!({"a": 1})),
        ("stop_token_ids", json!([1536])),
        ("min_tokens", json!(2000)),
        ("repetition_penalty", json!(0)),
        ("presence_penalty", json!(2.1)),
        ("frequency_penalty", json!(-3)),
        ("frequency_penalty", json!("often")),
        ("logit_bias", json!({"1536": 1})),
        ("logit_bias", json!({"one": 1})),
        ("logit_bias", json!({"1": 101})),
        (
            "logit_bias",
            json!((0..301).map(|id| (id.to_string(), json!(1))).collect::<serde_json::Map<_, _>>()),
        ),
        ("logit_bias", json!([1])),
        ("logprobs", json!(2)),
        ("top_logprobs", json!(2)),
        ("top_logprobs", json!(21)),
        ("top_logprobs", json!(-1)),
        ("chat_template_kwargs", json!({"messages": []})),
        ("chat_template_kwargs", json!(true)),
        ("stream", json!("yes")),
        ("stream_options", json!({"include_usage": true})),
        ("messages", json!([])),
        ("messages", json!(null)),
        ("messages[0].role", json!([{"role": "tool", "content": "x"}])),
        ("messages[0].role", json!([{"content": "x"}])),
        ("messages[0].content", json!([{"role": "user"}])),
        ("messages[0].content", json!([{"role": "user", "content": 5}])),
        ("messages[0].content[0].type", json!([{"role": "user", "content": [{"type": "image_url"}]}])),
        ("tools", json!([{"type": "function"}])),
    ] {
        let field = param.split('[').next().unwrap();
        let (named, message) = refusal(chat(hello(json!({field: value}))));
        let expected = if value == json!([{"content": "x"}]) { "messages[0]" } else { param };
        assert_eq!(named, expected, "{message}");
        assert!(message.starts_with(expected), "{message}");
    }
    for prompt in [json!(""), json!([]), json!([1536]), json!(null), json!({"a": 1})] {
        assert_eq!(refusal(completion(json!({"prompt": prompt}))).0, "prompt");
    }
}

#[test]
fn a_chat_asks_for_logprobs_in_two_fields_and_a_completion_in_one() {
    let chats = |more| only(chat(hello(more)).unwrap()).sequence.logprobs;
    assert_eq!(chats(json!({"logprobs": true})), Some(0));
    assert_eq!(chats(json!({"logprobs": false, "top_logprobs": 0})), None);
    assert_eq!(refusal(chat(hello(json!({"logprobs": true, "top_logprobs": 21})))).0, "top_logprobs");
    let completions = |logprobs| completion(json!({"prompt": [4], "logprobs": logprobs}));
    assert_eq!(only(completions(json!(5)).unwrap()).sequence.logprobs, Some(5));
    assert_eq!(only(completions(json!(null)).unwrap()).sequence.logprobs, None);
    assert_eq!(refusal(completions(json!(21))).0, "logprobs");
    assert_eq!(refusal(completions(json!(true))).0, "logprobs");
}

#[test]
fn a_missing_or_other_model_is_told_apart() {
    assert_eq!(refusal(chat(json!({"messages": []}))), ("model".to_string(), "model: missing".to_string()));
    let error = chat(json!({"model": "gpt-5", "messages": []})).unwrap_err();
    assert_eq!((error.status().as_u16(), error), (404, ApiError::ModelNotFound("gpt-5".to_string())));
}

#[test]
fn what_does_not_fit_the_context_is_counted() {
    let error = chat(hello(json!({"max_tokens": 1010}))).unwrap_err();
    let expected = "this model's maximum context length is 1024 tokens, but 1025 were requested: 15 in the messages and 1010 to generate";
    assert_eq!(
        (error.body()["error"]["code"].as_str(), error.to_string().as_str()),
        (Some("context_length_exceeded"), expected)
    );
    assert!(chat(hello(json!({"max_tokens": 1009}))).is_ok());
    assert!(matches!(
        completion(json!({"prompt": vec![4; 1024]})),
        Err(ApiError::ContextLength { param: "prompt", .. })
    ));
    let huge = completion(json!({"prompt": [4], "max_tokens": u32::MAX}));
    assert!(matches!(huge, Err(ApiError::ContextLength { .. })));
}

#[test]
fn a_text_that_cannot_fit_is_not_tokenized_and_the_longest_that_can_is() {
    let refused = |text: String| completion(json!({"prompt": text})).err().map(|error| error.to_string());
    assert_eq!(refused("<｜begin▁of▁sentence｜>".repeat(1000)), None);
    let problem = refused("a".repeat(1 << 20)).unwrap();
    assert!(problem.ends_with("which cannot hold the 1048576 bytes in the prompt"), "{problem}");
}

#[test]
fn what_is_not_json_is_refused_as_such() {
    for body in ["", "{", "[]", "\"model\"", "{\"model\": \"tiny-r1\", \"messages\": [}"] {
        assert!(
            matches!(ValidRequest::chat(&model(), body.as_bytes(), DRAWN), Err(ApiError::Malformed(_))),
            "{body}"
        );
    }
    let deep = format!("{{\"model\": \"tiny-r1\", \"messages\": {}{}}}", "[".repeat(5000), "]".repeat(5000));
    assert!(matches!(ValidRequest::chat(&model(), deep.as_bytes(), DRAWN), Err(ApiError::Malformed(_))));
}
