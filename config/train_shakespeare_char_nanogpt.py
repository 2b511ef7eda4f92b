# Small character-level GPT on 1 MB of Shakespeare with exactly nanoGPT's hyperparameters.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_nanogpt.py
#
# Takes hours on a CPU; config/train_shakespeare_char_cpu_nanogpt.py takes minutes. Not reproduced here yet;
# nanoGPT reports a validation loss of 1.4697 after about 3 minutes on an A100.

out_dir = "out-shakespeare-char-nanogpt"
eval_interval = 250  # frequent, because the model overfits
eval_iters = 200
log_interval = 10

always_save_checkpoint = False  # overfits: keep only the best

wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
activation = "gelu"  # as in nanoGPT
dropout = 0.2

learning_rate = 1e-3  # small models tolerate a higher rate
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # higher than usual: few tokens per iteration
warmup_iters = 100
