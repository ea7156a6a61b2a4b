# shellcheck shell=bash
# The one place that runs accelerate. A launcher sets LAUNCHER, SUMMARY, SCRIPT, DEEPSPEED, its options and calls launch.

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
SD3_DIR="$(dirname "$HERE")"
# shellcheck source=sd3/launch/python.sh
. "$HERE/python.sh"
# shellcheck source=sd3/launch/options.sh
. "$HERE/options.sh"
# shellcheck source=sd3/launch/cann.sh
. "$HERE/cann.sh"
# shellcheck source=sd3/launch/ascend_env.sh
. "$HERE/ascend_env.sh"

OPTION=(
  [preset]=sd3 [instance_prompt]="" [validation_prompt]="" [caption_column]="" [input_dir]="" [dataset_name]="" [dataset_split]=""
  [num_processors]="" [gradient_accumulation_steps]=1 [checkpointing_steps]=500 [dataloader_num_workers]=0 [resume]=""
  [output_dir]="" [config_file]="" [deepspeed_config]="" [num_machines]=1 [machine_rank]=0 [main_process_ip]=127.0.0.1
  [main_process_port]=29500 [device]=auto [engine]=auto [seed]=""
)

# Runs a module of this project, whatever directory it is started from: with -m Python would look there first, and in
# another copy of the project find that one's.
RUN_MODULE='
import runpy, sys
sys.path = [path for path in sys.path if path]
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)'
project_module() { PYTHONPATH="$PROJECT_DIR${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -c "$RUN_MODULE" "$@"; }

# The engine whose checkpoints a resumed run holds: the native one's have a manifest; else what the settings say.
engine_of_run() {
  local checkpoint="${OPTION[resume]}"
  [ "$checkpoint" != latest ] || checkpoint='checkpoint-*'
  if [ -n "$(find "$RUN_DIR" -mindepth 2 -maxdepth 2 -path "*/$checkpoint/manifest.json" 2>/dev/null)" ]; then
    echo native
  elif [ -r "$RUN_DIR/run_settings.json" ]; then
    sed -n 's/^ *"engine": "\([a-z]*\)",*$/\1/p' "$RUN_DIR/run_settings.json"
  fi
}

# ENGINE, TRAIN_SCRIPT and VARIANT, that the patched scripts have to be given; the first line of output: which, and why.
choose_engine() {
  local reason="asked for" wrong began="" status=0
  VARIANT=""
  ENGINE="${OPTION[engine]}"
  # A checkpoint is its engine's own: neither an option nor a set-up that found or lost the source may change it.
  [ -z "${OPTION[resume]}" ] || began="$(engine_of_run)"
  if [ -n "$began" ] && [ "$ENGINE" = auto ]; then
    ENGINE="$began" reason="it began the run"
  elif [ -n "$began" ] && [ "$ENGINE" != "$began" ]; then
    fail "--engine=$ENGINE cannot go on with the checkpoints of $RUN_DIR, which are of --engine=$began; leave the option out."
  fi
  if [ "${ENGINE:=auto}" != native ]; then
    if wrong="$(. "$PROJECT_DIR/patches/lib.sh" && queue_source_ok "$PROJECT_DIR/build/diffusers" 2>&1)"; then
      [ "$ENGINE" = diffusers ] || reason="the patched checkout in build/diffusers is as it should be"
      ENGINE=diffusers
    else
      wrong="${wrong//patches: /}"
      wrong="the patched scripts cannot be used: ${wrong//$'\n'/ }"
      [ "$ENGINE" = auto ] || fail "$wrong Run: bash $PROJECT_DIR/setup_env.sh" 3
      ENGINE=native reason="${wrong%.}"
    fi
  fi
  if [ "$ENGINE" = diffusers ]; then
    VARIANT="$(project_module sd3.launch.script_models "$SCRIPT" "${OPTION[model_name]}" "${PASSED_ON[@]}")" || status=$?
    case $status in
      0) ;;
      1) wrong="the patched scripts cannot load this model: $VARIANT" VARIANT=""
         [ "${OPTION[engine]}$began" = auto ] ||
           fail "--model_name=${OPTION[model_name]}: $wrong; give --engine=native."
         ENGINE=native reason="$wrong" ;;
      *) exit "$status" ;;
    esac
  fi
  TRAIN_SCRIPT="$SD3_DIR/native/$SCRIPT.py"
  [ "$ENGINE" = native ] || TRAIN_SCRIPT="$PROJECT_DIR/build/diffusers/examples/dreambooth/$SCRIPT.py"
  echo "engine: $ENGINE ($reason)"
  [ -z "$VARIANT" ] || echo "weights: the $VARIANT files (--variant=$VARIANT)"
}

