# GPT-2 finetuned on Shakespeare: nanoGPT's preset, number for number.
#
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_shakespeare.py
#   python train.py config/finetune_shakespeare.py --init_from=gpt2 --block_size=256   # too large? smaller
#
# 32 windows of 1,024 tokens an iteration; the text has 301,966, so 20 iterations read it about twice.
# Not measured here: it needs OpenAI's weights, and for gpt2-xl a GPU with some 40 GB.

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # keep the best

wandb_project = "shakespeare"
wandb_run_name = "finetune"

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
