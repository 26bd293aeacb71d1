"""Reads a prepared data set: index, TFRecords, cache of shards, decoded images, sampling order.

Imports: core, io. A new way to keep images is a subclass of `ImageStore` in store.py and a row in
memory.py.
"""
