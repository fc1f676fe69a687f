"""From an operator, a schedule and knobs to a kernel: compiled, kept on disk, called."""
