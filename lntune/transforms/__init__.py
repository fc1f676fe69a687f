"""What schedules are made of: transformations of TVM's loops, those for CPUs and GPUs in folders of
their own.

tir: statements with a part replaced. strides: kernels for tensors with a distance between their
rows. metaschedule: the design space and the search of TVM's own tuner.
"""
