#!/usr/bin/env bash
# The pipeline end to end on real data, with a small model built here and its tokenizer trained on
# the text:  SFT -> reward model -> PPO,  SFT -> DPO,  SFT -> GRPO.
#
#   examples/pipeline.sh PREFERENCES.jsonl.gz GSM8K_TRAIN.jsonl OUT
#
# PREFERENCES: rows with `chosen` and `rejected` (HH-RLHF's form); GSM8K_TRAIN: rows with `question`
# and `answer`. About ten minutes on two cores. Each stage leaves summary.json, metrics.jsonl and
# curves.png in OUT/<stage>; the figures are printed at the end. A model of this size learns to write
# like its data, not to reason or to be harmless.
set -euo pipefail

preferences=$1 problems=$2 out=$3
python=${PYTHON:-python}
train() { "$python" -m rlhf_kernels.trainer "$1" --output_dir "$out/$2" "${@:3}"; }
small=(--hidden_size 128 --num_layers 2 --num_heads 4 --vocab_size 2048)
pairs=(--max_prompt_tokens 192 --max_new_tokens 96 --eval_size 400 --batch_size 16)

# `sft` and `ppo` read prompt + completion: made from the pairs here, in the same order, so that with
# the same seed the same dialogues are held out of every stage.
mkdir -p "$out"
"$python" - "$preferences" "$out/preferred.jsonl" <<'PY'
import json
import sys

from rlhf_kernels.trainer.data import read_rows

with open(sys.argv[2], "w", encoding="utf-8") as file:
    for row in read_rows(sys.argv[1], "preference"):
        file.write(json.dumps({"prompt": row.prompt, "completion": row.chosen}) + "\n")
PY
train sft sft --data "$out/preferred.jsonl" "${small[@]}" "${pairs[@]}" \
    --learning_rate 2e-3 --total_steps 300

model=(--model "$out/sft/policy")
train reward reward --data "$preferences" "${pairs[@]}" "${model[@]}" \
    --learning_rate 3e-4 --lr_schedule linear --total_steps 150

train dpo dpo --data "$preferences" "${pairs[@]}" "${model[@]}" \
    --learning_rate 1e-4 --total_steps 100

# PPO-max: critic from the reward model, rewards normalised and clipped.
train ppo ppo --data "$out/preferred.jsonl" "${model[@]}" --max_prompt_tokens 192 --eval_size 400 \
    --reward_funcs "$out/reward/reward" --critic_model "$out/reward/reward" --reward_normalize \
    --reward_clip 5 --critic_warmup_steps 5 --max_new_tokens 32 --batch_size 64 \
    --mini_batch_size 32 --epochs 1 --learning_rate 2e-4 --critic_learning_rate 3e-4 \
    --kl_coef 0.02 --total_steps 80

# GSM8K: SFT on solutions, then GRPO on the format and the answer.
train sft sft_gsm8k --data "$problems" "${small[@]}" --max_prompt_tokens 96 --eval_size 256 \
    --max_new_tokens 192 --batch_size 16 --learning_rate 2e-3 --total_steps 300
train grpo grpo --data "$problems" --model "$out/sft_gsm8k/policy" --max_prompt_tokens 96 \
    --eval_size 64 --max_new_tokens 96 --batch_size 64 --num_generations 8 --learning_rate 3e-4 \
    --total_steps 40

"$python" - "$out" <<'PY'
import json
import pathlib
import sys

out = pathlib.Path(sys.argv[1])
for stage in ("sft", "reward", "dpo", "ppo", "sft_gsm8k", "grpo"):
    summary = json.loads((out / stage / "summary.json").read_text())
    print(f"{stage}: {summary['total_seconds']:.0f} s")
    for name, value in summary["held_out_after"].items():
        print(f"    held out, {name}: {summary['held_out_before'][name]:.3f} -> {value:.3f}")
    rows = [json.loads(line) for line in (out / stage / "metrics.jsonl").open()]
    for name in ("loss", "reward", "kl", "margin"):
        if name in rows[0]:
            first, last = (sum(r[name] for r in part) / 10 for part in (rows[:10], rows[-10:]))
            print(f"    training, {name}: {first:.3f} -> {last:.3f} (means of ten steps)")
PY
