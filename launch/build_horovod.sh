#!/usr/bin/env bash
# launch/build_horovod.sh: build Horovod for the torch in .venv, or in the active virtual environment, and install it.
# About 4 minutes, once: the wheel is kept in ~/.cache/terncomm by versions. With MPI if there is an mpicxx, else gloo.
# CXXFLAGS stand behind Horovod's own flags, so they win.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
version=0.28.1
python="${VIRTUAL_ENV:-$root/.venv}/bin/python"

say() { echo "build_horovod: $*"; }
fail() { echo "build_horovod: $*" >&2; exit 1; }

case "${1:-}" in
"") ;;
*) fail "takes no arguments, got '$1'" ;;
esac
[ -x "$python" ] || fail "there is no $python: run launch/setup.sh first, or activate your environment"
torch="$("$python" -c 'import torch; print(torch.__version__)')" || fail "torch is not installed for $python"
for tool in g++ cmake make; do
    command -v $tool >/dev/null || fail "there is no $tool; on Debian or Ubuntu: apt-get install g++ cmake make"
done

export PATH="$(dirname "$python"):$PATH" # the mpicxx of the wheel mpich, if it is there
with=(HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1) controllers=gloo
if command -v mpicxx >/dev/null; then
    with=(HOROVOD_WITH_GLOO=1 HOROVOD_WITH_MPI=1) controllers="gloo and MPI"
    # A wheel for one MPI is none for another; where an environment lies does not matter.
    mpi="$({ mpicxx -show | sed "s|$(dirname "$(dirname "$python")")||g"; mpirun --version; } 2>&1 |
        sed -n 1,3p | cksum | cut -c1-6)"
fi
tag="$(echo "$("$python" -V) torch $torch $controllers ${mpi:-} ${CXXFLAGS:-}" | tr -c 'A-Za-z0-9.\n' -)"
wheels="${XDG_CACHE_HOME:-$HOME/.cache}/terncomm/horovod-$version-$tag"

pip() { "$python" -m pip "$1" -q --disable-pip-version-check "${@:2}"; }
if ! ls "$wheels"/horovod-*.whl >/dev/null 2>&1; then
    say "building horovod $version with $controllers for torch $torch (4 minutes on two free cores, once)"
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    # Its CMake files ask for C++14 and torch for C++17: the last -std on the line counts.
    # It also asks for debugging symbols. $ORIGIN: the MPI of the wheel mpich is found wherever this one is installed.
    printf '#!/bin/sh\nexec g++ "-Wl,-rpath,\$ORIGIN/../../../.." "$@" -std=c++17 -g0 %s\n' "${CXXFLAGS:-}" >"$work/cxx"
    chmod +x "$work/cxx"
    pip install setuptools wheel packaging cloudpickle psutil pyyaml
    env CXX="$work/cxx" HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 "${with[@]}" \
        "$python" -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-cache-dir --no-deps \
        -w "$work/wheels" "horovod==$version" >"$work/log" 2>&1 &
    build=$!
    trap 'kill $build 2>/dev/null || true; rm -rf "$work"' EXIT
    while sleep 2 && kill -0 $build 2>/dev/null; do
        [ $((SECONDS % 30)) -gt 1 ] || say "still building, $SECONDS s"
    done
    wait $build || { tail -n 40 "$work/log" >&2; fail "the build failed; the end of its output is above"; }
    mkdir -p "$wheels"
    mv "$work"/wheels/horovod-*.whl "$wheels/"
fi
pip install --no-deps --force-reinstall "$wheels"/horovod-*.whl
pip install cloudpickle psutil pyyaml packaging cffi
say "$("$python" -c 'import horovod.torch as hvd; print("ready: MPI", hvd.mpi_built(), "gloo", hvd.gloo_built())')"
