"""Bytes outside the process: local files, gs:// buckets, downloads, archives, locks.

Imports: core. A new kind of storage is a class in bucket.py or destination.py, chosen by its scheme in one function.
"""
