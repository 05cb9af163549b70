"""Compare: dense, pruned and fine-tuned model side by side, with paired statistics, as a record and as text."""
