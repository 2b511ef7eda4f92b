#!/usr/bin/env bash
# Several nodes without a scheduler. Run on each node, from the repository root, with NODE set to its index:
#
#   NODES=2 NODE=0 HOST=10.0.0.1 cluster/nodes_by_hand.sh config/train_fineweb_edu_10b.py --out_dir=/shared/runs/fineweb
#   NODES=2 NODE=1 HOST=10.0.0.1 cluster/nodes_by_hand.sh config/train_fineweb_edu_10b.py --out_dir=/shared/runs/fineweb
#
# HOST is an address of node 0 that all nodes can reach; PORT must be open between them. The data and --out_dir must
# be on a file system shared by all nodes, and the code must be the same (checked at startup).
# Without InfiniBand, set NCCL_IB_DISABLE=1: it works, but is slow.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${NODES:?the number of nodes}" "${NODE:?index of this node, from 0}" "${HOST:?an address of node 0}"
PORT=${PORT:-29500}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
RESTARTS=${RESTARTS:-20}

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

exec torchrun --nnodes="$NODES" --node_rank="$NODE" --nproc_per_node="$GPUS" \
  --master_addr="$HOST" --master_port="$PORT" --max_restarts="$RESTARTS" \
  train.py "$@" --init_from=auto
