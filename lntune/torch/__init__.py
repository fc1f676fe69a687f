"""The operators as PyTorch functions and modules."""
