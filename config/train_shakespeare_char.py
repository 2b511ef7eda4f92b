# A small character-level GPT on 1 MB of Shakespeare, by the fast recipe; the name and sizes are nanoGPT's.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py
#
# At full size not measured yet. With the options that nanoGPT's README gives for a CPU (4 layers, 128
# channels, 64 characters, batch 12, 2,000 iterations) on two cores of an AMD EPYC: validation loss 1.552
# (exact) after 94 s; nanoGPT's ends at 1.90 after 112 s.
# Number for number nanoGPT's: config/train_shakespeare_char_nanogpt.py.

out_dir = "out-shakespeare-char"
eval_interval = 250  # often, because it overfits
eval_iters = 200
log_interval = 10

always_save_checkpoint = False  # it overfits: keep the best

wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

position = "rope"
activation = "relu2"
tied = False
softcap = 15.0
smear = True
init = "zero"

optimizer = "muon"
muon_lr = 0.01
muon_turns = 3
learning_rate = 0.006  # of AdamW: embedding, head and norms
weight_decay = 0.0
beta2 = 0.95
grad_clip = 0.0

max_iters = 2000
lr_schedule = "wsd"
lr_cooldown = 0.7
warmup_iters = 0
min_lr = 0.0
