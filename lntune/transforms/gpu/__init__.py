"""What GPU schedules are made of: loop transformations, one idea a file, and what follows them.

threads: a row shared among threads. columns: sums over rows. gates: rows of an LSTM's four gates.
turns: blocks that go over rows in turns. ragged: rows that do not fill their threads' turns.
phases: a row's stages access by access. functions: CUDA's own instead of polynomials. lowering: the
passes from a scheduled module to kernels.
"""
