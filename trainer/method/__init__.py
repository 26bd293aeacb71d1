"""Function matching itself (Beyer et al. 2021): views, distances, training step, optimizer, input.

Imports: core, data, models. A choice of a flag is a row of a table: `distances.DISTANCES`,
`views.VIEWS` (of crops in `crops.CROPS`), `optim.SCHEDULES`, `optim.OPTIMIZERS`; its name is also
in core/options.py. Reading order: counter_rng, crops, distances, keras_example (what `--compat`
replaces), views, optim, feed, step.
"""
