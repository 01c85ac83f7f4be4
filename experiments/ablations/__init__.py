"""Ablations that others can repeat: a grid of choices becomes a table, byte for byte the same.

An ablation is a value (`definition`): a base config and axes over its fields. Its rows fall into
groups, which are what is trained, stored, sharded and verified as a whole. A group holds all
seeds and all axes that change numbers only, trained under one `jax.vmap` (`training`); axes that
say how to sample reuse what was trained (`judging`). Each group becomes one file (`store`), from
which tables, comparisons and figures are assembled in the order of the definition (`report`).
"""
