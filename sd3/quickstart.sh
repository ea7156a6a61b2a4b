#!/usr/bin/env bash
# The main job at tiny scale, on any machine: set-up, two fine-tunes on the CPU, a resume, reports and pictures.
set -euo pipefail

PROJECT_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
OUTPUT="$PROJECT_DIR/build/quickstart"

usage() {
  cat <<'END'
Usage: bash sd3/quickstart.sh [--output_dir=DIR]

Sets the project up if that was not done, makes a tiny SD3 with random weights and two small data sets, and runs on the
CPU, in minutes: a full fine-tune with DeepSpeed on two processes, with validations and checkpoints; its resume; a LoRA
fine-tune; the reports. It shows that all parts work. Random weights paint noise, before and after.

  --output_dir=DIR   where everything goes (default build/quickstart; what an earlier quick start left there is replaced)
END
}

for argument in "$@"; do
  case "$argument" in
    --output_dir=?*) OUTPUT="${argument#*=}" ;;
    -h|--help) usage; exit 0 ;;
    *) echo "quickstart.sh: unknown option $argument; see --help." >&2; exit 2 ;;
  esac
done
case "$OUTPUT" in /*) ;; *) OUTPUT="$PWD/$OUTPUT" ;; esac
# Only what an earlier quick start made is ever removed.
if [ -d "$OUTPUT" ] && [ ! -e "$OUTPUT/.quickstart" ] && [ -n "$(ls -A "$OUTPUT")" ]; then
  echo "quickstart.sh: --output_dir=$OUTPUT holds other files; name a new or empty directory." >&2
  exit 2
fi

# shellcheck source=sd3/launch/python.sh
. "$PROJECT_DIR/sd3/launch/python.sh"
# Where set-up found no source of diffusers, the launchers have the native engine: that is no reason to run it again.
find_python 2>/dev/null || bash "$PROJECT_DIR/setup_env.sh" --device=cpu
find_python

rm -rf "$OUTPUT"
mkdir -p "$OUTPUT"
touch "$OUTPUT/.quickstart"
make_one() { PYTHONPATH="$PROJECT_DIR" PYTHONWARNINGS=ignore "$PYTHON" -m "sd3.common.$1" --output "$OUTPUT/$2" "${@:3}"; }
echo "== Making a tiny SD3 and two data sets in $OUTPUT"
make_one tiny_sd3 model
make_one synthetic_data dog --kind=dog
make_one synthetic_data creatures --kind=pokemon

tiny=(--model_name="$OUTPUT/model" --device=cpu --resolution=64 --mixed_precision=bf16 --seed=0)
full() {
  bash "$PROJECT_DIR/sd3/finetune_sd3_dreambooth_deepspeed_bf16.sh" "${tiny[@]}" --dataset_name="$OUTPUT/creatures" \
    --num_processors=2 --batch_size=1 --checkpointing_steps=6 --validation_prompt="a small red creature" \
    --output_dir="$OUTPUT/full" "$@" -- --num_validation_images=2 --validation_epochs=2
}
echo "== Full fine-tune, DeepSpeed ZeRO-2, two processes, to step 12"
full --max_train_steps=12
echo "== The same run, resumed to step 20"
full --max_train_steps=20 --resume
echo "== LoRA fine-tune"
bash "$PROJECT_DIR/sd3/finetune_sd3_dreambooth_lora_fp16.sh" "${tiny[@]}" --input_dir="$OUTPUT/dog" --batch_size=2 \
  --max_train_steps=12 --checkpointing_steps=6 --output_dir="$OUTPUT/lora" -- --num_validation_images=2

cat <<END

== Done. Look at:
   $OUTPUT/full/report.png   loss and images a second of the full fine-tune, over both of its sessions
   $OUTPUT/lora/report.png   the same of the LoRA fine-tune
END
for picture in "$OUTPUT"/full/validation-*.png "$OUTPUT"/lora/validation-*.png; do
  [ ! -e "$picture" ] || printf '   %s\n' "$picture"
done
