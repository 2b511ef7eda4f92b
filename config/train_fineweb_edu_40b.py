# GPT-2 (124M) on 40 billion tokens of FineWeb-Edu, as in build-nanogpt. For 8 GPUs with 40 GB; not measured.
#
#   python data/fineweb_edu/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_fineweb_edu_40b.py
#
# Four epochs of the 10-billion-token sample. During training: HellaSwag and samples from "Hello, I'm a
# language model,". Estimate time and cost: python plan.py config/train_fineweb_edu_40b.py --gpu=A100 --gpus=8

out_dir = "out-fineweb-edu-40b"
wandb_run_name = "fineweb-edu-40b"
dataset = "fineweb_edu"

batch_size = 32
block_size = 1024
batch_tokens = 524288
max_tokens = 40e9

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 715  # 375 million tokens
weight_decay = 0.1

eval_interval = 250
eval_iters = 20
log_interval = 10
save_interval = 5000

sample_prompt = "Hello, I'm a language model,"
eval_tasks = "hellaswag"
