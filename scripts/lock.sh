#!/usr/bin/env bash
# Resolve pyproject.toml for every Python from 3.10 on and write the exact versions.
#
# The lock is used as a constraint (`pip install -c requirements.lock -e ...`). CUDA libraries are
# left out of it: a CUDA build of torch pins its own, and a CPU build wants none.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet uv
printf 'torch==%s\n' "${TORCH:-2.13.0}" >"$work/torch.txt"
"$work/venv/bin/uv" pip compile pyproject.toml --extra dev --universal --python-version 3.10 \
    --constraint "$work/torch.txt" --no-header --no-annotate --quiet --output-file "$work/all.txt"
{
    echo "# Exact versions for make and CI, as pip constraints. Written by scripts/lock.sh (make lock)."
    grep -vE '^(nvidia-|cuda-|triton|patching-demo|-e |--|#|\.)' "$work/all.txt"
} >requirements.lock
echo "requirements.lock: $(grep -c == requirements.lock) pins"
