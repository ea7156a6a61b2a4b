#!/usr/bin/env bash
# Several machines under Slurm: one launcher on each, all with the same command. Submit it from the project's directory:
#
#   sbatch --nodes=2 --gres=npu:8 sd3/slurm_example.sh --model_name=DIR --dataset_name=DIR --output_dir=SHARED_DIR
#
#SBATCH --job-name=sd3-dreambooth
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
# Two minutes before the end of its time every process of the job is sent SIGTERM. The native engine then ends its step and
# writes a checkpoint; SD3_STOP_GRACE (60 s) is to be less than what is left.
#SBATCH --signal=TERM@120
set -euo pipefail

: "${SLURM_JOB_NODELIST:?run this under Slurm: sbatch sd3/slurm_example.sh ...}"
LAUNCHER="${LAUNCHER:-sd3/finetune_sd3_dreambooth_deepspeed_bf16.sh}"
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"

# srun gives each task its number: the machine's rank. exec lets Slurm's signals reach the launcher.
# shellcheck disable=SC2016  # expanded on each machine
exec srun bash -c 'launcher="$1" first="$2"; shift 2
  exec bash "$launcher" --num_machines="$SLURM_NNODES" --machine_rank="$SLURM_NODEID" --main_process_ip="$first" "$@"' \
  bash "$LAUNCHER" "$first" "$@"
