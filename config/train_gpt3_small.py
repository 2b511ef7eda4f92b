# Architecture of GPT-3 small (125M parameters), context 2,048. For 8 GPUs with 40 GB; not measured.
#
#   python data/fineweb_edu/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt3_small.py
#
# Model size, learning rate, batch size and schedule follow Brown et al. 2020, table 2.1 and appendix B.
# Differences: its data is not public, and its sparse attention layers are dense here.
# Estimate time and cost: python plan.py config/train_gpt3_small.py --gpu=H100 --gpus=8

out_dir = "out-gpt3-small"
wandb_run_name = "gpt3-small"
dataset = "fineweb_edu"

n_layer = 12
n_head = 12
n_embd = 768
bias = True

batch_size = 16
block_size = 2048
batch_tokens = 524288
max_tokens = 300e9

learning_rate = 6e-4
min_lr = 6e-4 / 10
warmup_iters = 375e6 // batch_tokens
lr_decay_iters = 260e9 // batch_tokens

eval_interval = 1000
eval_iters = 100
log_interval = 10
