# GPT-2 finetuned on Shakespeare; it ends by itself when the validation loss no longer falls.
#
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_shakespeare.py
#   python train.py config/finetune_shakespeare.py --init_from=gpt2 --block_size=256   # too large? smaller
#
# 32 windows of 1,024 tokens an iteration; the text has 301,966, so 20 iterations read it about twice. Batch
# and rate are nanoGPT's, which makes 20 iterations; here it is at most 200, and --patience finds the end.
# Not measured with OpenAI's weights, which no machine here held; gpt2-xl needs a GPU with some 40 GB. On a
# small GPT-2 of our own: docs/results.md, "Finetuning"; so young a model wants ten times the rate.

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"

eval_interval = 5
eval_iters = 40  # the whole validation split
always_save_checkpoint = False  # keep the best
patience = 3  # evaluations without a better one

wandb_project = "shakespeare"
wandb_run_name = "finetune"

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 200

learning_rate = 3e-5
decay_lr = False
