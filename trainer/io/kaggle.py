"""Files from Kaggle: brought by the `kaggle` package, unpacked by our own code, kept in the cache.

    CACHE/kaggle/NAME/download/    the archive while it comes, and what the client needs to go on with it
    CACHE/kaggle/NAME/content/     what was in it, put there whole
    CACHE/kaggle/NAME/complete.json    written last: names and bytes of all files; without it, `content` is made again

The client runs behind walls: it looks for credentials when it is imported and may end the process, prints what it sends when it is
told to be verbose, and only warns of a key that others can read. No text of ours has a key in it, nor an address with a signature.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from trainer.core.console import Console
from trainer.core.errors import ConfigError, DataError
from trainer.io import archives, files

_STALL_SECONDS = 180.0  # the client waits 32 seconds at most before it asks again
_FORMS = "kaggle:OWNER/DATASET[/VERSION][:FILE] or kaggle:OWNER/MODEL/FRAMEWORK/VARIATION[/VERSION][:FILE]"
_HOW = (
    "set KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY, or put the kaggle.json of your account's page into "
    "~/.kaggle and chmod 600 it"
)


@dataclasses.dataclass(frozen=True)
class Address:
    """What the text after `kaggle:` means.

    Attributes:
        parts: owner and dataset; or owner, model, framework and variation.
        version: "" for the newest.
        inside: a file or folder in what comes; "" to look for the only one that is a model.
    """

    parts: tuple[str, ...]
    version: str
    inside: str

    @property
    def is_model(self) -> bool:
        """One of Kaggle's models, not of its data sets."""
        return len(self.parts) == 4

    @property
    def page(self) -> str:
        """Where a person looks at it."""
        return f"https://www.kaggle.com/{'models' if self.is_model else 'datasets'}/{'/'.join(self.parts)}"


def parse(text: str, role: str) -> Address:
    """Reads what follows `kaggle:`.

    Raises:
        ConfigError: neither a data set nor a model.
    """
    name, _, inside = text.partition(":")
    parts = tuple(name.split("/"))
    version = parts[-1] if len(parts) in (3, 5) else ""
    parts = parts[:-1] if version else parts
    plain = all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", part) for part in parts)
    if len(parts) not in (2, 4) or not plain or not re.fullmatch(r"([1-9]\d*)?", version):
        raise ConfigError(f"--{role}=kaggle:{text}: it must be {_FORMS}; a version is a number")
    try:
        inside = archives.safe_name(inside)
    except ValueError as error:
        raise ConfigError(f"--{role}=kaggle:{text}: {error}") from None
    return Address(parts, version, inside)


def fetch(text: str, role: str) -> tuple[str, str]:
    """Brings what `kaggle:TEXT` means to this machine, once, and finds the model in it.

    What was fetched without a version is not asked for again: a new version at Kaggle changes nothing here.

    Returns:
        Its kind ("saved_model", "keras" or "bit") and what follows that kind's colon in a flag.

    Raises:
        ConfigError: see `parse`.
        DataError: it cannot be had, or holds no model or several; the text says what to do.
    """
    address, where = parse(text, role), f"--{role}=kaggle:{text}"
    folder = os.path.join(files.cache_folder(), "kaggle", "--".join((*address.parts, address.version or "newest")))
    content = os.path.join(folder, "content")
    with _locked(folder, where):
        if not _is_complete(folder):
            _bring(address, folder, where)
    return _find(content, address.inside, where)


