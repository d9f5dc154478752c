#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes; the table is printed and kept in results/benchmarks/.
# `scripts/gpu_check.sh memory resume` runs some of it; `--device cpu` what a CPU can answer.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" tests/support/gpu_check.py "$@"
