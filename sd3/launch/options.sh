# shellcheck shell=bash
# shellcheck disable=SC2034  # what is set here is read by launch.sh
# The launchers' options: one table, read by the parser, by --help and by the check for unknown names.

declare -A OPTION=()   # what holds: the launcher's defaults, then the preset's, then the user's
declare -A GIVEN=()    # what the user gave
PASSED_ON=()           # everything after --

# name | argument | meaning
OPTION_TABLE='preset|sd3, sd3.5-medium, sd3.5-large|model and the settings that go with it
model_name|DIR or NAME|the pipeline to fine-tune: a local directory or a hub name
dataset_name|DIR or NAME|captioned data set: a folder with parquet files or a hub name; excludes input_dir
input_dir|DIR|a folder of images of one subject; excludes dataset_name
dataset_split|NAME|split of the data set to train on (default train)
caption_column|NAME|the captions in the data set (default text)
instance_prompt|TEXT|the prompt for images without a caption
validation_prompt|TEXT|what to paint at each validation; empty for none
batch_size|N|images a step on each process
num_processors|N|processes, one a card; on all machines together as many on each
max_train_steps|N|optimizer steps
mixed_precision|no, fp16, bf16|precision of the arithmetic
resolution|N|side of the training images in pixels, a multiple of 16
gradient_accumulation_steps|N|batches before each optimizer step
learning_rate|X|learning rate
checkpointing_steps|N|a checkpoint every so many steps
dataloader_num_workers|N|loader processes for each rank
resume|latest, checkpoint-N|go on from a checkpoint (default latest when no value is given)
output_dir|DIR|the run directory (default logs/LAUNCHER/UTC time)
config_file|FILE|the accelerate configuration
deepspeed_config|FILE|the DeepSpeed configuration
num_machines|N|machines that train together
machine_rank|N|number of this machine, from 0
main_process_ip|ADDRESS|address of machine 0
main_process_port|N|port that the ranks meet at
device|auto, npu, cuda, cpu|where to train
engine|auto, diffusers, native|which training scripts
seed|N|seed; empty for none
dry-run||check everything and print the command, start nothing
help||this text'

# No pipe into grep -q: it may end before its source, which pipefail then takes for a failure.
known_option() { grep -qxF -- "$1" <<<"$(option_names)"; }
option_names() { cut -d'|' -f1 <<<"$OPTION_TABLE"; }

usage() {
  local name argument meaning default
  printf 'Usage: bash sd3/%s.sh [options] [-- options of the training script]\n\n%s\n\n' "$LAUNCHER" "$SUMMARY"
  while IFS='|' read -r name argument meaning; do
    default="${OPTION[$name]:-}"
    printf '  --%s%s\n        %s%s\n' "$name" "${argument:+=$argument}" "$meaning" "${default:+ [$default]}"
  done <<<"$OPTION_TABLE"
  printf '\nEnvironment: SD3_PYTHON, SD3_STOP_GRACE (seconds that ranks get to stop, 60), CANN_SET_ENV; see sd3/launch/README.md.\n'
}

fail() {
  echo "$LAUNCHER.sh: $1" >&2
  exit "${2:-2}"
}

# nearest NAME: the known option with the smallest edit distance.
nearest() {
  option_names | awk -v a="$1" '
    function least(x, y) { return x < y ? x : y }
    { b = $0; n = length(a); m = length(b)
      for (j = 0; j <= m; j++) row[0, j] = j
      for (i = 1; i <= n; i++) { row[i, 0] = i
        for (j = 1; j <= m; j++)
          row[i, j] = least(least(row[i-1, j], row[i, j-1]) + 1, row[i-1, j-1] + (substr(a, i, 1) != substr(b, j, 1))) }
      if (best == "" || row[n, m] < distance) { best = b; distance = row[n, m] } }
    END { print best }'
}

parse_options() {
  local name value
  while [ $# -gt 0 ]; do
    case "$1" in
      --) shift; PASSED_ON=("$@"); return 0 ;;
      -h) name=help; value="" ;;
      --*=*) name="${1%%=*}"; name="${name#--}"; value="${1#*=}" ;;
      --*)
        name="${1#--}"; value=""
        case "$name" in
          help|dry-run) ;;
          resume) if [ $# -gt 1 ] && [[ $2 != --* ]]; then value="$2"; shift; else value=latest; fi ;;
          *) if known_option "$name"; then
               [ $# -gt 1 ] || fail "--$name needs a value."
               value="$2"; shift
             fi ;;
        esac ;;
      *) fail "'$1' is no option; options of the training script go after --." ;;
    esac
    known_option "$name" || fail "unknown option --$name; did you mean --$(nearest "$name")? (--help lists all)"
    case "$name" in help) usage; exit 0 ;; dry-run) value=1 ;; esac
    GIVEN[$name]="$value"
    shift
  done
}

