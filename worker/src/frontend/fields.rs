//! The fields of a request, whoever's dialect it is written in: which are honoured, which are refused by name, and which
//! change nothing. A body is read once, and only fields that are honoured are kept of it.

mod capture;
pub(super) mod read;
mod words;

use serde_json::Value;

use self::Fate::{Harmless, Honoured, Refused};

/// An endpoint that takes a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum On {
    Chat,
    Completions,
}

/// What becomes of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// The answer is as it says.
    Honoured,
    /// It would change the answer, and is refused by name but for `null` and these values in JSON, which change nothing.
    Refused(&'static [&'static str]),
    /// It changes no answer, and is ignored.
    Harmless,
}

/// Has no value that changes nothing.
const NEVER: Fate = Refused(&[]);
const FALSE: Fate = Refused(&["false"]);
const TRUE: Fate = Refused(&["true"]);
const ZERO: Fate = Refused(&["0"]);
const ONE: Fate = Refused(&["1"]);
const EMPTY: Fate = Refused(&["[]", "{}", "\"\""]);
const UNFORCED: Fate = Refused(&["\"none\"", "\"auto\""]);

/// Names of fields, and what becomes of them in a chat and in a completion. docs/api.md says the same to users. A field
/// that is not here is ignored, as clients expect.
#[rustfmt::skip]
const FIELDS: &[(&[&str], Fate, Fate)] = &[
    // OpenAI's, and those that vLLM added.
    (&["model", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options", "stop", "seed"], Honoured, Honoured),
    (&["temperature", "top_p", "top_k", "min_p"], Honoured, Honoured),
    (&["presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"], Honoured, Honoured),
    (&["logprobs", "min_tokens", "ignore_eos", "stop_token_ids", "return_token_ids"], Honoured, Honoured),
    (&["messages", "top_logprobs", "add_generation_prompt", "chat_template_kwargs", "reasoning_effort"], Honoured, NEVER),
    (&["include_reasoning", "separate_reasoning", "stop_in_reasoning"], Honoured, Harmless),
    (&["prompt"], NEVER, Honoured),
    (&["add_special_tokens"], FALSE, Honoured),
    // Not built yet: tools, a grammar, beams.
    (&["tools", "functions"], EMPTY, EMPTY),
    (&["tool_choice", "function_call"], UNFORCED, UNFORCED),
    (&["response_format"], Refused(&["{\"type\":\"text\"}"]), Refused(&["{\"type\":\"text\"}"])),
    (&["structured_outputs", "structural_tag", "guided_json", "guided_regex", "guided_choice", "guided_grammar"], EMPTY, EMPTY),
    (&["grammar", "regex", "ebnf", "json_schema", "format", "guideline", "stop_regex"], EMPTY, EMPTY),
    (&["best_of", "num_beams", "length_penalty"], ONE, ONE),
    (&["use_beam_search", "early_stopping"], FALSE, FALSE),
    // Samplers and penalties of others.
    (&["typical_p", "typical", "tfs_z", "tfs", "repeat_penalty", "encoder_repetition_penalty", "guidance_scale"], ONE, ONE),
    (&["mirostat", "mirostat_mode", "xtc_probability", "dry_multiplier", "dynatemp_range", "smoothing_factor"], ZERO, ZERO),
    (&["top_a", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "penalty_alpha", "diversity_penalty"], ZERO, ZERO),
    (&["repeat_last_n", "top_n_sigma", "nsigma"], Refused(&["-1"]), Refused(&["-1"])),
    (&["dynamic_temperature", "temperature_last", "watermark", "token_healing", "ban_eos_token"], FALSE, FALSE),
    (&["do_sample"], TRUE, TRUE),
    (&["samplers", "sampler_priority", "logits_processors", "custom_logit_processor", "custom_params"], EMPTY, EMPTY),
    (&["bad_words", "banned_tokens", "custom_token_bans", "sequence_bias", "suppress_tokens", "negative_prompt"], EMPTY, EMPTY),
    (&["allowed_token_ids", "logprob_token_ids", "token_ids_logprob", "vllm_xargs"], EMPTY, EMPTY),
    (&["random_seed", "sampling_params", "parameters", "options"], EMPTY, EMPTY),
    // Other names for how long an answer is and where it ends.
    (&["min_new_tokens", "min_length"], ZERO, ZERO),
    (&["max_new_tokens", "max_length", "n_predict", "num_predict", "max_thinking_tokens"], NEVER, NEVER),
    (&["stop_sequences"], EMPTY, EMPTY),
    (&["thinking_token_budget", "thinking_budget", "t_max_predict_ms", "num_ctx", "n_keep", "n_discard"], NEVER, NEVER),
    (&["include_stop_str_in_output", "no_stop_trim"], FALSE, FALSE),
    (&["skip_special_tokens", "stream_reasoning"], TRUE, TRUE),
    // Other prompts.
    (&["echo", "continue_final_message", "raw", "return_full_text", "safe_prompt"], FALSE, FALSE),
    (&["suffix", "system", "template", "chat_template", "prompt_template", "input_prefix", "input_suffix"], EMPTY, EMPTY),
    (&["documents", "images", "image_data", "multimodal_data", "context", "input", "inputs", "instructions"], EMPTY, EMPTY),
    (&["input_ids", "input_embeds", "prompt_embeds", "truncate", "truncate_prompt_tokens", "prompt_truncate_len"], NEVER, NEVER),
    (&["session_params", "lora", "lora_path", "lora_adapter", "adapter_id", "context_length_exceeded_behavior"], EMPTY, EMPTY),
    // Other thoughts, other voices.
    (&["thinking", "think", "reasoning", "enable_thinking", "prompt_mode", "thinking_forced_open"], NEVER, NEVER),
    (&["reasoning_format"], Refused(&["\"auto\"", "\"deepseek\""]), Refused(&["\"auto\"", "\"none\""])),
    (&["verbosity"], Refused(&["\"medium\""]), Refused(&["\"medium\""])),
    (&["modalities"], Refused(&["[\"text\"]"]), Refused(&["[\"text\"]"])),
    (&["audio", "prediction", "web_search_options"], NEVER, NEVER),
    // Something more in the answer.
    (&["prompt_logprobs", "n_probs", "top_n_tokens", "top_logprobs_num"], ZERO, ZERO),
    (&["return_tokens_as_token_ids", "return_tokens", "return_logprob", "post_sampling_probs", "decoder_input_details"], FALSE, FALSE),
    (&["return_hidden_states", "return_routed_experts", "return_progress", "return_prompt_text", "details"], FALSE, FALSE),
    (&["response_fields"], EMPTY, EMPTY),
    // Nothing of the tokens.
    (&["user", "safety_identifier", "metadata", "store", "service_tier", "parallel_tool_calls", "parse_tool_calls"], Harmless, Harmless),
    (&["prompt_cache_key", "prompt_cache_retention", "cache_prompt", "cache_salt", "keep_alive", "id_slot"], Harmless, Harmless),
    (&["priority", "request_id", "rid", "timings_per_token", "kv_transfer_params", "data_parallel_rank"], Harmless, Harmless),
    (&["spaces_between_special_tokens", "guided_decoding_backend", "guided_whitespace_pattern"], Harmless, Harmless),
    // Without their main field they do nothing.
    (&["mirostat_tau", "mirostat_eta", "xtc_threshold", "dynatemp_exponent", "smoothing_curve"], Harmless, Harmless),
    (&["dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"], Harmless, Harmless),
];

/// What becomes of a field of this name, and the name as the table has it; `None` where the table has not.
fn fate(name: &str, on: On) -> Option<(&'static str, Fate)> {
    FIELDS.iter().find_map(|&(names, chat, completions)| {
        let name = names.iter().find(|known| **known == name)?;
        let fate = match on {
            On::Chat => chat,
            On::Completions => completions,
        };
        Some((*name, fate))
    })
}

/// Whether two values mean the same: 1 and 1.0 do.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        _ => a == b,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    /// Every field of a fate, with the endpoint where it has it.
    pub(in crate::frontend) fn every(of: impl Fn(Fate) -> bool) -> Vec<(&'static str, On)> {
        let fates = FIELDS.iter().flat_map(|&(names, chat, completions)| {
            names.iter().flat_map(move |&name| [(name, On::Chat, chat), (name, On::Completions, completions)])
        });
        fates.filter(|&(_, _, fate)| of(fate)).map(|(name, on, _)| (name, on)).collect()
    }

    #[test]
    fn a_field_is_in_the_table_once() {
        let names: Vec<_> = FIELDS.iter().flat_map(|(names, ..)| *names).collect();
        let different: BTreeSet<_> = names.iter().collect();
        assert_eq!(names.len(), different.len());
    }

    /// The page's table, a line for each group of fields that fare alike.
    fn page() -> String {
        let words = |fate: Fate| match fate {
            Honoured => "honoured".to_string(),
            Harmless => "ignored".to_string(),
            Refused([]) => "refused".to_string(),
            Refused(values) => format!("refused, but for `{}`", values.join("`, `")),
        };
        let line = |&(names, chat, completions): &(&[&str], Fate, Fate)| {
            format!("| `{}` | {} | {} |\n", names.join("`, `"), words(chat), words(completions))
        };
        let head = "| fields | in a chat | in a completion |\n|---|---|---|\n";
        FIELDS.iter().fold(head.to_string(), |page, group| page + &line(group))
    }

    #[test]
    fn the_page_of_the_api_has_the_table_of_fields() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/api.md");
        let text = std::fs::read_to_string(file).unwrap();
        let page = page();
        assert!(text.contains(&page), "docs/api.md must have this table:\n{page}");
    }
}
