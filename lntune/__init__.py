"""lntune: layer-normalization kernels tuned for the machine they run on, as PyTorch ops."""

__version__ = "0.1.0"
