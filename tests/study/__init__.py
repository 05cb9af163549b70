"""Studies that tests run for real: copies of the workflow, runs in them, and what came out.

`checkout` runs snakemake as a user would, `running` watches a run and its jobs and kills them, `outcome` compares what
two studies found. The fixtures that hand them out are in `tests/conftest.py`.
"""
