# Losses of OpenAI's GPT-2 large (774M) on OpenWebText, released weights, evaluation only.
#
#   python train.py config/eval_gpt2_large.py
#
# nanoGPT reports 2.66 (training split) and 2.67 (validation split). Not reproduced here: see docs/weights.md.

init_from = "gpt2-large"
eval_only = True
batch_size = 8
eval_iters = 500  # many, to reduce the standard error
