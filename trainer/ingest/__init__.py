"""Sources of pictures and the writer that turns them into a prepared data set (`trainer.prepare`).

Imports: core, io, data. A new source is a module NAME_source.py that returns a `Source`, and a line in trainer/prepare.py.
"""
