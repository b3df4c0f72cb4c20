#!/usr/bin/env bash
# Everything that a change can break, in under 25 minutes on two cores:  bash launch/test.sh [--all] [options of pytest]
# --all adds the long tier. What this machine cannot test is listed at the start, and again as skips with their reasons.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$repository"

tier="not slow"
if [ "${1:-}" = --all ]; then tier=""; shift; fi

left_out=()
setup mpi dev deepspeed quant

# Slurm's daemons and the library behind srun --mpi=pmix (its plugin asks for libpmix.so, which the -dev package has); the tests
# start them with a configuration of their own.
packages=(munge slurmctld slurmd slurm-client libpmix-dev iproute2 util-linux)
# The long tier compiles HumanEval-X as well; the headers of C++ take half a gigabyte.
if [ -z "$tier" ]; then packages+=(g++ libboost-dev libssl-dev golang-go golang-github-stretchr-testify-dev); fi
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing ${missing[*]}"
    # Debian starts a daemon on installation unless this file forbids it
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
      printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy
      trap 'rm -f '$policy EXIT
    fi
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
      >"$venv/apt.log" 2>&1 || left_out+=("Slurm or compilers: apt-get could not install ${missing[*]}, see $venv/apt.log")
  else
    left_out+=("Slurm or compilers: needs root and apt to install ${missing[*]}")
  fi
fi

# Two MPI wheels in one environment overwrite each other's mpirun: MPICH gets its own, which sees the other's packages.
mpich=$venv-mpich
if [ ! -x "$mpich/bin/mpirun" ]; then
  echo "installing MPICH into $mpich"
  "$python" -m venv --clear --without-pip "$mpich"
  "$python" -m pip --python "$mpich/bin/python" install --quiet --disable-pip-version-check \
    --constraint constraints.txt mpich mpi4py || { left_out+=("MPICH: could not be installed"); rm -rf "$mpich"; }
fi
if [ -x "$mpich/bin/python" ]; then
  "$python" -c 'import sysconfig; p = sysconfig.get_path("purelib"); print(f"import site; site.addsitedir({p!r})")' \
    >"$("$mpich/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_venv.pth"
fi

command -v nvidia-smi >/dev/null || left_out+=("GPU: no NVIDIA GPU on this machine")
for what in "${left_out[@]}"; do echo "left out: $what"; done

export OMP_NUM_THREADS=1 FEDMPI_TEST_MPICH="$mpich"
"$venv/bin/ruff" check
"$venv/bin/ruff" format --check
"$venv/bin/mypy"
# Two processes for the tests that compute in their own; the launch tests start ranks themselves and have the machine alone.
"$venv/bin/pytest" -q -m "$tier" --ignore tests/launch -n 2 --dist loadfile "$@"
"$venv/bin/pytest" -q -m "$tier" tests/launch "$@"
