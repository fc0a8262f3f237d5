#!/usr/bin/env bash
# tests/run.sh [options and paths for pytest, from the repository root]: set up, then formatting, lint, types, all tests.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/launch/setup.sh" test
cd "$root"
export PATH="$root/.venv/bin:$PATH"
step() { echo "== $*" && "$@"; }

step ruff format --check .
step ruff check .
step mypy
step pytest "$@"
