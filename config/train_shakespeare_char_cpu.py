# Shakespeare by characters on a laptop's CPU, as fast as it goes: in ten seconds, imports and all, where
# nanoGPT's own CPU command is after a minute and a half. More iterations go further: --max_iters=2000.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_cpu.py
#
# Measured on two cores of an AMD EPYC: 10 s from start to end, validation loss 1.86 (exact); nanoGPT's CPU
# command takes 111 s on the same day, to 1.90.

out_dir = "out-shakespeare-char"
eval_interval = 140
eval_iters = 10
log_interval = 10

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 20
block_size = 64

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
learning_rate = 0.02  # of AdamW: embedding, head and norms
weight_decay = 0.0
beta2 = 0.95
grad_clip = 0.0

max_iters = 140
lr_schedule = "wsd"
lr_cooldown = 0.7
warmup_iters = 0
min_lr = 0.0

device = "cpu"
