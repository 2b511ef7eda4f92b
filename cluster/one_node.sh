#!/usr/bin/env bash
# One node, all of its GPUs. Run from the repository root:
#
#   cluster/one_node.sh config/train_fineweb_edu_10b.py --out_dir=/shared/runs/fineweb
#
# If a process is killed or hangs, the others exit, too; torchrun restarts all of them, up to RESTARTS times, and
# they resume from the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
RESTARTS=${RESTARTS:-20}

# Seconds that torchrun, when stopped, gives the processes to finish the step and save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

exec torchrun --standalone --nproc_per_node="$GPUS" --max_restarts="$RESTARTS" \
  train.py "$@" --init_from=auto
