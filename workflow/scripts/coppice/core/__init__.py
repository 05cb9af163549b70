"""What all other storeys use: errors, records, fingerprints, disks, locks, logs, jobs, GPUs and secrets."""
