# A small GPT that writes Python after about a minute on two CPU cores; made for `make quickstart`.
#
#   python data/python_stdlib/prepare.py
#   python train.py config/quickstart.py
#
# It is a start for a text of your own, too: --dataset=data/mine --out_dir=out-mine.
# Measured: 45 to 60 s on two cores of an AMD EPYC (fp32), validation loss 1.752 on Python 3.11's library.

out_dir = "out-quickstart"
dataset = "python_stdlib"

eval_interval = 300
eval_iters = 100
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 8
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
activation = "gelu"  # the exact one is the faster on a CPU

learning_rate = 4e-3
lr_schedule = "linear"
max_iters = 1800
warmup_iters = 50
min_lr = 0.0
beta2 = 0.99
