//! The configurations of published models, without the keys that say nothing of what is computed.

use super::model::ModelConfig;
use super::parts::{Architecture, AttentionConfig, GroupedConfig, LatentConfig};

const DEEPSEEK_V2: &str = r#"{"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400,
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3,
    "topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": false,
    "routed_scaling_factor": 16.0, "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707,
    "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096}, "hidden_act": "silu", "attention_bias": false,
    "bos_token_id": 100000, "eos_token_id": 100001, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;

const DEEPSEEK_V3: &str = r#"{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "first_k_dense_replace": 3, "moe_layer_freq": 1, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": true, "routed_scaling_factor": 2.5,
    "max_position_embeddings": 163840, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}, "quantization_config": {"quant_method": "fp8",
    "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
    "hidden_act": "silu", "attention_bias": false, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16"}"#;

const QWEN3: &str = r#"{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936,
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960,
    "max_window_layers": 48, "sliding_window": null, "use_sliding_window": false, "rms_norm_eps": 1e-06,
    "rope_scaling": null, "rope_theta": 1000000.0, "hidden_act": "silu", "attention_bias": false,
    "bos_token_id": 151643, "eos_token_id": 151645, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;

const MIXTRAL: &str = r#"{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768,
    "sliding_window": null, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "hidden_act": "silu", "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;

const OLMOE: &str = r#"{"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 50304,
    "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": false,
    "clip_qkv": null, "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_scaling": null,
    "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": false, "eos_token_id": 50279,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;

fn replaced(json: &str, changes: &[(&str, &str)]) -> ModelConfig {
    let json = changes.iter().fold(json.to_owned(), |json, (from, to)| {
        assert!(json.contains(from), "{from}");
        json.replacen(from, to, 1)
    });
    ModelConfig::parse(&json).unwrap()
}

/// Kimi-K2 is a DeepSeek-V3 with other numbers.
fn kimi_k2() -> ModelConfig {
    let changes = [
        ("deepseek_v3", "kimi_k2"),
        ("129280", "163840"),
        ("\"first_k_dense_replace\": 3", "\"first_k_dense_replace\": 1"),
        ("\"num_attention_heads\": 128", "\"num_attention_heads\": 64"),
        ("\"num_key_value_heads\": 128", "\"num_key_value_heads\": 64"),
        ("\"n_routed_experts\": 256", "\"n_routed_experts\": 384"),
        ("\"n_group\": 8, \"topk_group\": 4", "\"n_group\": 1, \"topk_group\": 1"),
        ("\"routed_scaling_factor\": 2.5", "\"routed_scaling_factor\": 2.827"),
        ("\"num_nextn_predict_layers\": 1", "\"num_nextn_predict_layers\": 0"),
        ("\"rope_theta\": 10000", "\"rope_theta\": 50000.0"),
        ("\"factor\": 40, \"beta_fast\": 32", "\"factor\": 32.0, \"beta_fast\": 1.0"),
        ("\"scale_fmt\": \"ue8m0\", ", ""),
        ("\"eos_token_id\": 1", "\"eos_token_id\": 163585"),
    ];
    replaced(DEEPSEEK_V3, &changes)
}

#[test]
fn published_models_have_the_parameters_that_their_reports_state() {
    // In billions, all and active. DeepSeek and Qwen count the embeddings among the active ones, Mixtral too.
    let models = [
        (replaced(DEEPSEEK_V2, &[]), 236.0, 21.0),
        (replaced(DEEPSEEK_V3, &[]), 671.0, 37.0),
        (kimi_k2(), 1026.0, 32.0),
        (replaced(QWEN3, &[]), 30.5, 3.2),
        (replaced(MIXTRAL, &[]), 46.7, 12.9),
        (replaced(OLMOE, &[]), 6.9, 1.25),
    ];
    for (config, all, active) in models {
        let billions = |parameters: u64| parameters as f64 / 1e9;
        let found = (billions(config.parameters()), billions(config.active_parameters()));
        assert!((found.0 / all - 1.0).abs() < 0.005, "{:?}: {found:?}", config.architecture);
        assert!((found.1 / active - 1.0).abs() < 0.06, "{:?}: {found:?}", config.architecture);
    }
}

#[test]
fn kimi_k2_is_a_deepseek_v3_with_one_group() {
    let config = kimi_k2();
    assert_eq!((config.architecture, config.mtp_modules), (Architecture::DeepseekV3, 0));
    assert_eq!((config.gate.experts, config.gate.groups, config.gate.top_groups), (384, 1, 1));
    let yarn = config.rope.yarn.unwrap();
    assert_eq!((yarn.beta_fast, yarn.beta_slow, yarn.factor), (1.0, 1.0, 32.0));
}

#[test]
fn queries_without_a_latent_are_read_in_both_deepseeks() {
    for json in [DEEPSEEK_V2, DEEPSEEK_V3] {
        let config = replaced(json, &[("\"q_lora_rank\": 1536", "\"q_lora_rank\": null")]);
        assert!(matches!(config.attention, AttentionConfig::Latent(LatentConfig { query_latent: None, .. })));
    }
}

#[test]
fn greedy_choice_leaves_the_groups_out() {
    let config = replaced(DEEPSEEK_V2, &[("group_limited_greedy", "greedy")]);
    assert_eq!((config.gate.groups, config.gate.top_groups), (1, 1));
}

#[test]
fn qwen3_says_which_layers_are_dense_in_two_ways() {
    let step = [("\"decoder_sparse_step\": 1", "\"decoder_sparse_step\": 2"), ("[]", "[1, 47]")];
    let config = replaced(QWEN3, &step);
    assert_eq!(config.moe_layers().next(), Some(3));
    assert_eq!(config.moe_layers().last(), Some(45));
    assert!(!config.is_moe(4) && !config.is_moe(48));
    let error = config.placed_layers().unwrap_err().to_string();
    assert_eq!(error, "config.json: layer 4 is dense and comes after one with experts; it cannot be placed");
    assert_eq!(replaced(QWEN3, &[("[]", "[0, 1]")]).placed_layers(), Ok(2..48));
}

#[test]
fn experts_have_two_names() {
    let renamed = replaced(QWEN3, &[("num_experts\"", "num_local_experts\"")]);
    assert_eq!(renamed, replaced(QWEN3, &[]));
}

#[test]
fn a_head_is_as_wide_as_it_says_or_its_share_of_the_hidden_row() {
    let width = |config: ModelConfig| match config.attention {
        AttentionConfig::Grouped(GroupedConfig { head, .. }) => (head, config.rope.width),
        AttentionConfig::Latent(_) => unreachable!(),
    };
    assert_eq!(width(replaced(QWEN3, &[])), (128, 128));
    assert_eq!(width(replaced(QWEN3, &[("\"head_dim\": 128", "\"head_dim\": null")])), (64, 64));
    assert_eq!(width(replaced(MIXTRAL, &[])), (128, 128));
}

#[test]
fn yarn_may_give_its_attention_factor() {
    let yarn = "\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, \"attention_factor\": 1.25, \
         \"original_max_position_embeddings\": 32768}";
    let config = replaced(QWEN3, &[("\"rope_scaling\": null", yarn)]);
    assert_eq!(config.rope.yarn.unwrap().attention_factor, Some(1.25));
}

#[test]
fn what_transformers_takes_for_granted_may_be_left_out() {
    let v3 = replaced(DEEPSEEK_V3, &[]);
    for harmless in [
        &[("\"architectures\": [\"DeepseekV3ForCausalLM\"], ", "")][..],
        &[("[\"DeepseekV3ForCausalLM\"]", "null")],
        &[("[\"DeepseekV3ForCausalLM\"]", "[]")],
        &[("\"rope_theta\": 10000,", "")],
        &[("\"rms_norm_eps\": 1e-06, ", "")],
        &[("\"routed_scaling_factor\": 2.5,", "")],
        &[("\"silu\"", "\"swish\"")],
        &[("\"eos_token_id\": 1,", "\"eos_token_id\": [1.0, -1],")],
    ] {
        assert_eq!(replaced(DEEPSEEK_V3, harmless), v3, "{harmless:?}");
    }
    let positions = |json, key: &str| replaced(json, &[(key, "\"x\": 0")]).max_positions;
    assert_eq!(positions(DEEPSEEK_V3, "\"max_position_embeddings\": 163840"), 4096);
    assert_eq!(positions(MIXTRAL, "\"max_position_embeddings\": 32768"), 131_072);
    let mixtral =
        replaced(MIXTRAL, &[("\"rope_theta\": 1000000.0, ", ""), ("\"rms_norm_eps\": 1e-05, ", "")]);
    assert_eq!(mixtral, replaced(MIXTRAL, &[]), "its own defaults, not another's");
}

#[test]
fn an_object_of_positions_that_says_nothing_changes_nothing() {
    let plain = replaced(QWEN3, &[]);
    for object in ["{}", "{\"factor\": 2.0}", "{\"type\": null}", "{\"rope_type\": \"default\"}"] {
        let nothing = format!("\"rope_scaling\": {object}");
        assert_eq!(replaced(QWEN3, &[("\"rope_scaling\": null", &nothing)]), plain, "{object}");
    }
    // The older object counts where it says something; its context is the model's where it names none.
    let both =
        "\"rope_parameters\": {\"rope_theta\": 5.0}, \"rope_scaling\": {\"type\": \"yarn\", \"factor\": 2.0}";
    let rope = replaced(QWEN3, &[("\"rope_scaling\": null", both)]).rope;
    assert_eq!((rope.theta, rope.yarn.unwrap().original_positions), (1e6, 40960.0));
    let newer = "\"rope_parameters\": {\"rope_theta\": 5.0}, \"rope_scaling\": {}";
    assert_eq!(replaced(QWEN3, &[("\"rope_scaling\": null", newer)]).rope.theta, 5.0);
}