# Where to train, and how many processes: DEVICE, OPTION[num_processors].
choose_device() {
  local found visible
  if [ "${OPTION[device]}" = npu ] || { [ "${OPTION[device]}" = auto ] && npu_device_there; }; then
    source_cann || exit 3
  fi
  found="$(project_module sd3.common.devices --device="${OPTION[device]}")" || exit $?
  found="$(tail -n 1 <<<"$found")"
  DEVICE="${found% *}"
  visible="${found#* }"
  [ "$DEVICE" != cpu ] || [ "${OPTION[mixed_precision]}" != fp16 ] ||
    fail "--mixed_precision=fp16 cannot run on a CPU; use --mixed_precision=bf16 or --mixed_precision=no."
  if [ -z "${OPTION[num_processors]}" ]; then
    OPTION[num_processors]=$((visible < 8 ? visible : 8))
    [ "$visible" -ge 8 ] || echo "processes: ${OPTION[num_processors]} (visible $DEVICE devices: $visible)"
  elif [ "$DEVICE" != cpu ] && [ "${OPTION[num_processors]}" -gt "$visible" ]; then
    fail "--num_processors=${OPTION[num_processors]} is more than the $visible visible $DEVICE devices; use at most $visible."
  fi
  set_training_env "$DEVICE" || exit 2
  # DeepSpeed and accelerate take an accelerator wherever they see one.
  [ "$DEVICE" != cpu ] || export CUDA_VISIBLE_DEVICES="" ASCEND_RT_VISIBLE_DEVICES=""
}

absolute() { case "$1" in /*) printf '%s\n' "$1" ;; *) printf '%s\n' "$PWD/$1" ;; esac; }

# Paths are relative to where the user stands; what is no path there is a hub name.
settle_paths() {
  local name
  for name in model_name dataset_name input_dir; do
    [ ! -e "${OPTION[$name]:-/dev/null/none}" ] || OPTION[$name]="$(absolute "${OPTION[$name]}")"
  done
  for name in config_file deepspeed_config; do
    [ -n "${OPTION[$name]}" ] || continue
    [ -r "${OPTION[$name]}" ] || fail "--$name=${OPTION[$name]} cannot be read; name an existing file."
    OPTION[$name]="$(absolute "${OPTION[$name]}")"
  done
  [ -z "${OPTION[main_process_ip]}" ] || [ "${OPTION[num_machines]}" -eq 1 ] || [ -n "${OPTION[output_dir]}" ] ||
    fail "--num_machines=${OPTION[num_machines]} needs --output_dir, a directory that all machines share."
}

# RUN_DIR: the one named, the newest run for a bare --resume, else a new one.
choose_run_dir() {
  local runs="$PROJECT_DIR/logs/$LAUNCHER" newest=""
  if [ -n "${OPTION[output_dir]}" ]; then
    RUN_DIR="$(absolute "${OPTION[output_dir]}")"
  elif [ -n "${OPTION[resume]}" ]; then
    newest="$(find "$runs" -mindepth 1 -maxdepth 1 -type d 2>/dev/null | sort | tail -n 1 || true)"
    [ -n "$newest" ] || fail "--resume: $runs holds no run to go on with; name one with --output_dir."
    RUN_DIR="$newest"
  else
    RUN_DIR="$runs/$(date -u +%Y%m%dT%H%M%SZ)"
  fi
  [ -z "${OPTION[resume]}" ] || check_resume
}

check_resume() {
  local found
  case "${OPTION[resume]}" in
    latest)
      found="$(find "$RUN_DIR" -mindepth 2 -maxdepth 2 -path '*/checkpoint-*/complete' 2>/dev/null || true)"
      [ -n "$found" ] || fail "--resume=latest: $RUN_DIR holds no complete checkpoint; start without --resume." ;;
    checkpoint-*)
      [ -d "$RUN_DIR/${OPTION[resume]}" ] || fail "--resume=${OPTION[resume]}: there is no such directory in $RUN_DIR." ;;
    *) fail "--resume=${OPTION[resume]} is not known; use latest or checkpoint-N." ;;
  esac
}

