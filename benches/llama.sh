#!/usr/bin/env bash
# llama.sh: builds llama.cpp's benches with this machine's native flags, in target/bench/llama. The source is what PyPI's
# llama-cpp-python carries, at the version below. Nothing is done where that version is there already.
set -euo pipefail
cd "$(dirname "$0")/.."
VERSION=0.3.36
SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
LLAMA=target/bench/llama
LOG=$LLAMA/build.log

main() {
  local version="llama.cpp of llama-cpp-python $VERSION"
  [ "$(cat $LLAMA/VERSION 2>/dev/null)" != "$version" ] || [ benches/logits.cpp -nt $LLAMA/VERSION ] || return 0
  require cmake c++ python3
  mkdir -p $LLAMA
  echo "llama.sh: building $version takes minutes; its log is $LOG" >&2
  { fetch && build; } >$LOG 2>&1 || { tail -n 20 $LOG >&2 && exit 1; }
  echo "$version" >$LLAMA/VERSION
}

require() {
  local tool
  for tool in "$@"; do command -v "$tool" >/dev/null || { echo "llama.sh: $tool is missing" >&2 && exit 1; }; done
}

fetch() {
  local archive=llama_cpp_python-$VERSION.tar.gz
  [ ! -e $LLAMA/source-$VERSION ] || return 0
  # A source package's metadata come from its build system, which pip fetches too.
  [ -e $LLAMA/$archive ] || python3 -m pip download --no-deps --no-binary :all: --dest $LLAMA llama-cpp-python==$VERSION
  echo "$SHA256  $LLAMA/$archive" | sha256sum --check
  rm -rf $LLAMA/source.partial && mkdir $LLAMA/source.partial
  tar --extract --gzip --file $LLAMA/$archive --directory $LLAMA/source.partial --strip-components 3 \
    "llama_cpp_python-$VERSION/vendor/llama.cpp"
  mv $LLAMA/source.partial $LLAMA/source-$VERSION
}

build() {
  local without=("-DLLAMA_BUILD_"{TESTS,EXAMPLES,SERVER,APP,UI}"=OFF" "-DLLAMA_OPENSSL=OFF") source=$LLAMA/source-$VERSION
  cmake -S $source -B $LLAMA/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON "${without[@]}"
  nice cmake --build $LLAMA/build --parallel "$(nproc)" --target llama-bench llama-batched-bench llama-quantize
  # shellcheck disable=SC2016 # the loader replaces it
  c++ -O2 -I $source/include -I $source/ggml/include -o $LLAMA/build/bin/logits benches/logits.cpp \
    -L $LLAMA/build/bin -lllama -Wl,-rpath,'$ORIGIN' -Wl,-rpath-link,$LLAMA/build/bin
}

main
