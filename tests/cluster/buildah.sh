#!/usr/bin/env bash
# buildah.sh ARGUMENTS...: buildah without a daemon, with its images under target/, as it works also inside a container.
STORE=$(cd "$(dirname "$0")/../.." && pwd)/target/image/store
export BUILDAH_ISOLATION=chroot
exec buildah --root "$STORE" --runroot "$STORE-run" --storage-driver vfs "$@"
