# The losses of OpenAI's GPT-2 large (774M) on OpenWebText, as published: nothing is trained.
#
#   python train.py config/eval_gpt2_large.py
#
# nanoGPT reports 2.66 (training split) and 2.67 (validation split). Not measured here: docs/weights.md.

init_from = "gpt2-large"
eval_only = True
batch_size = 8
eval_iters = 500  # many, for a small standard error
