# Character-level Shakespeare on a laptop CPU, tuned for speed: 140 iterations, some ten seconds with imports.
# For a lower loss: --max_iters=750, or config/train_shakespeare_char_medium.py.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_cpu.py
#
# Measured: validation loss 1.69 (mean of 3 seeds, 1.67 to 1.72), without the n-gram tables 1.86; after 300,
# 750 and 2,300 iterations 1.59, 1.52 and 1.55 (one seed). Counting 7-grams 1.54, nanoGPT's CPU command 1.90.
# 300 iterations take 10 s on two cores of an AMD EPYC (AVX-512, bfloat16), nanoGPT's command 71 s.

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
init = "zero"
ngram_orders = "2,3,4,5"
ngram_rows = 65536

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
