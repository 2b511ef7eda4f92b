# Architecture of GPT-3 XL (1.3B parameters), context 2,048. For 8 GPUs with 80 GB; not measured.
#
#   python data/fineweb_edu/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt3_xl.py
#
# Model size, learning rate, batch size and schedule follow Brown et al. 2020, table 2.1 and appendix B.
# Differences: its data is not public, and its sparse attention layers are dense here.
# The paper lists 24 heads of 128 channels, which does not equal 2,048; 16 heads of 128 do.
# Estimate time and cost: python plan.py config/train_gpt3_xl.py --gpu=H100 --gpus=8

out_dir = "out-gpt3-xl"
wandb_run_name = "gpt3-xl"
dataset = "fineweb_edu"

n_layer = 24
n_head = 16
n_embd = 2048
bias = True

batch_size = 2
block_size = 2048
batch_tokens = 1048576
max_tokens = 300e9

learning_rate = 2e-4
min_lr = 2e-4 / 10
warmup_iters = 375e6 // batch_tokens
lr_decay_iters = 260e9 // batch_tokens

eval_interval = 1000
eval_iters = 100
log_interval = 10
