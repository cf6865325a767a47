#!/bin/bash
# sbatch scripts/sweep.sh mask=block,random lr=1e-4,3e-4 name=masks hydra.launcher.partition=gpu
#
# A sweep on a Slurm cluster, a job for each member.  `jepa-train --multirun hydra/launcher=slurm` does that too, but must
# stay until all have ended, which few login nodes allow: here it waits in a small job of its own, without a GPU, and
# writes the table into sweep-JOB.out.  No job array: its members could not be derived from a grid of several keys without
# a second place that knows how grids are made, and nobody would be there to make the table or to ask a sampler what next.
# Give it more time than all members together need; scancel ends it with its members, and the same line goes on.
#SBATCH --job-name=jepa-sweep
#SBATCH --ntasks=1 --cpus-per-task=1 --mem=4G --time=7-0
#SBATCH --output=sweep-%j.out --open-mode=append --signal=TERM@60
# Members are jobs of their own, and are not to take this one's sizes for theirs.
unset $(compgen -v SLURM_ | grep -v SLURM_CONF)
exec jepa-train --multirun hydra/launcher=slurm "$@"
