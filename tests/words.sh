#!/usr/bin/env bash
# words.sh: doc comments that say too little. Counts those of four words or fewer, the lines of an item taken together, and prints each with
# its place; fails where they are 3 % or more of all. What only tests compile is left out.
set -euo pipefail
cd "$(dirname "$0")/.."
git ls-files --cached --others --exclude-standard '*.rs' ':!fuzz' ':!tests' ':!*/tests/*' ':!*/tests.rs' | while read -r file; do [ ! -e "$file" ] || echo "$file"; done |
  sort -u | xargs awk '
  function end() {
    if (text == "") return
    all++
    if (split(text, words, " ") <= 4) { few++; print place ": " text }
    text = ""
  }
  FNR == 1 { end(); tests = 0; before = "" }
  before ~ /^#\[cfg\((all\()?test/ && /^(pub(\(.*\))? )?mod .* \{$/ { tests = 1 } # until the file ends
  { before = $0 }
  tests { next }
  /^ *\/\/[\/!]/ {
    line = $0
    sub(/^ *\/\/[\/!] ?/, "", line)
    if (text == "") place = FILENAME ":" FNR
    text = text " " line
    next
  }
  { end() }
  END {
    end()
    printf "%d of %d doc comments have four words or fewer: %.1f %%; less than 3 %% may\n", few, all, 100 * few / all
    exit 100 * few >= 3 * all
  }'
