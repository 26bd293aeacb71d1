# Sourced by the scripts beside it: finds a Python for them. The project's own environment comes
# first, because only with its packages are the values of the trainer's flags checked, not only
# their names.
# shellcheck shell=bash
python=
for candidate in "${PYTHON:-}" "${root:?}/.venv/bin/python" python3 python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: needs Python 3.9 or newer; none of .venv/bin/python, python3 and python is one" >&2
    exit 2
fi
