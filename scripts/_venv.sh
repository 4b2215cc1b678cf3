# Sourced by the scripts beside it: a virtual environment of the repository's own, in .venv.

start_seconds=$SECONDS
trap 'echo "total: $((SECONDS - start_seconds)) s"' EXIT

fail() {
    echo "error: $*" >&2
    exit 2
}

# Prints the first Python that runs and is new enough. PYTHON=/path/to/python takes precedence.
find_python() {
    local candidate seen=""
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        seen+="$candidate: $("$candidate" --version 2>/dev/null || echo "does not run"); "
    done
    fail "Python 3.11 or newer is needed (${seen%; }); PYTHON=/path/to/python names one"
}

# ensure_venv NAME REQUIREMENT...
# Installs the requirements in .venv, one after the other. It returns at once when the same ones
# were installed (under NAME) with the same setup.cfg and pyproject.toml.
ensure_venv() {
    local name=$1 base stamp wanted requirement
    shift
    if ! .venv/bin/python -c "import pip" 2>/dev/null; then
        base=$(find_python) || exit
        "$base" -c "import venv, ensurepip" 2>/dev/null ||
            fail "$base has no venv module (on Debian and Ubuntu: apt install python3-venv)"
        echo "making .venv with $("$base" --version)"
        "$base" -m venv --clear .venv
    fi
    stamp=.venv/installed-$name
    wanted="$PWD $* $(cat setup.cfg pyproject.toml | cksum)"
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    for requirement in "$@"; do
        echo "installing ${requirement/#./dsv3-jax} (a minute or two)"
        local editable=()
        [[ $requirement == .* ]] && editable=(--editable)
        # -qq: errors only.
        .venv/bin/python -m pip install -qq --disable-pip-version-check --progress-bar off \
            ${editable[@]+"${editable[@]}"} "$requirement"
    done
    echo "$wanted" >"$stamp"
}
