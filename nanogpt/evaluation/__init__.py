"""Evaluation of models: losses, tasks and significance tests. Used by eval.py and train.py."""
