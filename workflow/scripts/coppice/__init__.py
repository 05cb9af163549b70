"""Coppice: find out which pruned checkpoint is worth fine-tuning, and how much quality that recovers.

This package holds all logic of the workflow. Its folders are twelve layers, listed here from the bottom up. A module
imports only from its own layer and from those listed before it:

- core: errors, records, fingerprints, disks, locks, logs, jobs, GPUs, secrets
- stats: statistics of paired comparisons, and the stored samples they use
- models: loading, saving, running and sizing models
- study: a study's settings and the places of its files
- render: formats of numbers, figures and pages
- data: data sets, prompts and task definitions
- miniature: the generated data sets and tiny models of the miniature study
- stages: prune, select, recover, evaluate, compare; each stage writes records
- report: the study report, and the tracing of a number to its records
- ablation: arms that train one checkpoint at an equal budget, and their report
- planning: what Snakemake needs to know before any job runs
- cli: the command `coppice`
"""

__version__ = "0.1.0"
