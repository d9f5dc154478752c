#!/usr/bin/env bash
# Everything fastflower needs, into .venv: system packages when missing and permitted, the hashed lock, the project.
# NEXT=1: into .venv-next, from requirements-next.lock, with a torch that is newer than mosaicml's pin; on Python 3.12, too.
# Debian and Ubuntu; elsewhere environment.yml gives the same. Run again after a change of the lock: what is there stays.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "setup: $*" >&2; exit 4; }

venv=.venv lock=requirements.lock pythons="3.11"
[ -z "${NEXT:-}" ] || venv=.venv-next lock=requirements-next.lock pythons="3.11 3.12"
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
python=${PYTHON:-}
for known in $pythons; do
  if [ -z "$python" ] && version_of "python$known" >/dev/null; then python=python$known; fi
done
python=$(command -v "${python:-python3.11}") || fail "no ${PYTHON:-python${pythons// / or python}} on PATH; install Python 3.11 (Debian 12: apt-get install python3.11-venv python3.11-dev) or say PYTHON=/path/to/python3.11"
version=$(version_of "$python") || fail "$python does not run"
[[ " $pythons " = *" $version "* ]] || fail "$python is Python $version; mosaicml and the torch of $lock resolve together on ${pythons// / and } only"

# one line for each need: the Debian package, then a test that is true when it is there
has_jpeglib() { printf '#include <stdio.h>\n#include <jpeglib.h>\n' | g++ -E -x c++ -; }
has_library() { "$python" -c "import ctypes; ctypes.CDLL('$1')"; }
missing=()
of_ffcv=()  # packages that only ffcv is built with
need() { local package=$1; shift; "$@" >/dev/null 2>&1 || missing+=("$package"); }
want() { local package=$1; shift; "$@" >/dev/null 2>&1 || of_ffcv+=("$package"); }
need g++ command -v g++
need libjpeg-dev has_jpeglib
want pkg-config command -v pkg-config
want libturbojpeg0-dev pkg-config --exists libturbojpeg
want libopencv-dev pkg-config --exists opencv4
need libgl1 has_library libGL.so.1          # opencv-python's wheel links these two
need libglib2.0-0 has_library libgthread-2.0.so.0
need "python$version-dev" test -f "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
need "python$version-venv" "$python" -c 'import ensurepip, venv'

as_root=""
[ "$(id -u)" = 0 ] || as_root="sudo -n"
may_install() { command -v apt-get >/dev/null && { [ -z "$as_root" ] || sudo -n true 2>/dev/null; }; }
if [ ${#of_ffcv[@]} -gt 0 ] && may_install; then missing+=("${of_ffcv[@]}"); fi
if [ ${#missing[@]} -gt 0 ]; then
  if ! may_install; then
    fail "system packages are missing and this user may not install them; ask for: apt-get install --no-install-recommends ${missing[*]}"
  fi
  echo "setup: installing ${missing[*]}"
  log=$(mktemp)
  $as_root apt-get update -qq >"$log" 2>&1 || true  # stale lists often suffice
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >>"$log" 2>&1 \
    || { tail -n 5 "$log" >&2; fail "apt-get could not install ${missing[*]} (whole log: $log)"; }
  rm -f "$log"
fi

if [ "$(version_of $venv/bin/python)" != "$version" ]; then
  rm -rf "$venv"
  "$python" -m venv "$venv"
fi
# uv is in the lock like everything else; pip only fetches it, by its hash
sed -n '/^uv==/,/[^\\]$/p' $lock >$venv/uv.lock
if ! $venv/bin/python -m uv --version 2>/dev/null | grep -q "^uv $(sed -n 's/^uv==\([^ ]*\).*/\1/p' $venv/uv.lock)"; then
  $venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r $venv/uv.lock
fi
# uv does not read pip's configuration; a mirror named there holds for uv too
mirror=${PIP_INDEX_URL:-$($venv/bin/python -m pip config get global.index-url 2>/dev/null || true)}
if [ -n "$mirror" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX=$mirror; fi
uv() { VIRTUAL_ENV=$PWD/$venv $venv/bin/python -m uv "$@"; }
echo "setup: installing $lock (the first time some 3.5 GB are fetched)"
quiet=-q
[ ! -t 2 ] || quiet=""
# Source distributions are built with the locked setuptools too. Bytecode is written now, once and on all cores: where
# Python may not write it later (PYTHONDONTWRITEBYTECODE, a folder of root), every command would compile for seconds.
sed '/^ffcv==/,/[^\\]$/d' $lock >$venv/all_but_ffcv.lock
# The newer lock is whole, but mosaicml's own word about torch contradicts it.
uv pip install $quiet ${NEXT:+--no-deps} --compile-bytecode --require-hashes --build-constraints $lock -r $venv/all_but_ffcv.lock
# ffcv compiles here, and only bench compares with it: where that fails, everything else works
sed -n '/^ffcv==/,/[^\\]$/p' $lock >$venv/ffcv.lock
uv pip install $quiet --no-deps --require-hashes --build-constraints $lock -r $venv/ffcv.lock 2>$venv/ffcv.log \
  || echo "setup: ffcv could not be built ($venv/ffcv.log), so bench has no stock comparisons; all else works${of_ffcv[*]:+; it needs ${of_ffcv[*]}}" >&2
uv pip install -q --no-deps --no-build-isolation -e .
touch $venv/installed
echo "setup: $venv is ready ($($venv/bin/python -c 'import fastflower; print("fastflower", fastflower.__version__)'))"
