# GPT-2 xl (1,558M parameters) on OpenWebText, from scratch. For 8 GPUs with 80 GB; not measured.
#
#   python data/openwebtext/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_xl.py
#
# Architecture of GPT-2; learning rate of the GPT-3 model of the same size (Brown et al. 2020, table 2.1).
# Estimate time and cost: python plan.py config/train_gpt2_xl.py --gpu=A100 --gpus=8

out_dir = "out-gpt2-xl"
wandb_run_name = "gpt2-xl"

n_layer = 48
n_head = 25
n_embd = 1600

batch_size = 2
block_size = 1024
batch_tokens = 524288
max_tokens = 300e9

learning_rate = 2e-4
min_lr = 2e-4 / 10
warmup_iters = 2000

eval_interval = 1000
eval_iters = 200
log_interval = 10