@contextlib.contextmanager
def _locked(folder: str, where: str) -> Iterator[None]:
    """One process at a time; the kernel drops the lock with the process."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, "lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{where}: cannot keep it in {folder}: {files.reason(error)}; set FUNMATCH_CACHE") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_complete(folder: str) -> bool:
    try:
        with open(os.path.join(folder, "complete.json"), encoding="utf-8") as file:
            promised = json.load(file)["files"]
        return all(os.path.getsize(os.path.join(folder, "content", name)) == size for name, size in promised.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _bring(address: Address, folder: str, where: str) -> None:
    marker, content, download = (os.path.join(folder, name) for name in ("complete.json", "content", "download"))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(marker)
    for name in os.listdir(folder):  # of processes that were killed
        if name == "content" or name.endswith(".part"):
            shutil.rmtree(os.path.join(folder, name))
    archive = _download(address, download, where)
    part = f"{content}.{uuid.uuid4().hex[:8]}.part"
    try:
        found = archives.extract(archive, part, f"{where}: what came")
    except DataError:
        shutil.rmtree(download)  # a bad archive is no start for the next try
        raise
    os.replace(part, content)
    with open(archive, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    promised = {name: os.path.getsize(os.path.join(content, name)) for name in found}
    text = json.dumps({"from": address.page, "archive_sha256": digest, "files": promised}, indent=1, sort_keys=True)
    files.write(marker, text.encode(), "the cache's record of")
    shutil.rmtree(download)


def _find(content: str, inside: str, where: str) -> tuple[str, str]:
    root = os.path.join(content, *inside.split("/")) if inside else content
    if not os.path.exists(root):
        raise DataError(f"{where}: there is no {inside} in it; it holds {_listing(content)}")
    found: list[tuple[str, str]] = []
    for folder, folders, names in os.walk(root):
        if "saved_model.pb" in names:
            found.append(("saved_model", folder))
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if name != "__MACOSX")
        found += [_kind(os.path.join(folder, name)) for name in sorted(names) if name.endswith((".keras", ".npz"))]
    if os.path.isfile(root) and root.endswith((".keras", ".npz")):
        found = [_kind(root)]
    if not found:
        held = _listing(root if os.path.isdir(root) else content)
        raise DataError(f"{where}: no model is in it (a SavedModel, .keras or .npz); it holds {held}")
    if len(found) > 1:
        names = [os.path.relpath(path.removeprefix("@"), content) for _, path in found]
        raise DataError(
            f"{where}: several models are in it; add one of them, as in :{names[0]} (or {', '.join(names[1:6])})"
        )
    return found[0]


def _kind(path: str) -> tuple[str, str]:
    return ("keras", path) if path.endswith(".keras") else ("bit", f"@{path}")


def _listing(root: str) -> str:
    names = sorted(os.path.relpath(os.path.join(f, name), root) for f, _, names in os.walk(root) for name in names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} files more" if len(names) > 5 else "")


@dataclasses.dataclass(frozen=True)
class Credentials:
    """What the client is given.

    Attributes:
        source: where they were found; "" for none, which public data sets need none of.
        variables: of the environment, while the client authenticates.
    """

    source: str
    variables: dict[str, str]

    def __repr__(self) -> str:
        return f"Credentials({self.source!r})"


def credentials(where: str) -> Credentials:
    """Finds them in the order in which the client prefers them: a token, a user's key, a login of `kaggle auth login`.

    Raises:
        DataError: half of them, a damaged kaggle.json, or a file that others can read.
    """
    environment = os.environ
    home = os.path.expanduser("~")
    if token := environment.get("KAGGLE_API_TOKEN"):
        if os.path.exists(token):
            _require_private(token, where)
        return Credentials("KAGGLE_API_TOKEN", {})
    for name in ("access_token", "access_token.txt"):
        if os.path.exists(path := os.path.join(home, ".kaggle", name)):
            _require_private(path, where)
            return Credentials(path, {})
    user, key = environment.get("KAGGLE_USERNAME"), environment.get("KAGGLE_KEY")
    if user and key:
        return Credentials("KAGGLE_USERNAME and KAGGLE_KEY", {})
    if user or key:
        given, missing = ("KAGGLE_USERNAME", "KAGGLE_KEY") if user else ("KAGGLE_KEY", "KAGGLE_USERNAME")
        raise DataError(f"{where}: {given} is set and {missing} is not: set both, or neither")
    config = environment.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    folders = [environment.get("KAGGLE_CONFIG_DIR"), os.path.join(home, ".kaggle"), os.path.join(config, "kaggle")]
    for folder in folders:
        if folder and os.path.exists(path := os.path.join(folder, "kaggle.json")):
            _require_private(path, where)
            try:
                with open(path, encoding="utf-8") as file:
                    values = json.load(file)
                return Credentials(path, {"KAGGLE_USERNAME": str(values["username"]), "KAGGLE_KEY": str(values["key"])})
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{where}: {path} does not hold a username and a key ({type(error).__name__}): "
                    "make a new one on your account's page"
                ) from None
    if os.path.exists(path := os.path.join(home, ".kaggle", "credentials.json")):
        _require_private(path, where)
        return Credentials(path, {})
    return Credentials("", {})


def _require_private(path: str, where: str) -> None:
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        raise DataError(f"{where}: {path} can be read or changed by others (mode {mode:04o}): chmod 600 {path}")


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Variables of the environment for a while."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _client(found: Credentials, folder: str) -> Any:
    """An authenticated client. Credentials come by the environment alone; its own look at files is led to an empty folder."""
    quiet = {"KAGGLE_CONFIG_DIR": folder, "VERBOSE": "", "VERBOSE_OUTPUT": ""}
    with _environment(quiet | found.variables):
        from kaggle.api.kaggle_api_extended import KaggleApi

        api = KaggleApi()
        api.args = [flag for flag in api.args if flag not in ("--verbose", "-v")]  # which prints all headers
        api.config_values = {}
        if found.source:
            api.authenticate()
    return api


def _download(address: Address, folder: str, where: str) -> str:
    """The archive's path in `folder`. Goes on with what an earlier process left there, if it is of the same archive."""
    found = credentials(where)
    os.makedirs(folder, exist_ok=True)
    told = ""
    target = os.path.join(folder, address.parts[1] + (".tar.gz" if address.is_model else ".zip"))
    try:
        # The client prints to standard output, which is not its own.
        with contextlib.redirect_stdout(io.StringIO()):
            api = _client(found, folder)
            name = "/".join(address.parts)
            if address.is_model:
                version = address.version or str(api.model_instance_get(name).version_number)
                ask = lambda: api.model_instance_version_download(f"{name}/{version}", path=folder, quiet=True)  # noqa: E731
            else:
                name = f"{name}/{address.version}" if address.version else name
                ask = lambda: api.dataset_download_files(name, path=folder, quiet=True)  # noqa: E731
            _watch(ask, target, where)
    except DataError:
        raise
    except ImportError as error:
        told = f"the package kaggle is missing ({error}): pip install kaggle"
    except SystemExit:  # its way to say that it has no valid credentials
        told = f"Kaggle does not accept the credentials of {found.source}: {_HOW}"
    except Exception as error:
        told = _reason(error, address, found)
    if told:  # raised here, so that no traceback can show what the client's own error has in it
        raise DataError(f"{where}: {told}")
    if not os.path.isfile(target):
        raise DataError(f"{where}: Kaggle's client ended without {os.path.basename(target)}")
    return target


