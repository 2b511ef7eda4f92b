"""What a model is worth: losses, questions, and which of two is better. For eval.py and train.py."""
