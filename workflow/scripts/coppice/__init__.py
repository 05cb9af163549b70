"""Coppice: which pruned checkpoint is worth recovering, and how much comes back.

Three storeys, imports only go down (DESIGN in the README's file tree):
stages (pruning, selection, finetuning, evaluation, comparison, reporting),
material (models, data, miniature, statistics) and foundation (settings, records, fingerprints, logs).
"""

__version__ = "0.1.0"
