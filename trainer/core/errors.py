"""Exit codes, and the errors that carry them.

A `FunmatchError` is a user's mistake or a state of the world that the user can act on: the command
line prints it as one line, without a traceback, and exits with its code. Anything else that escapes is a
bug, keeps its traceback and exits with 1.
"""

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_DIVERGED = 4
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped early, the same command goes on


class FunmatchError(Exception):
    """Base of the errors shown as one line."""

    exit_code = 1


class ConfigError(FunmatchError):
    """A flag or a combination of flags that cannot be run."""

    exit_code = EXIT_CONFIG


class DataError(FunmatchError):
    """Data, a teacher, a checkpoint or a working directory that cannot be used."""

    exit_code = EXIT_DATA


class Diverged(FunmatchError):
    """A value that is not finite was met in training; the last good checkpoint is kept."""

    exit_code = EXIT_DIVERGED


class Stopped(FunmatchError):
    """The job was asked to stop, saved its state, and can go on."""

    exit_code = EXIT_STOPPED
