#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=sd3/launch/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch/launch.sh"

LAUNCHER=finetune_sd3_dreambooth_deepspeed_bf16
SUMMARY="Full fine-tune of SD3, DeepSpeed ZeRO-2, bf16, captioned pictures."
SCRIPT=train_dreambooth_sd3
DEEPSPEED=1
CONFIG=bf16_accelerate_config.yaml
CASE=Dreambooth_DeepSpeed

use_pokemon
OPTION+=([dataset_name]=pokemon-blip-captions [batch_size]=4 [resolution]=1024 [max_train_steps]=2000 [mixed_precision]=bf16 [learning_rate]=5e-6)

launch "$@"
