"""Function matching itself (Beyer et al. 2021): views, distances, the training step, the optimizer, its input.

Imports: core, data, models. A new distance, view, schedule or optimizer is a row of the table in its module.
"""
