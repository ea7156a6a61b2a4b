#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=sd3/launch/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch/launch.sh"

LAUNCHER=finetune_sd3_dreambooth_lora_fp16
SUMMARY="LoRA fine-tune of SD3, DDP, fp16, a few pictures of one subject."
SCRIPT=train_dreambooth_lora_sd3
DEEPSPEED=0
CONFIG=accelerate_config.yaml
CASE=Dreambooth_LoRA

use_dog
OPTION+=([input_dir]=dog [batch_size]=8 [resolution]=512 [max_train_steps]=5000 [mixed_precision]=fp16 [learning_rate]=1e-4)

launch "$@"
