#!/usr/bin/env bash
# Installs the package in .venv and trains configs/tiny.py on real text, in runs/quickstart.
# Arguments go to scripts/train.py, as in `bash scripts/quickstart.sh --steps 50`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh

ensure_venv package .

out=runs/quickstart
if [[ -e $out ]]; then
    echo "continuing $out (delete it to start again)"
fi
# XLA computes products this small on one core: a second core gets a replica and half of each batch.
replicas=()
if (($(nproc) > 1)); then
    export XLA_FLAGS="--xla_force_host_platform_device_count=2 ${XLA_FLAGS:-}"
    replicas=(--parallel.replica 2)
fi
.venv/bin/python scripts/train.py configs/tiny.py --out "$out" --resume ${replicas[@]+"${replicas[@]}"} "$@"

echo
for result in loss.png expert_load.png sample.txt; do
    if [[ -e $out/$result ]]; then
        echo "$PWD/$out/$result"
    fi
done
echo "more text: .venv/bin/python scripts/generate.py $out --prompt 'def '"
