#!/bin/sh
# Starts one process per GPU of this pod. Pods have the same numbers as in base/start.sh.
set -eu
node=$JOB_COMPLETION_INDEX
slots=$TRUNK_SLOTS
if [ "$GROUP" = pool ]; then
    node=$((TRUNK_PODS + node))
    slots=$POOL_SLOTS
fi
exec python -m torch.distributed.run --nnodes "$((TRUNK_PODS + POOL_PODS))" --node-rank "$node" --nproc-per-node "$slots" \
    --master-addr "$RUN-trunk-0-0.$RUN" --master-port 29500 /mnt/job/all_reduce.py "$@"