# COMMAND: accelerate with the training script. The number of processes is said here alone; a file's is its default.
build_command() {
  # shellcheck disable=SC2153  # CONFIG is the launcher's
  local processes=$((OPTION[num_processors] * OPTION[num_machines])) config="$CONFIG"
  # The fp16 file names deepspeed_fp16.json, which no flag takes back: another precision needs the other file.
  [ "$DEEPSPEED" -eq 0 ] || [ "${OPTION[mixed_precision]}" = fp16 ] || config=bf16_accelerate_config.yaml
  # Quiet: where a single rank has said what is wrong, a stack of accelerate's own adds nothing.
  COMMAND=("$PYTHON" -m accelerate.commands.launch --quiet "--config_file=${OPTION[config_file]:-$SD3_DIR/$config}"
    "--num_processes=$processes" "--num_machines=${OPTION[num_machines]}" "--machine_rank=${OPTION[machine_rank]}"
    "--main_process_ip=${OPTION[main_process_ip]}" "--main_process_port=${OPTION[main_process_port]}")
  if [ "$DEEPSPEED" -eq 1 ]; then
    if [ -n "${OPTION[deepspeed_config]}" ]; then
      COMMAND+=("--deepspeed_config_file=${OPTION[deepspeed_config]}")
    elif [ "${OPTION[mixed_precision]}" = fp16 ]; then
      COMMAND+=("--deepspeed_config_file=$SD3_DIR/deepspeed_fp16.json")
    else
      COMMAND+=("--zero_stage=2" "--mixed_precision=${OPTION[mixed_precision]}"
        "--gradient_accumulation_steps=${OPTION[gradient_accumulation_steps]}")
    fi
  else
    COMMAND+=("--mixed_precision=${OPTION[mixed_precision]}")
    # accelerate runs several CPU ranks like cards, told apart by this variable alone; with DeepSpeed it must be unset.
    if [ "$DEVICE" = cpu ]; then
      export ACCELERATE_USE_CPU=true
      [ "$processes" -gt 1 ] || COMMAND+=(--cpu)
    fi
  fi
  TRAIN_ARGUMENTS=("--pretrained_model_name_or_path=${OPTION[model_name]}" "--output_dir=$RUN_DIR"
    "--instance_prompt=${OPTION[instance_prompt]}" "--resolution=${OPTION[resolution]}"
    "--train_batch_size=${OPTION[batch_size]}" "--max_train_steps=${OPTION[max_train_steps]}"
    "--mixed_precision=${OPTION[mixed_precision]}" "--learning_rate=${OPTION[learning_rate]}"
    "--gradient_accumulation_steps=${OPTION[gradient_accumulation_steps]}" "--lr_scheduler=constant"
    "--lr_warmup_steps=0" "--checkpointing_steps=${OPTION[checkpointing_steps]}"
    "--dataloader_num_workers=${OPTION[dataloader_num_workers]}" "--report_to=tensorboard")
  [ -z "${OPTION[dataset_name]}" ] || TRAIN_ARGUMENTS+=("--dataset_name=${OPTION[dataset_name]}" "--caption_column=${OPTION[caption_column]}")
  [ -z "${OPTION[dataset_split]}" ] || TRAIN_ARGUMENTS+=("--dataset_split=${OPTION[dataset_split]}")
  [ -z "${OPTION[input_dir]}" ] || TRAIN_ARGUMENTS+=("--instance_data_dir=${OPTION[input_dir]}")
  [ -z "${OPTION[validation_prompt]}" ] || TRAIN_ARGUMENTS+=("--validation_prompt=${OPTION[validation_prompt]}" "--validation_epochs=25")
  [ -z "${OPTION[seed]}" ] || TRAIN_ARGUMENTS+=("--seed=${OPTION[seed]}")
  [ "$GRADIENT_CHECKPOINTING" -eq 0 ] || TRAIN_ARGUMENTS+=(--gradient_checkpointing)
  [ -z "${OPTION[resume]}" ] || TRAIN_ARGUMENTS+=("--resume_from_checkpoint=${OPTION[resume]}")
  [ -z "$VARIANT" ] || TRAIN_ARGUMENTS+=("--variant=$VARIANT")
  take_secrets_out
  TRAIN_ARGUMENTS+=("${PASSED_ON[@]}")
  [ "$ENGINE" = native ] || COMMAND+=("$HERE/rank.py")
  COMMAND+=("$TRAIN_SCRIPT" "${TRAIN_ARGUMENTS[@]}")
}

