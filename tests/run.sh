#!/usr/bin/env bash
# tests/run.sh [options and paths for pytest, from the repository root]: set up, then formatting, lint, types, all tests.
# Without options two files of tests run at a time, and then, alone, those that measure limited links.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/launch/setup.sh" test
cd "$root"
export PATH="$root/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # several processes share the cores: more threads take a third longer
step() { echo "== $*" && "$@"; }

step ruff format --check .
step ruff check .
step mypy
if [ $# -gt 0 ]; then
    step pytest "$@"
else
    step pytest -n 2 --dist loadfile -m "not root"
    step pytest -m root
fi
