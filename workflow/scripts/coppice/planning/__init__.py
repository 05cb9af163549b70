"""What Snakemake needs to know before any job runs: resources, the plan, gathered inputs."""
