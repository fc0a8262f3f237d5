#!/usr/bin/env bash
# tests/engines.sh [options for pytest]: set up with Lightning, Accelerate, transformers, TensorBoard and Horovod, which
# is built once (about 3 minutes), then run the tests of every engine and framework.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/launch/setup.sh" engines
"$root/launch/build_horovod.sh"
cd "$root"
PATH="$root/.venv/bin:$PATH" exec pytest \
    tests/test_horovod.py tests/test_frameworks.py tests/test_mpi.py tests/test_watch.py tests/test_launch.py "$@"
