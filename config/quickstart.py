# Small GPT that generates Python after about a minute of training on two CPU cores; for `make quickstart`.
#
#   python data/python_stdlib/prepare.py
#   python train.py config/quickstart.py
#
# Also a starting point for your own text: --dataset=data/mine --out_dir=out-mine.
# Measured on two cores of an AMD EPYC: 50 s in total, validation loss 1.485 (standard library of
# Python 3.11).

out_dir = "out-quickstart"
dataset = "python_stdlib"

eval_interval = 200
eval_iters = 60
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 6
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128

position = "rope"
activation = "relu2"
tied = False
softcap = 15.0
init = "zero"

optimizer = "muon"
muon_lr = 0.02
muon_ns_steps = 3
learning_rate = 0.01  # AdamW: embedding, LM head and norms
weight_decay = 0.0
beta2 = 0.95
grad_clip = 0.0

max_iters = 800
lr_schedule = "wsd"
lr_cooldown = 0.7
warmup_iters = 0
min_lr = 0.0
