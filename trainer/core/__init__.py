"""What every other package needs: configuration, flags, errors, signals, console, environment,
wording of messages, natural order of names.

Imports: nothing of trainer/ outside this package, and no TensorFlow, so that `--help` and invalid
flags respond at once. A new option is a field in options.py. A rule between options of one group is
in its `validate`, between groups in config.py.
"""
