"""Reports and comparisons as one HTML page each, which needs no network and opens from a disk:
facts are gathered (facts, trials), laid out (charts) and written (write, templates/).
"""
