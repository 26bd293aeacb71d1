"""Requests to Google Cloud Storage: conditions, retries, errors as one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from trainer.io import files


class Conflict(Exception):
    """The object is not of the generation that was demanded."""


class Unavailable(Exception):
    """The bucket does not answer, or says no."""


def request_options() -> dict[str, Any]:
    """Limits of one request: well within a lease."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return {"timeout": 10, "retry": DEFAULT_RETRY.with_timeout(20.0)}


@contextlib.contextmanager
def raise_conflicts() -> Iterator[None]:
    from google.api_core.exceptions import NotFound, PreconditionFailed

    try:
        yield
    except (NotFound, PreconditionFailed) as error:  # a bucket that is missing shows when the object is read
        raise Conflict from error


@contextlib.contextmanager
def translate_errors() -> Iterator[None]:
    from google.api_core.exceptions import GoogleAPIError, NotFound, PreconditionFailed
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    try:
        yield
    except (NotFound, PreconditionFailed):
        raise
    except (GoogleAPIError, GoogleAuthError, RequestException, OSError) as error:
        raise Unavailable(files.reason(error)) from error
