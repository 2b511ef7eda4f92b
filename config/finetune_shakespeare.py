# Finetune GPT-2 on Shakespeare, with early stopping on the validation loss.
#
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_shakespeare.py
#   python train.py config/finetune_shakespeare.py --init_from=gpt2 --block_size=256   # if out of memory
#
# 32 sequences of 1,024 tokens per iteration; the text has 301,966 tokens: 20 iterations are about two epochs.
# Batch size and learning rate are nanoGPT's, which runs 20 iterations; here at most 200, ended by --patience.
# Not measured with OpenAI's weights; gpt2-xl needs a GPU with about 40 GB. Results with a small GPT-2 trained
# from scratch: docs/results.md, "Finetuning"; a briefly trained model needs ten times the learning rate.

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"

eval_interval = 5
eval_iters = 40  # covers the whole validation split
always_save_checkpoint = False  # keep only the best
patience = 3  # evaluations without improvement

wandb_project = "shakespeare"
wandb_run_name = "finetune"

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 200

learning_rate = 3e-5
decay_lr = False
