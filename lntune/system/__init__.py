"""What the machine and the operating system give and take: folders, locks, compilers of C++, files
that stay whole, signals, children.
"""