# The preset's settings lie between the launcher's defaults and the user's options.
apply_preset() {
  case "$1" in
    sd3) OPTION[model_name]=stabilityai/stable-diffusion-3-medium-diffusers ;;
    sd3.5-medium) OPTION[model_name]=stabilityai/stable-diffusion-3.5-medium ;;
    sd3.5-large)
      OPTION[model_name]=stabilityai/stable-diffusion-3.5-large
      if [ "$SCRIPT" = train_dreambooth_sd3 ]; then
        OPTION[batch_size]=8; OPTION[resolution]=512; GRADIENT_CHECKPOINTING=1
      fi ;;
    *) fail "--preset=$1 is not known; use sd3, sd3.5-medium or sd3.5-large." ;;
  esac
}

settle_options() {
  local name
  GRADIENT_CHECKPOINTING=0
  OPTION[preset]="${GIVEN[preset]:-${OPTION[preset]}}"
  apply_preset "${OPTION[preset]}"
  [ -z "${GIVEN[input_dir]:-}" ] || [ -z "${GIVEN[dataset_name]:-}" ] ||
    fail "--input_dir=${GIVEN[input_dir]} and --dataset_name=${GIVEN[dataset_name]} exclude each other; give one of them."
  # One of the two replaces whichever is the launcher's default, and brings its prompts.
  if [ -n "${GIVEN[input_dir]:-}" ]; then use_dog; elif [ -n "${GIVEN[dataset_name]:-}" ]; then use_pokemon; fi
  for name in "${!GIVEN[@]}"; do OPTION[$name]="${GIVEN[$name]}"; done
  [ -n "${OPTION[input_dir]:-}${OPTION[dataset_name]:-}" ] || fail "no data was named; give --input_dir=DIR or --dataset_name=DIR."
  case "${OPTION[device]}" in auto|npu|cuda|cpu) ;; *) fail "--device=${OPTION[device]} is not known; use auto, npu, cuda or cpu." ;; esac
  case "${OPTION[engine]}" in auto|diffusers|native) ;; *) fail "--engine=${OPTION[engine]} is not known; use auto, diffusers or native." ;; esac
  case "${OPTION[mixed_precision]}" in no|fp16|bf16) ;; *) fail "--mixed_precision=${OPTION[mixed_precision]} is not known; use no, fp16 or bf16." ;; esac
}

# check_number NAME KIND LEAST MOST: KIND is integer or number.
check_number() {
  local value="${OPTION[$1]}" pattern='^[0-9]{1,15}$'
  [ "$2" = integer ] || pattern='^[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$'
  if ! [[ $value =~ $pattern ]] || ! awk -v x="$value" -v a="$3" -v b="$4" 'BEGIN { exit !(x + 0 >= a + 0 && x + 0 <= b + 0) }'; then
    fail "--$1=$value is out of range; expected an $2 from $3 to $4."
  fi
}

check_numbers() {
  check_number batch_size integer 1 4096
  check_number max_train_steps integer 1 100000000
  check_number resolution integer 64 4096
  [ $((10#${OPTION[resolution]} % 16)) -eq 0 ] ||
    fail "--resolution=${OPTION[resolution]} is no multiple of 16; the nearest is $(((10#${OPTION[resolution]} + 8) / 16 * 16))."
  check_number gradient_accumulation_steps integer 1 100000
  check_number learning_rate number 1e-12 10
  check_number checkpointing_steps integer 1 100000000
  check_number dataloader_num_workers integer 0 256
  check_number num_machines integer 1 4096
  check_number machine_rank integer 0 "$((10#${OPTION[num_machines]} - 1))"
  check_number main_process_port integer 1 65535
  [ -z "${OPTION[num_processors]}" ] || check_number num_processors integer 1 1024
  [ -z "${OPTION[seed]}" ] || check_number seed integer 0 4294967295
}

use_dog() {
  OPTION[dataset_name]=""; OPTION[caption_column]=""
  OPTION[instance_prompt]="A photo of sks dog"; OPTION[validation_prompt]="A photo of sks dog in a bucket"
}

use_pokemon() {
  OPTION[input_dir]=""; OPTION[caption_column]=text
  OPTION[instance_prompt]="A photo of pokemon"; OPTION[validation_prompt]="a blue creature with large eyes"
}
