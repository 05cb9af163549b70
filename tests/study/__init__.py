"""Studies that tests run for real: copies of the workflow, their runs, and their results.

`checkout` runs snakemake as a user would, `running` watches a run and its jobs and kills them, and `outcome` compares
the results of two studies. The fixtures that use them are in `tests/conftest.py`.
"""
