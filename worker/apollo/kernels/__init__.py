"""Triton kernels of a step: formulas.py and philox.py, mirrored, over all logical matrices in a handful of launches.

    measure    pass 1 over the gradients: R, ||G||^2          common   what all of them share
    decide     between the passes: a few numbers a matrix     columns  the tables they read
    write      pass 2: the weights                            rounding random bits, and bf16

A launch covers a range of *tiles*; the tile table says which parameter a tile belongs to, the parameter table where its
weight, gradient and state are. Parameters are numbered by position, an order that launch_tables.py chooses.

Invariants: a tile's shape depends on its parameter alone, every sum runs in a fixed order and nothing is atomic, so a
result does not depend on what else is in the launch. Every element offset is 64-bit. Nothing is written to a weight or
a state when `control[BAD]` says that some gradient of this step is not finite.

Bytes moved for a bf16 matrix: 2 an element in `project_*` (the gradient), 6 in `apply` (gradient and weight in, weight
out); the rest is a few numbers a row or a column.
"""
