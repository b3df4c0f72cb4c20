# Sourced by the job scripts of this folder; its arguments are the program's. Runs the program as a job step and, when Slurm's
# USR1 comes before the time is up (or before a preemption), has it commit the round in hand and puts the job back in the queue.
#
#   FEDMPI_PYTHON      the interpreter; default the repository's .venv, else python3
#   FEDMPI_LAUNCHER    srun (default): a task is a rank.  torchrun: one agent per node starts the node's ranks
#   SLURM_MPI_TYPE     srun's own variable: pmix lets the ranks talk over MPI
#
# Without --run_dir the run folder is runs/slurm-JOBID below the folder of submission, so that the job finds it again.
#
# In a job array %a stands for the task's number in every argument:  sbatch --array=0-4 slurm/fedavg.sh --seed %a  has five seeds.
# All tasks are given the same words, so a --run_dir without %a would be one folder for all: each takes the folder of its number in it.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${FEDMPI_PYTHON:-$repository/.venv/bin/python}
[ -x "$python" ] || python=python3

task=${SLURM_ARRAY_TASK_ID:-}
run_dir=runs/slurm-$SLURM_JOB_ID${task:+-$task}
previous=
for word in "$@"; do
  case $previous in --run_dir) run_dir=$word ;; esac
  case $word in --run_dir=*) run_dir=${word#*=} ;; esac
  previous=$word
done
if [ -n "$task" ]; then
  case $run_dir in *%a* | runs/slurm-"$SLURM_JOB_ID-$task") ;; *) run_dir=$run_dir/$task ;; esac
  run_dir=${run_dir//%a/$task}
  set -- "${@//%a/$task}"
fi
set -- "$@" --run_dir "$run_dir"  # the last of two counts

# The ranks stop together after a committed round, so no exit code of one of them may make Slurm kill the others.
step() {
  case ${FEDMPI_LAUNCHER:-srun} in
    srun) exec srun --kill-on-bad-exit=0 "$python" -m fedmpi.run "$@" ;;
    # An agent would die of USR1 and leave its ranks behind; told to handle it, it passes the signal on and waits for them,
    # here for ten minutes instead of thirty seconds.
    torchrun)
      export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
      exec srun --kill-on-bad-exit=0 --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        "$python" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_NTASKS_PER_NODE:-1}" \
        --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
        --rdzv-endpoint="$SLURMD_NODENAME:$((20000 + SLURM_JOB_ID % 12000))" \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m fedmpi.run "$@" ;;
    *) echo "FEDMPI_LAUNCHER=$FEDMPI_LAUNCHER: expected srun or torchrun" >&2; exit 2 ;;
  esac
}

signalled=
step "$@" &
step=$!
# srun passes USR1 on to every task of its step
trap 'signalled=1; kill -USR1 "$step"' USR1

wait "$step"; code=$?
# a trap ends the wait early: wait again until the step itself has ended
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done

state=$(sed -n 's/.*"state": *"\([a-z]*\)".*/\1/p' "$run_dir/state.json" 2>/dev/null)
echo "job $SLURM_JOB_ID: the step ended with code $code, $run_dir/state.json says ${state:-nothing}"

# Codes: 75 stopped after a committed round, 138 the signal came before the program listened. A torchrun agent hides both,
# and srun may be signalled before it has a step: then the state file decides, and only a run that has ended stays ended.
# Without a signal the program may have seen for itself that the time left was too short for another round.
again=
if [ "$code" != 0 ] && [ "$state" = preempted ] && grep -q '"time_is_up": true' "$run_dir/state.json"; then again=1; fi
if [ -n "$signalled" ] && [ "$code" != 0 ]; then
  case $code:$state in 75:* | 138:*) again=1 ;; *:finished | *:failed) ;; *) again=1 ;; esac
fi
if [ -n "$again" ]; then
  echo "job $SLURM_JOB_ID: back into the queue"
  scontrol requeue "$SLURM_JOB_ID" && sleep 120 # Slurm ends this script; leaving by itself would end the job instead
  echo "job $SLURM_JOB_ID: could not be requeued; submit it again with --run_dir $run_dir to continue" >&2
  exit 75
fi
exit "$code"
