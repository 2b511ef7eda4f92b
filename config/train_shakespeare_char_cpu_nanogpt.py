# Laptop version of train_shakespeare_char_nanogpt.py: the CPU options of nanoGPT's README.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_cpu_nanogpt.py
#
# Measured on two cores of an AMD EPYC: 90 s, validation loss 1.911 (full split, mean of three seeds, 1.907 to
# 1.913); nanoGPT with the same options: 93 s, 1.905 (three seeds, 1.898 to 1.913).

out_dir = "out-shakespeare-char-nanogpt"
eval_interval = 250
eval_iters = 20
log_interval = 10

always_save_checkpoint = False

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
activation = "gelu"  # as in nanoGPT

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100

device = "cpu"
