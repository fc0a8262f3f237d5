#!/usr/bin/env bash
# launch/demo.sh [options of launch/compare.py]: set up, then train on real data with each codec and compare them.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/launch/setup.sh" examples
exec "$root/.venv/bin/python" "$root/launch/compare.py" "$@"
