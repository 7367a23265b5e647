"""Meta-training: collecting trials, the training loop, run folders, metrics and demonstrations."""
