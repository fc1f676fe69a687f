"""Bundles: kernels in a folder that is taken to other machines, with the records that chose them
and the SHA-256 sum of each file.

`manifest` has what such a folder says of itself and how it is checked, `fit` which of its kernels a
device can run, `write` how it is made, `loaded` which bundles this process serves calls from.
"""
