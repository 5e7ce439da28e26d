#!/bin/bash
# What runs on each node: torchrun with one process a GPU.
#   node.sh ADDRESS PORT CONFIG [--section.field VALUE ...]
set -uo pipefail
address=$1 port=$2
shift 2

torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$address:$port" --max-restarts 0 \
    -m vito_fast train "$@" --resume &
launcher=$!

# torchrun does not pass SIGUSR1 on: it goes to the training processes, which save and end. (No restarts within the job:
# torchrun would take their ending for a failure and start them again.)
trap 'pkill -USR1 -P "$launcher"' USR1
while kill -0 "$launcher" 2>/dev/null; do # a trap ends a wait early
    wait "$launcher"
    status=$?
done
exit "$status"
