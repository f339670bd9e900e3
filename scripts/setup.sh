#!/usr/bin/env bash
# Makes .venv beside this folder and installs the project into it, in seconds if that has been done before.
# usage: bash scripts/setup.sh [dev|test]    dev: with what most tests need; test: with PyTorch as well, for all of them
# $PYTHON names the Python to use; otherwise the newest one that is found.
set -euo pipefail
cd "$(dirname "$0")/.."
least=11

fail() { printf 'setup: %s\n' "$1" >&2 && exit 1; }
case ${1:-} in
  "") what=. extras= ;;
  dev) what='.[dev]' extras=-dev ;;
  test) what='.[test]' extras='-dev -test' ;;
  *) fail "unknown argument '$1'; give dev, test or nothing" ;;
esac
is_new() { "$1" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, $least))" >/dev/null 2>&1; }

if ! is_new .venv/bin/python; then
  found=
  for python in ${PYTHON:-python3.14 python3.13 python3.12 python3.11 python3 python}; do
    if is_new "$python"; then found=$python && break; fi
  done
  if [ -n "$found" ]; then
    "$found" -m venv --clear .venv || fail "can't make .venv with $found"
  elif command -v uv >/dev/null; then
    uv venv -q --clear --seed --python "3.$((least + 2))" .venv || fail "uv can't make .venv"
  else
    has=$(python3 -V 2>/dev/null || echo none)
    fail "needs Python 3.$least or later with venv, found $has; install one (brew install python, or uv: https://docs.astral.sh/uv) and run this again"
  fi
fi

# What is installed is what pyproject.toml said then, so nothing is to be done until that changes.
stamp=.venv/installed${extras##* } state=$(cksum <pyproject.toml)
if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
  log=.venv/install.log
  printf 'setup: installing %s into .venv\n' "$what" >&2
  if ! .venv/bin/python -m pip install -q --disable-pip-version-check -e "$what" >"$log" 2>&1; then
    reason=$(grep -m1 '^ERROR' "$log" || tail -n 1 "$log")
    fail "can't install $what: ${reason#ERROR: } (all of it is in $log; without a network nothing can be installed)"
  fi
  rm -f .venv/installed*
  for extra in "" $extras; do printf '%s\n' "$state" >".venv/installed$extra"; done
fi
