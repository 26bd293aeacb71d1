"""What every other package needs: configuration, flags, errors, signals, the console, where the process runs.

Imports: nothing of trainer/ outside this package, and no TensorFlow, so that `--help` and mistakes answer at once.
A new option is a field in options.py; a new rule between options stands beside the fields that it compares.
"""
