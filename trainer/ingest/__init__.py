"""Sources of images and the writer that turns them into a prepared data set (`trainer.prepare`).

Imports: core, io, data. A new source is a module NAME_source.py with a function that returns a
`Source` (sources.py), and a row of `SOURCES` in trainer/prepare.py.
"""
