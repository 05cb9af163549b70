"""What everything rests on: errors, records, fingerprints, disks, locks, logs, jobs, GPUs, secrets. Knows no study."""
