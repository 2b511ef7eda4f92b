# Losses of OpenAI's GPT-2 (124M) on OpenWebText, released weights, evaluation only.
#
#   python train.py config/eval_gpt2.py
#
# nanoGPT reports 3.11 (training split) and 3.12 (validation split). Not reproduced here: see docs/weights.md.

init_from = "gpt2"
eval_only = True
batch_size = 8
eval_iters = 500  # many, to reduce the standard error
