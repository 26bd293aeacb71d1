"""Guards of what comes from Kaggle."""

from mutants import Mutant

_FILE, _TEST = "models/from_kaggle.py", "test_kaggle.py::test_"

MUTANTS = [
    Mutant(
        "private keys",
        _FILE,
        "if mode & 0o077:",
        "if mode & 0o007:",
        _TEST + "a_key_that_others_can_read_is_refused",
    ),
    Mutant(
        "a client that prints to standard output",
        _FILE,
        "with contextlib.redirect_stdout(io.StringIO()):",
        "with contextlib.nullcontext():",
        _TEST + "a_teacher_is_fetched_once_and_found_again_offline",
    ),
    Mutant(
        "the server's text is not repeated",
        _FILE,
        "    if code is not None:\n",
        '    if code is not None:\n        return f"Kaggle answers {code}: {error}"\n    if code is not None:\n',
        _TEST + "refusals_of_the_server",
    ),
    Mutant(
        "a bad archive is no start",
        _FILE,
        "shutil.rmtree(download)  # a bad archive is no start for the next try",
        "pass",
        _TEST + "hostile_archives_leave_nothing",
    ),
    Mutant(
        "what a killed process left",
        _FILE,
        'if name == "content" or name.endswith(".part"):',
        "if False:",
        _TEST + "links_and_damage_and_what_a_killed_process_left",
    ),
    Mutant(
        "the cache's files are whole",
        _FILE,
        "return all(os.path.getsize(",
        "return True or all(os.path.getsize(",
        _TEST + "links_and_damage_and_what_a_killed_process_left",
    ),
    Mutant(
        "a line that says nothing",
        _FILE,
        "if still >= _STALL_SECONDS:",
        "if still >= 12:",
        _TEST + "a_line_that_says_nothing",
    ),
    Mutant(
        "a client that ends the process",
        _FILE,
        "except SystemExit:",
        "except ZeroDivisionError:",
        _TEST + "broken_credentials",
    ),
    Mutant(
        "paths out of what came",
        _FILE,
        "inside = archives.safe_name(inside)",
        "pass",
        _TEST + "bad_addresses",
    ),
]
