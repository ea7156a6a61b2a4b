#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=sd3/launch/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch/launch.sh"

LAUNCHER=finetune_sd3_dreambooth_lora_deepspeed_fp16
SUMMARY="LoRA fine-tune of SD3.5 large, DeepSpeed ZeRO-2, fp16, captioned pictures."
SCRIPT=train_dreambooth_lora_sd3
DEEPSPEED=1
CONFIG=fp16_accelerate_config.yaml
CASE=Dreambooth_LoRA_DeepSpeed

use_pokemon
OPTION+=([dataset_name]=pokemon-blip-captions [preset]=sd3.5-large [batch_size]=8 [resolution]=512 [max_train_steps]=2000 [mixed_precision]=fp16 [learning_rate]=1e-4)

launch "$@"
