# Medium-size character-level Shakespeare on a CPU: nanoGPT's best loss (1.4697) in one pass over the text.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_medium.py
#
# Measured: validation loss 1.463, 1.464 and 1.476 (full split, 3 seeds) after 140 s, 245 iterations (one
# million tokens), on two cores of an AMD EPYC with AVX-512 and bfloat16; 1.466, 1.469 and 1.474 after 400 s
# with AVX2; counting 7-grams 1.522.
# train_shakespeare_char.py, twice the size, reaches 1.431 there in half an hour; longer runs overfit.

out_dir = "out-shakespeare-char"
eval_interval = 245
eval_iters = 5
log_interval = 10

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256

n_layer = 6
n_head = 4
n_embd = 256

position = "rope"
activation = "relu2"
tied = False
softcap = 15.0
init = "zero"
ngram_orders = "2,3,4,5"
ngram_rows = 65536

optimizer = "muon"
muon_lr = 0.02
muon_ns_steps = 3
learning_rate = 0.01  # AdamW: embedding, LM head and norms
weight_decay = 0.0
beta2 = 0.95
grad_clip = 0.0

max_iters = 245
lr_schedule = "wsd"
lr_cooldown = 0.7
warmup_iters = 0
min_lr = 0.0

device = "cpu"
