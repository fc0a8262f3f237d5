#!/usr/bin/env bash
# tests/engines.sh [options for pytest]: set up with Lightning, Accelerate, transformers, TensorBoard and Horovod, which
# is built once (about 4 minutes), then run the tests of every engine and framework.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/launch/setup.sh" engines
# Not optimized as for use, which takes a minute more to compile. Timings want a Horovod that is built without this.
VIRTUAL_ENV="$root/.venv" CXXFLAGS="${CXXFLAGS:--O1}" "$root/launch/build_horovod.sh"
cd "$root"
export PATH="$root/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -c "import horovod.torch, lightning, accelerate, transformers, tensorboard" # else their tests would be skipped
exec pytest \
    tests/test_horovod.py tests/test_frameworks.py tests/test_mpi.py tests/test_golden.py tests/test_watch.py \
    tests/test_launch.py "$@"
