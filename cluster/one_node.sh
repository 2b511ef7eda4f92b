#!/usr/bin/env bash
# One machine, all of its GPUs. From the repository's root:
#
#   cluster/one_node.sh config/train_fineweb_edu_10b.py --out_dir=/shared/runs/fineweb
#
# A process that is killed, or hangs, ends the others; torchrun starts all of them again, up to RESTARTS times,
# and they go on from the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
RESTARTS=${RESTARTS:-20}

# How long torchrun, when it is stopped itself, lets the processes finish the step and save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

exec torchrun --standalone --nproc_per_node="$GPUS" --max_restarts="$RESTARTS" \
  train.py "$@" --init_from=auto
