# Character-level Shakespeare on a laptop CPU, tuned for speed: in ten seconds, including imports, it reaches
# the loss of nanoGPT's own CPU command after a minute and a half. For a lower loss: --max_iters=2000.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_cpu.py
#
# Measured on two cores of an AMD EPYC: 10 s in total, validation loss 1.86 (full split); nanoGPT's CPU
# command on the same day: 111 s, 1.90.

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
learning_rate = 0.02  # AdamW: embedding, LM head and norms
weight_decay = 0.0
beta2 = 0.95
grad_clip = 0.0

max_iters = 140
lr_schedule = "wsd"
lr_cooldown = 0.7
warmup_iters = 0
min_lr = 0.0

device = "cpu"
