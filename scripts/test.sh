#!/usr/bin/env bash
# Installs what the tests need in .venv and runs lint, types and tests.
# Arguments go to pytest, as in `bash scripts/test.sh tests/model -k mla`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh

# torch comes first and by an exact version where setup.cfg has one: a range that another package
# brings may pick a build for GPUs several times the size. A CPU build already there is kept.
python=$(.venv/bin/python -c "import sys; print(sys.executable)" 2>/dev/null || find_python)
torch=$("$python" -c 'import sys; print("torch==2.13.0" if sys.version_info < (3, 12) else "torch>=2.11,<3")')
ensure_venv test "$torch" ".[test]"

failed=()
check() { # NAME COMMAND...
    echo "== $1"
    .venv/bin/"${@:2}" || failed+=("$1")
}
check lint ruff check --quiet --output-format=concise .
check format ruff format --check --quiet .
check types pyrefly check --python-interpreter-path .venv/bin/python \
    --summary=none --output-format=min-text
# A file stays in one process: what its tests share is computed once.
check tests python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q "$@"

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
