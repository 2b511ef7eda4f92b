# Losses of OpenAI's GPT-2 xl (1558M) on OpenWebText, released weights, evaluation only.
#
#   python train.py config/eval_gpt2_xl.py
#
# nanoGPT reports 2.56 (training split) and 2.54 (validation split). Not reproduced here: see docs/weights.md.

init_from = "gpt2-xl"
eval_only = True
batch_size = 8
eval_iters = 500  # many, to reduce the standard error
