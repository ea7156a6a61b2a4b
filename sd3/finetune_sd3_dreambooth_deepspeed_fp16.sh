#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=sd3/launch/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch/launch.sh"

LAUNCHER=finetune_sd3_dreambooth_deepspeed_fp16
SUMMARY="Full fine-tune of SD3, DeepSpeed ZeRO-2, fp16, captioned pictures."
SCRIPT=train_dreambooth_sd3
DEEPSPEED=1
CONFIG=fp16_accelerate_config.yaml
CASE=Dreambooth_DeepSpeed

use_pokemon
OPTION+=([dataset_name]=pokemon-blip-captions [batch_size]=4 [resolution]=1024 [max_train_steps]=2000 [mixed_precision]=fp16 [learning_rate]=5e-6)

launch "$@"
