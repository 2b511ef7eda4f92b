# Architecture of GPT-3 2.7B (2.7B parameters), context 2,048. For 8 GPUs with 80 GB; not measured.
#
#   python data/fineweb_edu/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt3_2_7b.py
#
# Model size, learning rate, batch size and schedule follow Brown et al. 2020, table 2.1 and appendix B.
# Differences: its data is not public, and its sparse attention layers are dense here.
# Estimate time and cost: python plan.py config/train_gpt3_2_7b.py --gpu=H100 --gpus=8

out_dir = "out-gpt3-2.7b"
wandb_run_name = "gpt3-2.7b"
dataset = "fineweb_edu"

n_layer = 32
n_head = 32
n_embd = 2560
bias = True

batch_size = 1
block_size = 2048
batch_tokens = 1048576
max_tokens = 300e9

learning_rate = 1.6e-4
min_lr = 1.6e-4 / 10
warmup_iters = 375e6 // batch_tokens
lr_decay_iters = 260e9 // batch_tokens

eval_interval = 1000
eval_iters = 100
log_interval = 10
