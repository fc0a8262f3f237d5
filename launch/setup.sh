#!/usr/bin/env bash
# launch/setup.sh [examples|test|engines]: make .venv in the repository root and install terncomm with that extra into it.
# Quick when nothing has changed since the last time. PYTHON=/path/to/python3.11 chooses the interpreter.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extra="${1:-examples}"
python="${PYTHON:-python3}"
venv="$root/.venv"
stamp="$venv/.installed-$extra"

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

case "$extra" in
examples | test | engines) ;;
*) fail "unknown extra '$extra': use examples, test or engines" ;;
esac

# The path is part of the key: an editable install points into it.
key="$(echo "$root $extra" | cat - "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
    exit 0
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    command -v "$python" >/dev/null || fail "there is no '$python' on PATH; terncomm needs Python 3.10 or newer"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "terncomm needs Python 3.10 or newer, '$python' is $("$python" -V 2>&1); set PYTHON=/path/to/a/newer/python3"
    say "making $venv with $("$python" -V)"
    "$python" -m venv --clear "$venv" >/dev/null ||
        fail "'$python -m venv' failed; on Debian or Ubuntu install the package python3-venv, then try again"
fi

pip() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-compile -c "$root/constraints.txt" "$@"; }
# torch first and alone: the rest can then only follow its version, never choose another build.
say "installing torch $(sed -n "s/^torch==//p" "$root/constraints.txt") (about 200 MB, once)"
pip torch || fail "torch could not be installed; pip's message is above"
say "installing terncomm[$extra]"
pip -e "$root[$extra]" || fail "terncomm[$extra] could not be installed; pip's message is above"
# Byte code, which pip would compile on one core. Some files are for other versions of Python: their errors are no matter.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" >/dev/null 2>&1 || true
echo "$key" >"$stamp"
say "ready: $venv"