# A hub token travels in the environment, where the hub library looks for it, and so reaches no file.
take_secrets_out() {
  local kept=() argument next=0
  for argument in "${PASSED_ON[@]}"; do
    if [ "$next" -eq 1 ]; then
      export HF_TOKEN="$argument"; next=0
    else
      case "$argument" in
        --hub_token) next=1 ;;
        --hub_token=*) export HF_TOKEN="${argument#*=}" ;;
        *) kept+=("$argument") ;;
      esac
    fi
  done
  PASSED_ON=("${kept[@]}")
}

# Tokens that T5 reads of a caption, as the training script will take it from what follows --; 77 is both engines'
# default. Generation with the result reads as many.
passed_length() {
  "$PYTHON" - "${PASSED_ON[@]}" <<'END'
import argparse, sys
parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--max_sequence_length", default="77")
for other in ("max_train_steps", "max_grad_norm"):  # so that what is short for several is short for none here too
    parser.add_argument(f"--{other}")
parser.error = lambda message: sys.exit(print(77))  # the training script will say what is wrong
print(parser.parse_known_args()[0].max_sequence_length)
END
}

# The settings as JSON on standard output; the report's and the checks' view of this run.
settings_json() {
  local name pairs=()
  for name in "${!OPTION[@]}"; do pairs+=("$name=${OPTION[$name]}"); done
  pairs+=("max_sequence_length=$(passed_length)")
  "$PYTHON" - "${pairs[@]}" "script=$SCRIPT" "launcher=$LAUNCHER" "engine=$ENGINE" "device=$DEVICE" \
    "deepspeed=$DEEPSPEED" "run_dir=$RUN_DIR" "dry_run=${GIVEN[dry-run]:-}" "case_name=$(case_name)" "started_at=$(date +%s.%N)" <<'END'
import json, sys
print(json.dumps(dict(pair.split("=", 1) for pair in sys.argv[1:]), indent=2, sort_keys=True))
END
}

# The published logs' names, with the real number of cards.
case_name() {
  local model=SD3
  case "${OPTION[preset]}" in sd3.5*) model=SD3.5 ;; esac
  printf '%s_%s_%s_%sp_bs%s' "$model" "$CASE" "${OPTION[mixed_precision]}" \
    "$((OPTION[num_processors] * OPTION[num_machines]))" "${OPTION[batch_size]}"
}

# Write standard input to a file: whole or not at all.
write_file() {
  cat >"$1.new"
  sync "$1.new" 2>/dev/null || true
  mv "$1.new" "$1"
}

# All checks that need Python; the summary of the data goes to the user, and as JSON into DATA_SUMMARY.
check_run() {
  {
    DATA_SUMMARY="$(settings_json |
      SD3_SUMMARY_FD=3 project_module sd3.launch.preflight "${TRAIN_ARGUMENTS[@]}" 3>&1 >&4)" || exit $?
  } 4>&1
  # The summary has a cut for each encoder where the model is on this machine; the native engine need not tell them again.
  [[ $DATA_SUMMARY != *'"encoder"'* ]] || export SD3_CUTS_PRINTED=1
}

