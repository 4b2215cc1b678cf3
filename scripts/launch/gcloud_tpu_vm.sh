#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice with gcloud: creates the slice, installs on every host, starts one
# process a host. Run it in the repository's root on a machine with gcloud.
#
#   bash scripts/launch/gcloud_tpu_vm.sh create|install|start|follow|stop|delete
#
# Edit: the block below; for another slice --parallel.* too, as scripts/plan.py ranks them. NFS is a
# Filestore share (or any NFS server) in the slice's network: all hosts write checkpoints to it, and
# it holds the corpus and the cache.
set -euo pipefail

NAME=dsv3
PROJECT=my-project
ZONE=us-east5-a
TYPE=v5p-2048                # 1,024 chips, topology 8x8x16, 256 hosts
RUNTIME=v2-alpha-tpuv5       # v5e: v2-alpha-tpuv5-lite, v6e: v2-alpha-tpuv6e
NFS=10.0.0.2:/share
OUT=/mnt/share/runs/v3
TRAIN="scripts/train.py configs/v3_671b.py --out $OUT --resume \
    --data.corpus /mnt/share/corpus --data.cache-dir /mnt/share/cache"

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$NAME" --project "$PROJECT" --zone "$ZONE" --worker=all \
        --command "$1"
}

case ${1:-} in
create)
    gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --project "$PROJECT" \
        --zone "$ZONE" --accelerator-type "$TYPE" --runtime-version "$RUNTIME"
    echo "wait until it is ACTIVE: gcloud compute tpus queued-resources describe $NAME --zone $ZONE"
    ;;
install)
    archive=$(mktemp)
    git archive --output "$archive" --format tar.gz HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:dsv3.tar.gz" --project "$PROJECT" \
        --zone "$ZONE" --worker=all
    on_all_hosts "set -e
        mkdir -p dsv3 && tar -xzf dsv3.tar.gz -C dsv3
        sudo apt-get install -y -q nfs-common && sudo mkdir -p /mnt/share
        mountpoint -q /mnt/share || sudo mount $NFS /mnt/share
        python3 -m venv dsv3/.venv && dsv3/.venv/bin/pip install -q './dsv3[tpu,data]'"
    ;;
start)
    # The log of each host stays on it; process 0's, the one with the numbers, is on worker 0.
    on_all_hosts "cd dsv3 && PYTHONPATH=. nohup .venv/bin/python scripts/restart.py --times 20 \
        .venv/bin/python $TRAIN > train.log 2>&1 < /dev/null & disown"
    ;;
follow)
    gcloud compute tpus tpu-vm ssh "$NAME" --project "$PROJECT" --zone "$ZONE" --worker=0 \
        --command "tail -f dsv3/train.log"
    ;;
stop) # saves a checkpoint and ends all processes with 0
    gcloud compute tpus tpu-vm ssh "$NAME" --project "$PROJECT" --zone "$ZONE" --worker=all \
        --command "pkill -TERM -f scripts/restart.py || true"
    ;;
delete)
    gcloud compute tpus queued-resources delete "$NAME" --project "$PROJECT" --zone "$ZONE" \
        --force --quiet
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
