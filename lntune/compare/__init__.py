"""Two ways to do the same side by side: schedules, settings of knobs, eager mode, runs; which is
faster, by how much, and is it certain.
"""
