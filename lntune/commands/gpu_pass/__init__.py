"""A first half hour with a GPU, in three parts that end by themselves: what `tools/gpu_pass.sh`
runs.

`parts` says what is done in which order, `plan` on which sizes. The kernels of the first part are
built beforehand (`prebuild`), so that it needs neither TVM nor a compiler. `run` does the steps one
by one, each work of a step in a child process (`child`; there `perform` asks `checks`, `speed` and
`roundtrips`) or as a program of its own (`programs`); `book` keeps what came of each, and packs it
into one archive.
"""
