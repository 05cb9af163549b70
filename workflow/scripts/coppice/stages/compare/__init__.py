"""Compare the dense, pruned and fine-tuned model with paired statistics, in a record and in a text report."""
