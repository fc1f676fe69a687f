"""Loop transformations for GPUs, one idea a file.

- threads: a row shared among the threads of a block; loads, stores and row sums of it.
- columns: sums over the rows of a matrix, first in each block of threads, then over all blocks.
- gates, gate_threads: rows of an LSTM's four gates, and how their elements are shared among
  threads.
- grid_stride: blocks of threads that loop over the rows with the grid's size as the step.
- guards: bounds checks only where they matter, for rows that do not fill all threads.
- phases: a row's stages fused into one loop over vectors, between one sum and the next.
- thread_private: shared memory that serves each thread as more registers.
- reload: an argument loaded again instead of kept in registers.
- launch_bounds: fewer registers for a thread, so that more blocks fit a multiprocessor.
- cache_hints: loads and stores that the cache need not keep.
- cuda_math: CUDA's own functions for activations.
"""
