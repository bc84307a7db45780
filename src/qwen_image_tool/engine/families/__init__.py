"""What differs between the model families, and nothing else."""
