//! Configurations that ask for what the engine lacks give errors that name the key and the value.

use std::fs;

use expertmesh_model::config::model::ModelConfig;

use super::model;

#[test]
fn what_a_config_asks_for_and_the_engine_lacks_is_named_with_its_value() {
    let json = fs::read_to_string(model("golden/v3-yarn").join("config.json")).unwrap();
    let error = |from: &str, to: &str| {
        assert!(json.contains(from), "{from}");
        let error = ModelConfig::parse(&json.replacen(from, to, 1)).expect_err(to);
        format!("{}: {error}", error.reason())
    };
    let cases = [
        (
            "DeepseekV3ForCausalLM",
            "FooForCausalLM",
            "UnsupportedArchitecture: config.json: architectures: FooForCausalLM is not supported; supported: DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, Qwen3MoeForCausalLM, MixtralForCausalLM, OlmoeForCausalLM",
        ),
        (
            "\"model_type\": \"deepseek_v3\"",
            "\"model_type\": \"foo\"",
            "InvalidConfig: config.json: model_type: foo is not supported; expected: deepseek_v3 or kimi_k2",
        ),
        (
            "\"hidden_size\": 64",
            "\"hidden_size\": 0",
            "InvalidConfig: config.json: hidden_size: 0 is not supported; expected: a positive integer",
        ),
        (
            "\"hidden_size\": 64",
            "\"hidden_size\": -1",
            "InvalidConfig: config.json: hidden_size: -1 is not supported; expected: an integer",
        ),
        ("\"hidden_size\": 64,", "", "InvalidConfig: config.json: hidden_size: missing"),
        (
            "\"n_group\": 4",
            "\"n_group\": 5",
            "InvalidConfig: config.json: n_group: 5 is not supported; expected: a divisor of n_routed_experts",
        ),
        (
            "\"num_experts_per_tok\": 4",
            "\"num_experts_per_tok\": 9",
            "InvalidConfig: config.json: num_experts_per_tok: 9 is not supported; expected: at most the experts of topk_group groups",
        ),
        (
            "\"scoring_func\": \"sigmoid\"",
            "\"scoring_func\": \"softmax\"",
            "InvalidConfig: config.json: scoring_func: softmax is not supported; expected: sigmoid",
        ),
        (
            "\"rope_interleave\": true",
            "\"rope_interleave\": false",
            "InvalidConfig: config.json: rope_interleave: false is not supported; expected: true",
        ),
        (
            "\"type\": \"yarn\"",
            "\"type\": \"linear\"",
            "InvalidConfig: config.json: type: linear is not supported; expected: yarn or default",
        ),
        (
            "\"vocab_size\"",
            "\"quantization_config\": {\"quant_method\": \"fp8\"}, \"vocab_size\"",
            "InvalidConfig: config.json: weight_block_size: missing",
        ),
        (
            "\"eos_token_id\": 1",
            "\"eos_token_id\": [1, \"end\"]",
            "InvalidConfig: config.json: eos_token_id: [1,\"end\"] is not supported; expected: a token id or a list of them",
        ),
        (
            "\"num_key_value_heads\": 4",
            "\"num_key_value_heads\": 2",
            "InvalidConfig: config.json: num_key_value_heads: 2 is not supported; expected: 4",
        ),
    ];
    for (from, to, expected) in cases {
        assert_eq!(error(from, to), expected);
    }
    assert!(ModelConfig::parse("[]").unwrap_err().to_string().starts_with("config.json: "));
}

