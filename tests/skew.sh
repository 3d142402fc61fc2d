#!/usr/bin/env bash
# skew.sh: builds the programs of the last release, once, and runs the tests that need them. tests/last-release names its commit.
set -euo pipefail
cd "$(dirname "$0")/.."
COMMIT=$(git rev-parse --verify --quiet "$(cat tests/last-release)^{commit}") || {
  echo "skew: commit $(cat tests/last-release) is not in this clone: fetch all of its history" >&2
  exit 1
}
LAST=target/skew/$COMMIT

if ! [ -e "$LAST/expertmesh-worker" ]; then
  echo "skew: building the last release, $COMMIT; once, minutes" >&2
  mkdir -p target/skew/source "$LAST"
  find target/skew/source -mindepth 1 -delete
  git archive "$COMMIT" | tar xm -C target/skew/source # m: what cargo built of another release is older
  (cd target/skew/source && cargo build --release --locked -p expertmesh-operator -p expertmesh-worker --target-dir ../target)
  cp target/skew/target/release/expertmesh "$LAST"
  cp target/skew/target/release/expertmesh-worker "$LAST/partial" && mv "$LAST/partial" "$LAST/expertmesh-worker"
fi
EXPERTMESH_LAST="$PWD/$LAST" cargo test --release --workspace --test all -- skew:: --nocapture
