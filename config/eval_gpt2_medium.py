# Losses of OpenAI's GPT-2 medium (350M) on OpenWebText, released weights, evaluation only.
#
#   python train.py config/eval_gpt2_medium.py
#
# nanoGPT reports 2.85 (training split) and 2.84 (validation split). Not reproduced here: see docs/weights.md.

init_from = "gpt2-medium"
eval_only = True
batch_size = 8
eval_iters = 500  # many, to reduce the standard error
