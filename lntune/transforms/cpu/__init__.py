"""Loop transformations for CPUs, one idea a file.

- vectors: loops cut into whole vectors and a tail.
- row_sums: sums over a row in the lanes of vectors.
- pairs: parameters of kernels that take two bfloat16 in each lane.
- whole_groups: groups of rows that are all there, without guards.
- accumulate: sums that are added to what an output holds.
- prefetch: rows brought into the cache before they are needed.
- streaming: stores that go around the cache.
- alignment: tensors that start at any element.
- polynomials: activations, behind all else.
"""
