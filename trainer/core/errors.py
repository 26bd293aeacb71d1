"""Exit codes, and the errors that carry them.

A `FunmatchError` is a mistake or a condition that the user can act on. The command line prints it
as one line, without a traceback, and exits with its code. Any other exception is a bug, keeps its
traceback and exits with 1.
"""

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_DIVERGED = 4
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped early, the same command resumes


class FunmatchError(Exception):
    """Base of the errors shown as one line."""

    exit_code = 1


class ConfigError(FunmatchError):
    """An invalid flag or combination of flags."""

    exit_code = EXIT_CONFIG


class DataError(FunmatchError):
    """Data, a teacher, a checkpoint or a workdir that cannot be used."""

    exit_code = EXIT_DATA


class Diverged(FunmatchError):
    """Training met a value that is not finite; the last good checkpoint is kept."""

    exit_code = EXIT_DIVERGED


class Stopped(FunmatchError):
    """A signal stopped the job; the same command resumes it from its last checkpoint."""

    exit_code = EXIT_STOPPED
