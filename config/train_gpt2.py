# GPT-2 (124M) on OpenWebText with exactly nanoGPT's hyperparameters. Not reproduced here yet.
# nanoGPT reports a loss of about 2.85 after about 4 days on 8 A100 40GB.
#
#   python train.py config/train_gpt2.py
#
# 12 sequences * 1024 tokens * 40 micro-batches = 491,520 tokens per iteration.

wandb_project = "owt"  # used with --wandb_log=True
wandb_run_name = "gpt2-124M"

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000  # 300B tokens
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
