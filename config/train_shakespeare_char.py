# A small character-level GPT on 1 MB of Shakespeare, by the fast recipe; its sizes are nanoGPT's.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py
#
# Measured with --device=cpu on one core of an AMD EPYC: validation loss 1.431 (exact, one seed) after 1,200
# updates, 4.9 million tokens, 2.7 s each; some 1.6 s each on two cores. nanoGPT's README gives 1.4697, after
# some 30 million tokens on a GPU. Number for number nanoGPT's: config/train_shakespeare_char_nanogpt.py.

out_dir = "out-shakespeare-char"
eval_interval = 200  # often, because it overfits
eval_iters = 200
log_interval = 10

always_save_checkpoint = False  # it overfits: keep the best

wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.1

position = "rope"
activation = "relu2"
tied = False
softcap = 15.0
smear = True
init = "zero"

optimizer = "muon"
muon_lr = 0.02
muon_ns_steps = 3
muon_weight_decay = 0.1
learning_rate = 0.01  # of AdamW: embedding, head and norms
weight_decay = 0.0
beta2 = 0.95
grad_clip = 0.0

max_iters = 1200
lr_schedule = "wsd"
lr_cooldown = 0.7
warmup_iters = 0
min_lr = 0.0
