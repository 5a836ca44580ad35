#!/usr/bin/env bash
# The pipeline end to end on real data, with a small model built here and its tokenizer trained on
# the text:  SFT -> reward model -> PPO,  SFT -> DPO,  SFT -> GRPO.
#
#   examples/pipeline.sh PREFERENCES.jsonl.gz GSM8K_TRAIN.jsonl OUT [STEPS]
#
# PREFERENCES: rows with `chosen` and `rejected` (HH-RLHF's form); GSM8K_TRAIN: rows with `question`
# and `answer`. Each stage leaves summary.json, metrics.jsonl and curves.png in OUT/<stage>. A model
# of this size learns to write like its data, not to reason.
set -euo pipefail

preferences=$1 problems=$2 out=$3 steps=${4:-100}
train() { python -m rlhf_kernels.trainer "$1" --output_dir "$out/$2" "${@:3}"; }
small=(--hidden_size 128 --num_layers 2 --num_heads 4 --vocab_size 2048)
pairs=(--data "$preferences" --max_prompt_tokens 192 --eval_size 256)

# SFT on the preferred answers. `sft` reads prompt + completion: made from the pairs here.
mkdir -p "$out"
python - "$preferences" "$out/preferred.jsonl" <<'PY'
import json
import sys

from rlhf_kernels.trainer.data import read_rows

with open(sys.argv[2], "w", encoding="utf-8") as file:
    for row in read_rows(sys.argv[1], "preference"):
        if row.prompt:
            file.write(json.dumps({"prompt": row.prompt, "completion": row.chosen}) + "\n")
PY
train sft sft --data "$out/preferred.jsonl" --max_prompt_tokens 192 --eval_size 256 "${small[@]}" \
    --max_new_tokens 128 --batch_size 16 --learning_rate 2e-3 --total_steps "$steps"

train reward reward "${pairs[@]}" --model "$out/sft/policy" --max_new_tokens 128 \
    --batch_size 16 --learning_rate 3e-4 --total_steps "$steps"

train dpo dpo "${pairs[@]}" --model "$out/sft/policy" --max_new_tokens 128 \
    --batch_size 16 --learning_rate 1e-4 --total_steps "$steps"

# PPO-max: critic from the reward model, rewards normalised and clipped.
train ppo ppo --data "$out/preferred.jsonl" --max_prompt_tokens 192 --eval_size 64 \
    --model "$out/sft/policy" --reward_funcs "$out/reward/reward" \
    --critic_model "$out/reward/reward" --reward_normalize --reward_clip 5 --critic_warmup_steps 5 \
    --max_new_tokens 32 --batch_size 32 --mini_batch_size 16 --epochs 1 --learning_rate 1e-4 \
    --kl_coef 0.05 --total_steps "$steps"

# GSM8K: SFT on solutions, then GRPO on the format and the answer.
train sft sft_gsm8k --data "$problems" "${small[@]}" --max_prompt_tokens 128 --eval_size 128 \
    --max_new_tokens 192 --batch_size 16 --learning_rate 2e-3 --total_steps "$steps"
train grpo grpo --data "$problems" --model "$out/sft_gsm8k/policy" --max_prompt_tokens 128 \
    --eval_size 64 --max_new_tokens 96 --batch_size 32 --num_generations 8 --learning_rate 3e-4 \
    --total_steps "$steps"
