#!/usr/bin/env bash
# orphans.sh: every .rs file must be part of something that was compiled; one that no `mod` line names is never run, tests included.
# Reads the dependency files that cargo wrote beside what it built, so everything must have been built before.
set -euo pipefail
cd "$(dirname "$0")/.."
compiled=$(find target/release -name '*.d' -not -path '*/incremental/*' -exec cat {} + | tr -s ' :' '\n' | sed "s|^$PWD/||" | grep '\.rs$' | sort -u)
orphans=$(git ls-files --cached --others --exclude-standard '*.rs' ':!fuzz' | while read -r file; do [ ! -e "$file" ] || echo "$file"; done | sort -u |
  comm -23 - <(echo "$compiled"))
# shellcheck disable=SC2086 # words
[ -z "$orphans" ] || { printf 'no target includes %s\n' $orphans >&2 && exit 1; }