#[test]
fn what_the_other_families_ask_for_and_the_engine_lacks_is_named_with_its_value() {
    let cases = [
        (
            "v2",
            "\"norm_topk_prob\": false",
            "\"norm_topk_prob\": true",
            "norm_topk_prob: true is not supported; expected: false",
        ),
        (
            "v2",
            "group_limited_greedy",
            "noaux_tc",
            "topk_method: noaux_tc is not supported; expected: greedy or group_limited_greedy",
        ),
        (
            "v2",
            "\"scoring_func\": \"softmax\"",
            "\"scoring_func\": \"sigmoid\"",
            "scoring_func: sigmoid is not supported; expected: softmax",
        ),
        (
            "v2",
            "\"vocab_size\"",
            "\"moe_layer_freq\": 2, \"vocab_size\"",
            "moe_layer_freq: 2 is not supported; expected: 1",
        ),
        ("v2", "\"factor\": 40.0", "\"factor\": 0.5", "factor: 0.5 is not supported; expected: at least 1"),
        (
            "v2",
            "\"rope_theta\": 10000.0",
            "\"rope_theta\": 1",
            "rope_theta: 1 is not supported; expected: a number above 1",
        ),
        (
            "v3",
            "deepseek_v3",
            "deepseek_v32",
            "model_type: deepseek_v32 is not supported; expected: deepseek_v3 or kimi_k2",
        ),
        (
            "v3",
            "\"num_hidden_layers\": 3",
            "\"num_hidden_layers\": 3000",
            "num_hidden_layers: 3000 is not supported; expected: at most 1024",
        ),
        (
            "v3",
            "\"torch_dtype\": \"bfloat16\"",
            "\"torch_dtype\": \"int8\"",
            "torch_dtype: int8 is not supported; expected: bfloat16 or float16 or float32",
        ),
        (
            "v3-fp8",
            "\"quant_method\": \"fp8\"",
            "\"quant_method\": \"awq\"",
            "quant_method: awq is not supported; expected: fp8",
        ),
        ("v3-fp8", "\"fmt\": \"e4m3\"", "\"fmt\": \"e5m2\"", "fmt: e5m2 is not supported; expected: e4m3"),
        ("v3-fp8", "dynamic", "static", "activation_scheme: static is not supported; expected: dynamic"),
        (
            "v3-fp8",
            "      128,\n",
            "      64,\n",
            "weight_block_size: [64,128] is not supported; expected: [128,128]",
        ),
        (
            "v3-fp8",
            "\"fmt\"",
            "\"scale_fmt\": \"fp16\", \"fmt\"",
            "scale_fmt: fp16 is not supported; expected: ue8m0",
        ),
        (
            "qwen3-moe",
            "\"num_key_value_heads\": 2",
            "\"num_key_value_heads\": 3",
            "num_key_value_heads: 3 is not supported; expected: a divisor of num_attention_heads",
        ),
        (
            "qwen3-moe",
            "\"head_dim\": 24",
            "\"head_dim\": 25",
            "head_dim: 25 is not supported; expected: even",
        ),
        (
            "qwen3-moe",
            "\"head_dim\"",
            "\"use_sliding_window\": true, \"head_dim\"",
            "use_sliding_window: true is not supported; expected: false",
        ),
        (
            "qwen3-moe",
            "\"num_experts_per_tok\": 4",
            "\"num_experts_per_tok\": 17",
            "num_experts_per_tok: 17 is not supported; expected: at most num_experts",
        ),
        (
            "qwen3-moe",
            "    0\n",
            "    \"first\"\n",
            "mlp_only_layers: [\"first\"] is not supported; expected: a list of integers",
        ),
        (
            "mixtral",
            "\"sliding_window\": null",
            "\"sliding_window\": 4096",
            "sliding_window: 4096 is not supported; expected: null",
        ),
        ("mixtral", "\"num_local_experts\": 8,", "", "num_experts: missing"),
        (
            "olmoe",
            "\"vocab_size\"",
            "\"clip_qkv\": 8.0, \"vocab_size\"",
            "clip_qkv: 8.0 is not supported; expected: null",
        ),
        (
            "olmoe",
            "\"hidden_size\": 64",
            "\"hidden_size\": 60",
            "hidden_size: 60 is not supported; expected: an even multiple of num_attention_heads",
        ),
        (
            "olmoe",
            "\"num_experts\": 16",
            "\"num_experts\": 100000",
            "100000 experts with heads of 16 are not supported; at most 65536 with at most 65536 are",
        ),
        (
            "mixtral",
            "\"hidden_size\": 64,\n  \"intermediate_size\": 48",
            "\"head_dim\": 64, \"hidden_size\": 100000000, \"intermediate_size\": 100000000",
            "720000284000000000 parameters are not supported; at most 2^50 are",
        ),
    ];
    for (golden, from, to, expected) in cases {
        let json = fs::read_to_string(model("golden").join(golden).join("config.json")).unwrap();
        assert!(json.contains(from), "{golden}: {from}");
        let error = ModelConfig::parse(&json.replacen(from, to, 1)).expect_err(to);
        assert_eq!(error.to_string(), format!("config.json: {expected}"));
        assert_eq!(error.reason(), "InvalidConfig");
    }
}

#[test]
fn both_spellings_of_yarn_are_one_model() {
    let json = fs::read_to_string(model("golden/v3-yarn").join("config.json")).unwrap();
    let config = ModelConfig::parse(&json).unwrap();
    let renamed = json.replace("\"type\": \"yarn\"", "\"rope_type\": \"yarn\"");
    assert_eq!(ModelConfig::parse(&renamed).unwrap(), config);
    let nested = renamed
        .replace("\"rope_scaling\": {", "\"rope_parameters\": { \"rope_theta\": 10000.0,")
        .replacen("\"rope_theta\": 10000.0,\n  \"arch", "\n  \"arch", 1);
    assert!(nested.matches("rope_theta").count() == 1);
    assert_eq!(ModelConfig::parse(&nested).unwrap(), config);
    let unnamed = json.replacen("\"DeepseekV3ForCausalLM\"", "", 1);
    let unnamed = unnamed.replacen("deepseek_v3", "foo", 1);
    assert_eq!(
        ModelConfig::parse(&unnamed).unwrap_err().to_string(),
        "config.json: model_type: foo is not supported; supported: deepseek_v2, deepseek_v3, kimi_k2, qwen3_moe, mixtral, olmoe"
    );
}
