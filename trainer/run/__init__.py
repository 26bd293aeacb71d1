"""One training run: plan, judgement of its teachers, build, loop, checkpoints, metrics, evaluation,
accelerator.

Imports: core, io, data, models, method. What happens between two device loops belongs in loop.py.
"""
