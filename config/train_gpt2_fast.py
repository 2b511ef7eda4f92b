# GPT-2's size (124M parameters plus an untied LM head), Muon and a modernized block: needs fewer tokens.
#
#   python data/openwebtext/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py
#
# Not measured yet. Learning rates are those of published runs of this size and recipe with batches of half a
# million tokens, which reach 3.28 on FineWeb after about 1.7 billion tokens (3,250 iterations); AdamW with
# the GPT-2 block takes about 10 billion. nanoGPT's exact hyperparameters: config/train_gpt2.py.

out_dir = "out-gpt2-fast"
eval_interval = 250
eval_iters = 200
log_interval = 10

wandb_project = "owt"
wandb_run_name = "gpt2-fast"

dataset = "openwebtext"
# 16 sequences x 1,024 tokens x 32 micro-batches = 524,288 tokens per iteration
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 32

n_layer = 12
n_head = 12
n_embd = 768
position = "rope"
norm = "rms"
activation = "relu2"
qk_norm = True
tied = False
softcap = 15.0
smear = True
init = "zero"

optimizer = "muon"
muon_lr = 0.025
muon_weight_decay = 0.05
learning_rate = 0.004  # AdamW: embedding and LM head
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
grad_clip = 0.0

max_iters = 3250
lr_schedule = "wsd"
lr_cooldown = 0.7
warmup_iters = 0
min_lr = 0.0
