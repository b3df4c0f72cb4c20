#!/usr/bin/env bash
# bash launch/mpirun.sh RANKS [options of fedmpi.run]      Open MPI or MPICH, whichever mpirun comes first
# MPIRUN names another mpirun, MPIRUN_OPTIONS goes to it (MPIRUN_OPTIONS="--hostfile hosts").
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
usable "$python" || python=python3
case ${1:-} in '' | *[!0-9]*) echo "how many ranks? bash $0 4 [options of fedmpi.run]" >&2; exit 2 ;; esac
ranks=$1
shift
mpirun=${MPIRUN:-$venv/bin/mpirun}
[ -x "$mpirun" ] || mpirun=mpirun
command -v "$mpirun" >/dev/null || { echo "no mpirun: pip install 'fedmpi[mpi]', or name one with MPIRUN=" >&2; exit 1; }
# The rest is for Open MPI, in the words of version 4 and of version 5; MPICH reads none of it.
# It refuses to run as root, which a container always is:
if [ "$(id -u)" = 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
# it refuses more ranks than cores, although a server mostly waits:
export OMPI_MCA_rmaps_base_oversubscribe="${OMPI_MCA_rmaps_base_oversubscribe:-1}"
export PRTE_MCA_rmaps_default_mapping_policy="${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}"
# and it ties a rank to one core, although a rank has threads:
export OMPI_MCA_hwloc_base_binding_policy="${OMPI_MCA_hwloc_base_binding_policy:-none}"
export PRTE_MCA_hwloc_default_binding_policy="${PRTE_MCA_hwloc_default_binding_policy:-none}"
# shellcheck disable=SC2086  # options are words
exec "$mpirun" -n "$ranks" ${MPIRUN_OPTIONS:-} "$python" -m fedmpi.run "$@"
