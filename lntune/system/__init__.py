"""What is asked of the operating system: folders, locks, the C++ compiler, files that are written
whole or not at all, signals, child processes.
"""
