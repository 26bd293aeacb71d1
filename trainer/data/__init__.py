"""A prepared data set and its way into memory: index, TFRecords, cache of shards, decoded images, order of examples.

Imports: core, io. A new way to keep images is a subclass of `ImageStore` in store.py and a row in memory.py.
"""
