"""What all other layers use: errors, records, fingerprints, disks, locks, logs, jobs, GPUs and secrets."""
