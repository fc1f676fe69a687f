"""What schedules are made of: loop transformations, one idea a file; those of one kind of device in
a folder of their own.
"""