quoted_command() { printf '%q ' "${COMMAND[@]}"; printf '\n'; }

# The run directory, locked for as long as this launcher or its supervisor lives; only machine 0 locks and writes.
prepare_run_dir() {
  mkdir -p "$RUN_DIR" 2>/dev/null || fail "--output_dir=$RUN_DIR cannot be made; name a directory that you may write."
  [ -w "$RUN_DIR" ] || fail "--output_dir=$RUN_DIR cannot be written; name a directory that you may write."
  [ "${OPTION[machine_rank]}" -eq 0 ] || return 0
  exec 8>"$RUN_DIR/.lock"
  flock -n 8 || case $? in
    1) fail "--output_dir=$RUN_DIR is in use by a run that is still going; wait for it or name another." ;;
    *) echo "$LAUNCHER.sh: $RUN_DIR cannot be locked: see that no other run uses it." >&2 ;;
  esac
  {
    printf '#!/usr/bin/env bash\n# The exact command of this run. Secrets are not in it: export HF_TOKEN yourself.\n'
    local name
    while IFS='|' read -r name _; do
      [ -z "${!name:-}" ] || printf 'export %s=%q\n' "$name" "${!name}"
    done <<<"$ASCEND_TABLE"
    [ "$DEVICE" != cpu ] || printf 'export CUDA_VISIBLE_DEVICES="" ASCEND_RT_VISIBLE_DEVICES=""\n'
    [ -z "${ACCELERATE_USE_CPU:-}" ] || printf 'export ACCELERATE_USE_CPU=%q\n' "$ACCELERATE_USE_CPU"
    # shellcheck disable=SC2016  # expanded where it runs
    printf 'export PYTHONPATH=%q"${PYTHONPATH:+:$PYTHONPATH}"\n' "$PROJECT_DIR"
    printf 'cd %q\nexec ' "$PWD"
    quoted_command
  } | write_file "$RUN_DIR/command.sh"
  settings_json | write_file "$RUN_DIR/run_settings.json"
  [ -z "$DATA_SUMMARY" ] || printf '%s\n' "$DATA_SUMMARY" | write_file "$RUN_DIR/data.json"
  project_module sd3.common.run_environment --device="$DEVICE" --engine="$ENGINE" | write_file "$RUN_DIR/environment.json"
}

# pass_on SIGNAL STATUS: to the supervisor, the only background process of this shell.
pass_on() {
  [ -n "${!:-}" ] || exit "$2"
  kill "-$1" "$!" 2>/dev/null || true
}

launch() {
  local status=0 log=train.log
  parse_options "$@"
  settle_options
  check_numbers
  find_python || exit 3
  choose_run_dir
  choose_engine
  choose_device
  settle_paths
  build_command
  check_run
  if [ -n "${GIVEN[dry-run]:-}" ]; then
    quoted_command
    return 0
  fi
  prepare_run_dir
  echo "run directory: $RUN_DIR"
  [ "${OPTION[machine_rank]}" -eq 0 ] || log="train-machine-${OPTION[machine_rank]}.log"
  # Before the supervisor is there: without it a signal has nothing to end but this shell.
  trap 'pass_on INT 130' INT
  trap 'pass_on TERM 143' TERM HUP
  # Descriptor 8 is the run's lock, this shell's and the supervisor's, which passes it on to no process.
  # No function here: $! must be Python itself.
  PYTHONPATH="$PROJECT_DIR${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -c "$RUN_MODULE" sd3.common.supervise --log "$RUN_DIR/$log" \
    --grace "${SD3_STOP_GRACE:-60}" --parent "$$" -- "${COMMAND[@]}" &
  # A signal interrupts wait; the supervisor is then still ending the ranks.
  while :; do
    status=0
    wait "$!" || status=$?
    kill -0 "$!" 2>/dev/null || break
  done
  trap - INT TERM HUP
  if [ "${OPTION[machine_rank]}" -eq 0 ]; then
    project_module sd3.common.report "$RUN_DIR" --exit-status "$status" || true
  fi
  exit "$status"
}
