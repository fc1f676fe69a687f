"""TVM's own tuner, MetaSchedule: its design space for an operator, replayed by lntune, and its
search, told what lntune measures.

- decisions: a kernel of the space as a short text, which is data.
- space: the sketches of an operator's definition, and the kernel that a text stands for.
- proposals: the evolutionary search, which proposes kernels and is told their times.
"""
