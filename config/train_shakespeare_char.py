# Small character-level GPT on 1 MB of Shakespeare: nanoGPT's model size, Muon and a modernized block.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py
#
# Measured with --device=cpu: validation loss 1.403 (mean of 3 seeds, 1.397 to 1.408) after 1,200 iterations
# (4.9 million tokens) of 0.9 s on two cores of an Intel Xeon with AMX, or 2.7 s on two of an AMD EPYC with
# AVX2 only. nanoGPT's README reports 1.4697 after about 30 million tokens on a GPU.
# config/train_shakespeare_char_medium.py, with n-gram tables, reaches 1.466 in 2 to 7 minutes.
# nanoGPT's exact hyperparameters: train_shakespeare_char_nanogpt.py.

out_dir = "out-shakespeare-char"
eval_interval = 200  # frequent, because the model overfits
eval_iters = 28  # the whole validation text
log_interval = 10

always_save_checkpoint = False  # overfits: keep only the best

wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.0

position = "rope"
activation = "swiglu"
tied = False
softcap = 15.0
smear = True
init = "zero"

optimizer = "muon"
muon_lr = 0.02
muon_ns_steps = 3
muon_weight_decay = 1.5  # over five epochs better than dropout; less for smaller batches or one epoch
learning_rate = 0.01  # AdamW: embedding, LM head and norms
weight_decay = 0.0
beta2 = 0.95
grad_clip = 0.0

max_iters = 1200
lr_schedule = "wsd"
lr_cooldown = 0.7
warmup_iters = 0
min_lr = 0.0
