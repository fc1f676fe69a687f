"""GPUs that are not here: their CUDA source runs on the CPU, thread by thread, and every access is
checked.
"""
