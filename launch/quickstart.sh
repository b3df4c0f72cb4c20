#!/usr/bin/env bash
# From a fresh checkout to a federation: makes .venv, installs the package, runs the built-in example on four ranks.
# Needs Python >= 3.10 with pip, no root, no GPU. Arguments go to the program. A second run installs nothing.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup mpi
# arguments change the example; a --config of one's own takes its place
case " $* " in *" --config"*) recipe=() ;; *) recipe=(--config builtin:quickstart) ;; esac
exec bash "$repository/launch/torchrun.sh" "${NPROC:-4}" "${recipe[@]}" "$@"
