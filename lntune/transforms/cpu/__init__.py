"""Loop transformations for CPUs, and stores past their cache."""
