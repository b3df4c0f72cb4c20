# Sourced by the scripts of this folder: where the repository is, which Python to use, and how .venv comes to be.
# Nothing here needs root. pip's own settings (index, cache, certificates) are honoured because pip reads them itself.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$repository/.venv}
python=$venv/bin/python
cpu_wheels=https://download.pytorch.org/whl/cpu

# setup EXTRA...: an environment with the package and these extras; does nothing for what was installed before.
setup() {
  local wanted extra missing=
  # what decides on an installation: the project's tables, not the settings of ruff and others, and the pins
  wanted=$(sed -n '/^\[build/,/^\[tool\.ruff/p' "$repository/pyproject.toml" | cat - "$repository/constraints.txt" | cksum)
  wanted+=" $repository"
  usable "$python" || make_venv "$venv"
  for extra in "$@"; do
    [ "$(cat "$venv/.fedmpi-$extra" 2>/dev/null)" = "$wanted" ] || missing+=",$extra"
  done
  [ -n "$missing" ] || return 0
  echo "installing fedmpi[${missing#,}] into $venv: a minute or two with a good connection, and only this once"
  have torch || { echo "  torch (the largest part)"; pip_install $(cpu_only_index) torch; }
  echo "  fedmpi and what it needs: transformers, peft and others"
  pip_install --editable "$repository[${missing#,}]"
  for extra in "$@"; do echo "$wanted" >"$venv/.fedmpi-$extra"; done
  echo "installed"
}

usable() {
  [ -x "$1" ] || command -v "$1" >/dev/null || return 1
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

make_venv() {
  local maker
  for maker in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11 python3.10 none; do
    usable "$maker" && break
  done
  if [ "$maker" = none ]; then
    echo "no Python >= 3.10 found: install one, or name it with PYTHON=/path/to/python bash $0" >&2
    exit 1
  fi
  # Debian splits ensurepip off: without it, the maker's own pip puts a pip into the environment.
  "$maker" -m venv --clear "$1" >/dev/null 2>&1 ||
    { "$maker" -m venv --clear --without-pip "$1" && "$maker" -m pip --python "$1/bin/python" install --quiet pip; } ||
    { echo "$maker could make no environment in $1: it needs its venv module and pip" >&2; exit 1; }
}

have() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# The pinned versions have no releases for Python 3.10, which takes the newest that it can have. On a terminal pip shows what it
# downloads, a log stays short.
pip_install() {
  local options=(--disable-pip-version-check)
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then options+=(--constraint "$repository/constraints.txt"); fi
  [ -t 1 ] || options+=(--quiet)
  "$python" -m pip install "${options[@]}" "$@"
}

# Without an NVIDIA GPU the CUDA build would be gigabytes for nothing: offer pip the CPU builds, if they can be reached.
cpu_only_index() {
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then return; fi
  "$python" -c "import urllib.request; urllib.request.urlopen('$cpu_wheels/torch/', timeout=5)" 2>/dev/null &&
    echo "--extra-index-url $cpu_wheels" ||
    echo "  $cpu_wheels cannot be reached: pip's index decides which build it is; one with CUDA takes 5 GB" >&2
}
