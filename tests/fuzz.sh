#!/usr/bin/env bash
# fuzz.sh [SECONDS]: every target of fuzz/ for so long (a minute), from inputs that are well formed. A find is an input under
# fuzz/artifacts. Needs a nightly compiler, and installs cargo-fuzz under target/tools where the machine has none.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
cargo +nightly --version >/dev/null 2>&1 || { echo 'fuzz.sh: a nightly compiler is missing: rustup toolchain install nightly' >&2 && exit 1; }
PATH=$PWD/target/tools/bin:$PATH
command -v cargo-fuzz >/dev/null || cargo install --locked --root target/tools cargo-fuzz

seed() { # TARGET NAME: what comes in is an input
  mkdir -p "fuzz/corpus/$1" && cat >"fuzz/corpus/$1/$2"
}
for golden in v3-fp8 v2 qwen3-moe mixtral olmoe; do
  { cat "tests/golden/$golden/config.json" && printf '\0' && cat "tests/golden/$golden/model.safetensors"; } | seed checkpoint "$golden"
done
{ cat tests/models/tiny-r1/tokenizer.json && printf '\0naïve 🦀 <think>'; } | seed vocabulary tiny-r1
{ printf 'ranks\n' && cat tests/golden/tiktoken/tiktoken.model && printf '\0Hello, 世界 123'; } | seed vocabulary ranks
for template in tests/golden/templates/*.jinja; do
  { cat "$template" && printf '\0hi<｜User｜></think>x'; } | seed template "$(basename "$template")"
done
echo '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "stop": ["x"], "logit_bias": {"5": 1}, "n": 2}' | seed request chat
echo '{"prompt": [[1, 2], [3]], "max_tokens": 3, "logprobs": 2, "seed": -1, "stream": true, "stream_options": {"include_usage": true}}' | seed request completion
echo '{"epoch": 3, "workers": [{"slot": 0, "name": "a", "addresses": ["[::1]:7070"], "experts": {"1": "0-7", "2": "0-3,8"}}]}' | seed placement json
seed manifest sample <deploy/samples/tiny-r1.yaml
seed manifest alias <<'YAML'
apiVersion: expertmesh.dev/v1alpha1
kind: ModelDeployment
metadata: {name: m, labels: &labels {a: b}}
spec: {model: {uri: "file:///m/", weights: int8}, workers: {replicas: 0x2, podLabels: *labels}, serving: {drainTimeout: 1m30s}}
YAML
# A GenerateRequest's fields 3 to 9: three tokens, of which two are the prompt, and how the next is drawn.
printf '\x1a\x03\x01\x02\x03\x20\x08\x28\x01\x32\x01\x05\x3a\x1c\x0d\x00\x00\x80\x3f\x15\x66\x66\x66\x3f\x18\x14\x28\x07\x35\xcd\xcc\x8c\x3f\x4a\x07\x08\x03\x15\x00\x00\x00\x40\x40\x02\x48\x03' | seed generate drawn
for target in $(cargo +nightly fuzz list); do
  echo "== $target"
  cargo +nightly fuzz run "$target" -- -max_total_time="$seconds" -max_len=2000000 -timeout=20 -print_final_stats=0
done
