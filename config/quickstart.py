# Small GPT that generates Python after a minute of training on a CPU; for `make quickstart`.
#
#   python data/python_stdlib/prepare.py
#   python train.py config/quickstart.py
#
# Also for your own text: --dataset=novel.txt --out_dir=out-novel --minutes=5.
# Measured on two slow cores of an AMD EPYC (AVX2): validation loss 1.48 to 1.51 nats/character after the
# minute (standard library of Python 3.11).

out_dir = "out-quickstart"
dataset = "python_stdlib"

eval_interval = 50
eval_iters = 15
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 12
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128

position = "rope"
activation = "relu2"
tied = False
softcap = 15.0
smear = True
init = "zero"

optimizer = "muon"
muon_lr = 0.03
muon_ns_steps = 3
learning_rate = 0.02  # AdamW: embedding, LM head and norms
weight_decay = 0.0
beta2 = 0.95
grad_clip = 0.0

max_iters = 400  # if given as a flag, instead of:
minutes = 1
lr_schedule = "wsd"
lr_cooldown = 0.7
warmup_iters = 0
min_lr = 0.0
