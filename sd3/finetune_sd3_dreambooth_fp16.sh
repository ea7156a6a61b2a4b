#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=sd3/launch/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch/launch.sh"

LAUNCHER=finetune_sd3_dreambooth_fp16
SUMMARY="Full fine-tune of SD3, DDP, fp16, a few pictures of one subject."
SCRIPT=train_dreambooth_sd3
DEEPSPEED=0
CONFIG=accelerate_config.yaml
CASE=Dreambooth

use_dog
OPTION+=([input_dir]=dog [batch_size]=1 [resolution]=1024 [max_train_steps]=400 [mixed_precision]=fp16 [learning_rate]=1e-6)

launch "$@"
