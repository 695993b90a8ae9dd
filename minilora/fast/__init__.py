"""What changes only time and memory; without it the results are the same."""
