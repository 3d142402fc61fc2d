#!/usr/bin/env bash
# image.sh: the image for development and tests, expertmesh.dev/expertmesh:dev, as the archive target/image/expertmesh.tar.
# Its base is made of Debian's packages, so that no registry of images is needed. Nothing changed: nothing is done.
set -euo pipefail
cd "$(dirname "$0")/.."
IMAGE=expertmesh.dev/expertmesh:dev
OUT=target/image
ARCHIVE=$OUT/expertmesh.tar
BASE=localhost/expertmesh-base
BINARIES="target/release/expertmesh target/release/expertmesh-traffic target/release/expertmesh-worker"
PACKAGES="libc6 libgcc-s1 ca-certificates"
buildah() { tests/cluster/buildah.sh "$@"; }

main() {
  local inputs
  mkdir -p $OUT
  inputs=$(hash_inputs)
  if [ -e $ARCHIVE ] && [ "$(cat $OUT/inputs 2>/dev/null)" = "$inputs" ]; then
    echo "$IMAGE is up to date"
    return
  fi
  echo "building $IMAGE" >&2
  rm -f $OUT/inputs
  buildah inspect --type image $BASE >/dev/null 2>&1 || make_base
  buildah build --quiet --layers --file deploy/Dockerfile --build-arg BASE=$BASE --build-arg VARIANT=development \
    --tag $IMAGE --iidfile $OUT/id . >/dev/null
  rm -f $ARCHIVE # buildah adds to an archive, but does not replace it
  buildah push --quiet $IMAGE docker-archive:$ARCHIVE:$IMAGE
  buildah rmi --prune --force >/dev/null 2>&1 || true # what the last build left without a name
  echo "$inputs" >$OUT/inputs
  echo "$IMAGE is $(du -h $ARCHIVE | cut -f1)"
}

hash_inputs() {
  for binary in $BINARIES; do
    [ -x "$binary" ] || { echo "image: $binary is missing: cargo build --release" >&2 && exit 1; }
  done
  # shellcheck disable=SC2086 # words
  find deploy/Dockerfile deploy/image.sh $BINARIES tests/models/tiny-r1 tests/models/foreign -type f -print0 |
    sort -z | xargs -0 sha256sum | sha256sum
}

# The packages' files without their scripts: of those, only the bundle of certificates matters, and it is a concatenation.
make_base() {
  local context=$OUT/base root=$OUT/base/root
  rm -rf $context && mkdir -p $root
  # shellcheck disable=SC2086 # words
  (cd $context && apt-get -o APT::Sandbox::User=root download -q $PACKAGES)
  for package in "$context"/*.deb; do dpkg-deb --extract "$package" $root; done
  rm -rf $root/usr/share/doc $root/usr/share/man $root/usr/share/lintian $root/usr/share/locale $root/usr/lib/*/gconv \
    $root/usr/sbin
  mkdir -p $root/etc/ssl/certs && find $root/usr/share/ca-certificates -name '*.crt' -exec cat {} + >$root/etc/ssl/certs/ca-certificates.crt
  rm -rf $root/usr/share/ca-certificates
  mkdir -m 1777 $root/tmp
  echo 'nonroot:x:65532:65532:nonroot:/:/sbin/nologin' >$root/etc/passwd
  echo 'nonroot:x:65532:' >$root/etc/group
  printf 'FROM scratch\nCOPY root /\n' >$context/Dockerfile
  buildah build --quiet --tag $BASE $context >/dev/null
  rm -rf $context
}

main
