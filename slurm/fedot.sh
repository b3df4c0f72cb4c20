#!/bin/bash
#SBATCH --job-name=fedot
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# FedOT on a Slurm cluster: rank 0 has the model, the others receive an emulator of it:
#     sbatch slurm/fedot.sh --config launch/recipes/fedot-gsm8k.yaml --model.path MODEL --rounds 20
# Options of sbatch go before the script's name, options of the program after it. What happens on the way is in job.sh.
# Slurm runs a copy of this file, so the folder that job.sh lies in comes from the job's own record.
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')
. "$(dirname "$script")/job.sh" --algorithm fedot "$@"
