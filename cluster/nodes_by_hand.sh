#!/usr/bin/env bash
# Several machines without a scheduler. On each of them, from the repository's root, with its own number:
#
#   NODES=2 NODE=0 HOST=10.0.0.1 cluster/nodes_by_hand.sh config/train_fineweb_edu_10b.py --out_dir=/shared/runs/fineweb
#   NODES=2 NODE=1 HOST=10.0.0.1 cluster/nodes_by_hand.sh config/train_fineweb_edu_10b.py --out_dir=/shared/runs/fineweb
#
# HOST is an address of machine 0 that all can reach; PORT must be open between them. The data and --out_dir lie
# where all machines see them, the code is the same everywhere (the processes compare it when they start).
# If there is no InfiniBand, put NCCL_IB_DISABLE=1 in front: it works, but crawls.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${NODES:?the number of machines}" "${NODE:?which one this is, from 0}" "${HOST:?an address of machine 0}"
PORT=${PORT:-29500}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
RESTARTS=${RESTARTS:-20}

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

exec torchrun --nnodes="$NODES" --node_rank="$NODE" --nproc_per_node="$GPUS" \
  --master_addr="$HOST" --master_port="$PORT" --max_restarts="$RESTARTS" \
  train.py "$@" --init_from=auto
