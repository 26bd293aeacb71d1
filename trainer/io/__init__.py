"""Bytes outside the process: local files, gs:// buckets, downloads, archives, locks.

Imports: core. A new kind of bucket is a class in bucket.py and a row in its `_CLASSES`; what is
peculiar to TensorFlow's client of it is a module like gcs_client.py and a row in files.py.
"""
