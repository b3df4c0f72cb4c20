#!/usr/bin/env bash
# bash launch/torchrun.sh RANKS [options of fedmpi.run]        on one machine
# NNODES=2 HEAD=host:29400 bash launch/torchrun.sh RANKS ...   the same command on every machine, RANKS per machine
# torchrun passes TERM and INT on to its ranks by itself; USR1, which schedulers send, only when told to. The ranks then finish
# and commit the round in hand, for which they get ten minutes instead of torchrun's thirty seconds.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
usable "$python" || python=python3
case ${1:-} in '' | *[!0-9]*) echo "how many ranks? bash $0 4 [options of fedmpi.run]" >&2; exit 2 ;; esac
ranks=$1
shift
where=(--standalone)
[ -z "${HEAD:-}" ] || where=(--nnodes "${NNODES:-2}" --rdzv-backend c10d --rdzv-id fedmpi --rdzv-endpoint "$HEAD")
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # torchrun sets the same and warns about it; --threads is what counts
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
exec "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$ranks" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m fedmpi.run "$@"
