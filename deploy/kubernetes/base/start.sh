#!/bin/sh
# Starts this pod's ranks. split.env has the numbers; the JobSet's labels say which pod of which group this is. Trunk pods
# come first in the hostfile. Further arguments are passed on to `train`.
set -eu
hosts=$(mktemp)
list() { # GROUP PODS SLOTS
    pod=0
    while [ "$pod" -lt "$2" ]; do
        echo "$RUN-$1-0-$pod.$RUN slots=$3" >> "$hosts"
        pod=$((pod + 1))
    done
}
list trunk "$TRUNK_PODS" "$TRUNK_SLOTS"
list pool "$POOL_PODS" "$POOL_SLOTS"
ranks=$((TRUNK_PODS * TRUNK_SLOTS + POOL_PODS * POOL_SLOTS))
trunk=${TRUNK_RANKS:-$((TRUNK_PODS * TRUNK_SLOTS))}
node=$JOB_COMPLETION_INDEX
if [ "$GROUP" = pool ]; then
    node=$((TRUNK_PODS + node))
fi
# exec: signals to the container must reach the trainer, which passes them to its ranks.
exec python -m trainer train /mnt/job/recipe.yaml \
    --hostfile "$hosts" --node-rank "$node" --master-addr "$RUN-trunk-0-0.$RUN" \
    --set parallel.trunk_ranks="$trunk" --set parallel.pool_ranks="$((ranks - trunk))" \
    --set run.dir="/mnt/unipool/runs/$RUN" --set data.dir=/mnt/unipool/data \
    --set metrics.port=9400 --set metrics.port_by=local_rank --set metrics.host=0.0.0.0 "$@"