def _watch(ask: Callable[[], Any], target: str, where: str) -> None:
    """Runs `ask` in a thread, so that a line that says nothing for ever does not hold the job for ever."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            ask()
        except BaseException as error:
            failed.append(error)

    console = Console()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    before, still = -1, 0.0
    while thread.is_alive():
        thread.join(0.25)
        size = os.path.getsize(target) if os.path.exists(target) else 0
        still = 0.0 if size != before else still + 0.25
        before = size
        if total := _promised(target):
            console.progress(
                "download, MB", size >> 20, max(total >> 20, 1), "" if still < 5 else f"quiet for {still:.0f} s"
            )
        if still >= _STALL_SECONDS:
            console.close()
            raise DataError(
                f"{where}: nothing has come for {_STALL_SECONDS:.0f} s after {size:,} bytes; the same command goes on from there"
            )
    console.close()
    if failed:
        raise failed[0]


def _promised(target: str) -> int:
    """Bytes of the whole archive, from the client's note beside a partial one; 0: not known."""
    try:
        with open(f"{target}.kaggle-partial", encoding="utf-8") as file:
            return int(json.load(file)["size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _reason(error: Exception, address: Address, found: Credentials) -> str:
    """What went wrong and what to do, without what an address or a header may have of secrets."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    kind = "model" if address.is_model else "data set"
    if code == 401 and found.source:
        return f"Kaggle does not accept the credentials of {found.source} (401): {_HOW}"
    if code in (401, 403) and not found.source:
        return f"Kaggle gives {address.page} only to those it knows ({code}): {_HOW}"
    if code == 403:
        return f"your account may not have {address.page} (403): if it is yours to have, open the page once and accept its terms"
    if code == 404:
        version = f" in version {address.version}" if address.version else ""
        return f"there is no {kind} {'/'.join(address.parts)}{version} at Kaggle (404), or it is another's and private"
    if code is not None:
        return f"Kaggle answers {code}: try again later"
    return f"cannot be had from Kaggle ({type(error).__name__}); what has come is kept, and the same command goes on from there"
