#!/usr/bin/env bash
# The main job at tiny scale, on any machine: teach a small SD3 a new subject, and look at what it learned.
set -euo pipefail

PROJECT_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
OUTPUT="$PROJECT_DIR/build/quickstart"
MODEL="$PROJECT_DIR/sd3/tiny_world/model"
JUDGE="$PROJECT_DIR/sd3/tiny_world/judge"

usage() {
  cat <<'END'
Usage: bash sd3/quickstart.sh [--output_dir=DIR] [--main_process_port=N]

Sets the project up if that was not done. Then, on the CPU and in minutes: draws five captioned pictures of a subject,
teaches it to the tiny SD3 that comes with the project, by a full fine-tune with DeepSpeed on two processes and by a
LoRA; paints with the model before and after; evaluates the pictures; and writes one page with all of it.

  --output_dir=DIR        where everything goes (default build/quickstart); what an earlier quick start left there is
                          replaced
  --main_process_port=N   port that the two processes meet at (default: the launchers')
END
}
refuse() { echo "quickstart.sh: $1" >&2; exit 2; }

port=()

for argument in "$@"; do
  case "$argument" in
    --output_dir=?*) OUTPUT="${argument#*=}" ;;
    --main_process_port=?*) port=("$argument") ;;
    -h|--help) usage; exit 0 ;;
    *) refuse "unknown option $argument; see --help." ;;
  esac
done
OUTPUT="$(realpath -m -- "$OUTPUT")"
# Only what an earlier quick start made is ever removed.
if [ -e "$OUTPUT" ] && [ ! -d "$OUTPUT" ]; then
  refuse "--output_dir=$OUTPUT is no directory; name a new or empty one."
elif [ -d "$OUTPUT" ] && [ ! -e "$OUTPUT/.quickstart" ] && [ -n "$(ls -A "$OUTPUT")" ]; then
  refuse "--output_dir=$OUTPUT holds other files; name a new or empty directory."
fi

# shellcheck source=sd3/launch/python.sh
. "$PROJECT_DIR/sd3/launch/python.sh"
# Where set-up found no source of diffusers, the launchers have the native engine: that is no reason to run it again.
[ -n "${SD3_PYTHON:-}" ] || find_python 2>/dev/null || bash "$PROJECT_DIR/setup_env.sh"
find_python

{ mkdir -p "$OUTPUT" && exec 9>>"$OUTPUT/.quickstart"; } 2>/dev/null ||
  refuse "--output_dir=$OUTPUT cannot be written; name a directory that you may write."
flock -n 9 || [ $? -ne 1 ] || refuse "--output_dir=$OUTPUT is in use by a quick start that is still going; name another."
find "$OUTPUT" -mindepth 1 -maxdepth 1 ! -name .quickstart -exec rm -rf {} +

# Says what is done, notes the command for the page, and runs it from the project's directory.
step() {
  local what="$1"
  shift
  echo "== $what"
  printf '%q ' "$@" | sed 's/ $/\n/' >>"$OUTPUT/commands.txt"
  (cd "$PROJECT_DIR" && "$@") 9>&-
}
python_step() { step "$1" env PYTHONWARNINGS=ignore "$PYTHON" "${@:2}"; }

# A small model must learn in nearly all of a block's layers; the default, its attention, is for large ones.
LORA_LAYERS=attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,attn.add_q_proj,attn.add_k_proj,attn.add_v_proj,attn.to_add_out
LORA_LAYERS+=,ff.net.0.proj,ff.net.2,norm1.linear
settings=(--model_name="$MODEL" --dataset_name="$OUTPUT/subject/captioned" --device=cpu --resolution=64 --seed=0
  --validation_prompt="" --max_train_steps=600 --checkpointing_steps=300)
# All models read as many tokens as the two were trained with, so that only their weights differ.
paint() {
  python_step "Painting with the model $1" sd3/infer_sd3_text2img.py --prompts-file=sd3/quickstart/prompts.txt \
    --seeds 1 2 3 --height=64 --width=64 --guidance-scale=2.5 --max-sequence-length=77 --batch-size=6 \
    --device=cpu --dtype=float32 --output-dir="$OUTPUT/pictures/$1" "${@:2}"
}

python_step "Drawing the subject" -m sd3.common.synthetic_data --kind=subject --output="$OUTPUT/subject"
step "Full fine-tune, DeepSpeed ZeRO-2, two processes" bash sd3/finetune_sd3_dreambooth_deepspeed_bf16.sh \
  "${settings[@]}" "${port[@]}" --num_processors=2 --batch_size=2 --learning_rate=1e-4 --output_dir="$OUTPUT/full" \
  -- --lr_scheduler=cosine
step "LoRA fine-tune" bash sd3/finetune_sd3_dreambooth_lora_fp16.sh "${settings[@]}" --mixed_precision=no \
  --batch_size=4 --learning_rate=2.5e-4 --output_dir="$OUTPUT/lora" \
  -- --lr_scheduler=cosine --rank=32 --lora_layers="$LORA_LAYERS"
paint before --model="$MODEL"
paint full --model="$OUTPUT/full"
paint lora --model="$MODEL" --lora="$OUTPUT/lora"
python_step "Measuring" sd3/evaluate_sd3.py --pictures "$OUTPUT/pictures/before" "$OUTPUT/pictures/full" \
  "$OUTPUT/pictures/lora" --subject-dir="$OUTPUT/subject/pictures" --subject="sks star" --clip-model="$JUDGE/clip" \
  --dino-model="$JUDGE/vit" --device=cpu --output-dir="$OUTPUT/evaluation"
python_step "Writing the page" -m sd3.quickstart.page --subject-dir="$OUTPUT/subject/pictures" \
  --pictures before="$OUTPUT/pictures/before" full="$OUTPUT/pictures/full" lora="$OUTPUT/pictures/lora" \
  --run full="$OUTPUT/full" lora="$OUTPUT/lora" --evaluation="$OUTPUT/evaluation" --commands="$OUTPUT/commands.txt" \
  --output="$OUTPUT/quickstart.html"

cat <<END

== Done. Open in a browser:
   $OUTPUT/quickstart.html
END
