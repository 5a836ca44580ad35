"""What a user can get wrong: one line that names it, exit status 2, nothing left behind."""

import importlib.util
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState, DistributedType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.utils import logging

from tests.trainer import trainer_tools
from tests.trainer.trainer_tools import one_thread  # noqa: F401

from rlhf_kernels import cli
from rlhf_kernels.trainer import checks, models, stage
from rlhf_kernels.trainer.config import ModelConfig
from rlhf_kernels.trainer.tokenizers import bpe_tokenizer

TEXT = "Ann has 3 nuts and finds 4. What is that? It is 7. hello world"
REWARDS = """
def good(completions, **_):
    return [1.0] * len(completions)
def needs(completions, solution, **_):
    return [1.0] * len(completions)
def texts(completions, **_):
    return ["1.0"] * len(completions)
def raises(completions, **_):
    raise KeyError("no such key")
number = 3
"""


def _write(folder):
    """Models, data and settings, right and wrong."""
    prompts = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(40)]
    pairs = [{"prompt": r["prompt"], "chosen": "yes", "rejected": "no"} for r in prompts]
    trainer_tools.write_jsonl(folder / "sft.jsonl", prompts)
    trainer_tools.write_jsonl(folder / "few.jsonl", prompts[:3])
    longer = [r | {"prompt": r["prompt"] * 9} for r in prompts]
    trainer_tools.write_jsonl(folder / "long.jsonl", longer)
    trainer_tools.write_jsonl(folder / "bare.jsonl", [{"prompt": r["prompt"]} for r in prompts])
    trainer_tools.write_jsonl(folder / "pairs.jsonl", pairs)
    trainer_tools.write_jsonl(folder / "broken.jsonl", [*prompts[:2], '{"prompt": '])
    trainer_tools.write_jsonl(folder / "columns.jsonl", [{"query_text": "a"}])
    talk = [
        {"prompt": [{"role": "user", "content": r["prompt"]}], "completion": "2"} for r in prompts
    ]
    trainer_tools.write_jsonl(folder / "forms.jsonl", [*prompts[:3], talk[3], *prompts[4:]])
    trainer_tools.write_jsonl(folder / "talks.jsonl", [*talk[:5], *prompts[5:]])
    (folder / "empty.jsonl").write_text("")
    (folder / "binary.jsonl").write_bytes(bytes(range(256)))
    (folder / "data.xyz").write_text("a")
    (folder / "nothing").mkdir()
    (folder / "mixed").mkdir()
    for name in ("train.jsonl", "extra.jsonl"):
        trainer_tools.write_jsonl(folder / "mixed" / name, prompts)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "syntax.py").write_text("def score(:\n")
    (folder / "imports.py").write_text("import no_such_package\n")
    (folder / "taken").write_text("a file")
    done = folder / "done" / "checkpoint-00000002"
    done.mkdir(parents=True)
    (done / "manifest.json").write_text(json.dumps({"format": "rlhf_kernels.trainer/1"}))
    for name, content in YAML.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    tokenizer = bpe_tokenizer([TEXT] * 3, 300)
    config = ModelConfig(hidden_size=32, num_layers=1, num_heads=2)
    model = models.build_policy(config, tokenizer, max_length=64)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    def copy(name, change=None, remove=()):
        shutil.copytree(folder / "model", folder / name)
        for file in remove:
            (folder / name / file).unlink()
        if change is not None:
            path = folder / name / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | change))

    copy("no_config", remove=["config.json"])
    copy("no_weights", remove=["model.safetensors"])
    copy("no_tokenizer", remove=["tokenizer.json", "tokenizer_config.json"])
    copy("unknown_type", {"model_type": "no_such_architecture"})
    copy("no_type", {"model_type": None})
    copy("other_sizes", {"hidden_size": 64})
    copy("encoder", {"model_type": "vit", "architectures": ["ViTModel"]})
    copy("broken_config")
    (folder / "broken_config" / "config.json").write_text('{"model_type": ')
    copy("truncated")
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    copy("garbage")
    (folder / "garbage" / "model.safetensors").write_bytes(b"not safetensors at all")
    copy("partial")
    tensors = load_file(folder / "partial" / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "partial" / "model.safetensors", {"format": "pt"})
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "none"), "r": 2}
    for name, text in (("adapter", json.dumps(adapter)), ("adapter_broken", "{")):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(text)
    (folder / "weightless").mkdir()
    (folder / "weightless" / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({}, folder / "adapter" / "adapter_model.safetensors")
    for name, text in (("broken_generation", "{"), ("listed_generation", "[]")):
        copy(name)
        (folder / name / "generation_config.json").write_text(text)
        tokenizer.save_pretrained(folder / name)
    short = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=16)
    AutoModelForCausalLM.from_config(short).save_pretrained(folder / "short")
    tokenizer.save_pretrained(folder / "short")
    copy("broken_tokenizer")
    (folder / "broken_tokenizer" / "tokenizer.json").write_text("{")
    copy("large_tokenizer")
    bpe_tokenizer([TEXT, *(f"word{i} " * 3 for i in range(300))], 600).save_pretrained(
        folder / "large_tokenizer"
    )


YAML = {
    "unknown.yaml": "learning_rat: 1e-4\n",
    "syntax.yaml": "epochs: [1\n",
    "tab.yaml": "epochs:\n\t- 1\n",
    "nested.yaml": "ppo: {epochs: 3}\n",
    "list.yaml": "- epochs\n",
    "text.yaml": "hello\n",
    "twice.yaml": "epochs: 1\nkl_coef: 0.1\nepochs: 2\n",
    "twice_spelled.yaml": "kl_coef: 1\nkl-coef: 2\n",
    "types.yaml": "epochs: three\n",
    "float.yaml": "epochs: 1.5\n",
    "bool.yaml": "epochs: true\n",
    "many.yaml": "epochs: [1, 2]\n",
    "inf.yaml": "learning_rate: .inf\n",
    "inside.yaml": "config: other.yaml\n",
    "two.yaml": "epochs: 1\n---\nepochs: 2\n",
    "code.yaml": "!!python/object/apply:os.getcwd []\n",
    "binary.yaml": bytes(range(256)),
    "negative.yaml": "lam: -1e-3\n",
}

# A stage, its arguments and words of the line; {f} is the folder of `_write`.
SETTINGS = """
ppo --learning_rat 1e-4 | unknown setting 'learning_rat'; did you mean 'learning_rate'?
ppo --xyz 1 | unknown setting 'xyz' --help
grpo --critic_model x | unknown setting 'critic_model'
ppo stray | expected a setting, --name value, found 'stray'
ppo --epochs 1 2 | found '2'
ppo --epochs | epochs: expected a value after it, found none
ppo --reward_funcs | reward_funcs: expected at least one value after it, found none
ppo --config | config: expected a value
ppo --config= | config: expected a YAML file, found ''
ppo --config {f}/none.yaml | none.yaml: no such file
ppo --config {f} | cannot be read: Is a directory
ppo --config {f}/unknown.yaml | unknown.yaml: unknown setting 'learning_rat'; did you mean
ppo --config {f}/syntax.yaml | syntax.yaml: not YAML in line 2
ppo --config {f}/tab.yaml | tab.yaml: not YAML in line 2
ppo --config {f}/nested.yaml | nested.yaml: ppo: expected a flat mapping
ppo --config {f}/list.yaml | list.yaml: expected a mapping of settings
ppo --config {f}/text.yaml | text.yaml: expected a mapping of settings, found 'hello'
ppo --config {f}/twice.yaml | twice.yaml: 'epochs' is set twice line 3
ppo --config {f}/twice_spelled.yaml | 'kl_coef' is set twice
ppo --config {f}/types.yaml | types.yaml: epochs: expected a whole number, found 'three'
ppo --config {f}/float.yaml | epochs: expected a whole number, found '1.5'
ppo --config {f}/bool.yaml | epochs: expected a whole number, found 'true'
ppo --config {f}/many.yaml | epochs: expected one value
ppo --config {f}/inf.yaml | learning_rate: expected a number, found '.inf'
ppo --config {f}/inside.yaml | unknown setting 'config'
ppo --config {f}/two.yaml | not YAML in line 2
ppo --config {f}/code.yaml | not YAML in line 1
ppo --config {f}/binary.yaml | binary.yaml: not YAML
ppo --config {f}/negative.yaml | lam: expected a number from 0 to 1, found -0.001
ppo --config {f}/list.yaml --config {f}/text.yaml | config: expected one file, found 2
ppo --seed -1 | seed: expected a number from 0 to 2**32 - 1, found -1
ppo --seed 4294967296 | seed: expected
ppo --seed 1180591620717411303424 | seed: expected
ppo --seed 1.5 | seed: expected a whole number, found '1.5'
ppo --threads -1 | threads: expected >= 0
ppo --threads 100000 | threads: expected at most 1024
ppo --save_steps -1 | save_steps: expected >= 0
ppo --save_total_limit -1 | save_total_limit: expected >= 0
ppo --save_model maybe | save_model: expected true or false, found 'maybe'
ppo --device gpu | device: expected one of auto, cpu, found 'gpu'
ppo --mixed_precision fp8 | mixed_precision: expected one of
ppo --mixed_precision fp16 --device cpu | mixed_precision: expected 'no' or 'bf16' without a GPU
ppo --report_to nowhere | report_to: expected one of tensorboard found 'nowhere'
ppo --report_to clearml | report_to: expected the tracker's package to be installed
ppo --dtype float64 | dtype: expected one of
ppo --attn_implementation fast | attn_implementation: expected one of sdpa found 'fast'
ppo --attn_implementation paged|eager | attn_implementation: expected one of
ppo --attn_implementation flash_attention_2 | attn_implementation: flash_attn
ppo --hidden_size 0 | hidden_size: expected >= 1
ppo --hidden_size 100 --num_heads 3 | hidden_size: expected a multiple of 2 * num_heads = 6
ppo --hidden_size 40000000 | hidden_size: expected weights within this machine's GiB 40000000
ppo --num_layers 1000000000 | num_layers: expected at most 1000
ppo --num_layers 0 | num_layers: expected >= 1
ppo --num_heads -1 | num_heads: expected >= 1
ppo --lora_rank -1 | lora_rank: expected >= 0
ppo --lora_rank 4 --lora_alpha -3 | lora_alpha: expected >= 1
ppo --lora_alpha 8 | lora_alpha: expected lora_rank > 0 with it, or a model that is an adapter
ppo --vocab_size 100 | vocab_size: expected >= 258
ppo --max_operand 0 | max_operand: expected >= 1
ppo --max_operand 100000000 | max_operand: expected at most 1000
ppo --operators * | operators: expected '+', '-' or '+-'
ppo --eval_size 0 | eval_size: expected >= 1
ppo --max_prompt_tokens 0 | max_prompt_tokens: expected >= 1
ppo --max_new_tokens -3 | max_new_tokens: expected >= 1
ppo --max_new_tokens 1e400 | max_new_tokens: expected a whole number
ppo --total_steps 0 | total_steps: expected >= 1
ppo --batch_size 0 | batch_size: expected >= 1
ppo --batch_size 9999999999999999999999 | batch_size: expected a number below 2**62
ppo --micro_batch_size -1 | micro_batch_size: expected >= 0
ppo --warmup_steps -1 | warmup_steps: expected >= 0
ppo --learning_rate nan | learning_rate: expected a finite number found nan
ppo --learning_rate inf | learning_rate: expected a finite number
ppo --learning_rate 1e400 | learning_rate: expected a finite number
ppo --learning_rate -inf | learning_rate: expected a finite number
ppo --learning_rate 1e39 | learning_rate: expected a finite number
ppo --learning_rate 1e-46 | learning_rate: expected a finite number of fp32's range
dpo --beta 1e-300 --data {f}/sft.jsonl | beta: expected a finite number of fp32's range
ppo --learning_rate -1e-3 | learning_rate: expected >= 0, found -0.001
ppo --learning_rate fast | learning_rate: expected a number, found 'fast'
ppo --lr-schedule step | lr_schedule: expected one of constant, linear, cosine, found 'step'
ppo --weight_decay -1 | weight_decay: expected >= 0
ppo --max_grad_norm 0 | max_grad_norm: expected > 0
ppo --epochs 0 | epochs: expected >= 1
ppo --num_generations 0 | num_generations: expected >= 1
ppo --num_generations 5 | num_generations: expected a divisor of batch_size=512
grpo --num_generations 1 | num_generations: expected >= 2 with grpo
ppo --mini_batch_size 100 | mini_batch_size: expected a divisor of batch_size=512
ppo --dynamic_sampling 0 | dynamic_sampling: expected >= 1
ppo --dynamic_sampling 2 | dynamic_sampling: expected 1 where num_generations is 1
ppo --temperature 0 | temperature: expected > 0
ppo --temperature -1 | temperature: expected > 0
ppo --temperature 1e-30 | temperature: expected a number from 2**-60 to 2**60
ppo --temperature 1e30 | temperature: expected a number from 2**-60 to 2**60
ppo --engine sglang | engine: expected one of vllm
ppo --engine vllm | engine: expected the package vllm to be installed
ppo --vllm_memory 2 | vllm_memory: expected a number from 0 to 1
ppo --objective best | objective must be one of
ppo --clip_low 1.5 | clip_low must be at most 1
ppo --clip_low -0.1 | clip_low must be
ppo --dual_clip 1 | dual_clip must be
ppo --objective reinforce --dual_clip 3 | dual_clip must be None
ppo --aggregation mean | aggregation must be one of
ppo --entropy_coef -1 | entropy_coef: expected >= 0
ppo --penalty_target 0.1 | penalty_target: expected 0 without objective penalty
ppo --penalty_target 0.1 --objective penalty --epochs 1 | penalty_target: expected 0 with one update
ppo --kl_coef -1 | kl_coef: expected >= 0
ppo --kl_estimator k4 | kl_estimator: expected one of
ppo --kl_target 6 --kl_coef 0 | kl_target: expected 0 where kl_coef is 0
ppo --kl_horizon 0 | kl_horizon: expected > 0
ppo --gamma 1.1 | gamma: expected a number from 0 to 1
ppo --lam -0.1 | lam: expected a number from 0 to 1
ppo --correction both | correction: expected one of
ppo --correction token --correction_mode clip | correction_mode: expected one of
ppo --correction token --correction_max 0 | correction_max: expected > 0
ppo --correction_max 5 | correction_max: expected no value without correction, found 5.0
ppo --correction_mode mask | correction_mode: expected no value without correction
ppo --penalty_coef 2 | penalty_coef: expected no value without objective penalty
grpo --num_generations 2 --kl_coef 0 --kl_estimator k2 | kl_estimator: expected no value kl_coef
ppo --kl_horizon 5 | kl_horizon: expected no value where kl_target is 0
ppo --objective reinforce --clip_low 0.9 | clip_low: expected no value with objective reinforce
ppo --objective penalty --clip_high 0.9 | clip_high: expected no value with objective penalty
ppo --reward_clip -1 | reward_clip: expected >= 0
ppo --overlong_buffer -1 | overlong_buffer: expected >= 0
ppo --overlong_buffer 9 --max_new_tokens 8 | overlong_buffer: expected at most max_new_token
ppo --ptx_coef -1 | ptx_coef: expected >= 0
ppo --ptx_data {f}/sft.jsonl | ptx_data: expected ptx_coef > 0
ppo --num_samples -1 | num_samples: expected >= 0
ppo --sft_steps -1 | sft_steps: expected >= 0
ppo --sft_batch_size 0 | sft_batch_size: expected >= 1
ppo --sft_learning_rate inf | sft_learning_rate: expected a finite number
ppo --critic_learning_rate -1 | critic_learning_rate: expected >= 0
ppo --critic_warmup_steps -1 | critic_warmup_steps: expected >= 0
ppo --value_clip -1 | value_clip: expected >= 0
ppo --value_coef nan | value_coef: expected a finite number
ppo --reward_weights 1 2 | reward_weights: expected 1 numbers, found 2
ppo --reward_weights nan | reward_weights: expected a finite number
ppo --reward_funcs a:b --reward_weights 1 2 | reward_weights: expected 1 numbers
dpo --beta 0 | beta: expected > 0
dpo --loss_type kto | loss_type: expected one of sigmoid, hinge, ipo orpo, found 'kto'
dpo --loss_type sigmoid sft --loss_weights 1 | loss_weights: expected 2 numbers, found [1.0]
dpo --loss_type exo_pair | label_smoothing: expected > 0 with loss exo_pair
dpo --loss_type bco_pair --f_divergence_type forward_kl | f_divergence_type: expected reverse_kl
dpo --f_divergence_type js | f_divergence_type: expected one of reverse_kl
dpo --f_alpha_divergence_coef 0.7 | f_alpha_divergence_coef: expected 0.5 with f_divergence
dpo --simpo_gamma 1 | simpo_gamma: expected 0.5 with loss sigmoid
dpo --ld_alpha 1.5 | ld_alpha: expected a number from 0 to 1
dpo --loss_type sigmoid sft --ld_alpha 0.5 | ld_alpha: expected no value with loss_type sft
dpo --loss_type aot --batch_size 8 --micro_batch_size 4 | loss_type: expected no loss that sorts
kto | data: expected a file of labelled completions, found None
kto --beta 0 | beta: expected > 0
kto --loss_type bco | loss_type: expected one of kto, apo_zero_unpaired, found 'bco'
kto --batch_size 1 | batch_size: expected >= 2 with loss_type kto
kto --desirable_weight -1 | desirable_weight: expected >= 0
kto --desirable_weight 0 --undesirable_weight 0 | undesirable_weight: expected > 0
dpo --label_smoothing 0.5 | label_smoothing: expected a probability below 0.5
dpo --label_smoothing 0.1 --loss_type ipo | label_smoothing: expected 0 with loss ipo
reward --center_coef -1 | center_coef: expected >= 0
reward --margin nan | margin: expected a finite number
ppo --output_dir {f}/\udcff | output_dir: expected a text of whole UTF-8 characters
sft --data {f}/\udcff.jsonl | data: expected a text of whole UTF-8 characters
ppo --output_dir {f}/taken | output_dir: expected a folder taken
ppo --output_dir {f}/taken/below | output_dir: expected a folder taken
ppo --output_dir {f}/done | output_dir: expected a folder without checkpoints --resume
""".strip().splitlines()

FILES = """
sft --data {f}/none.jsonl | none.jsonl
sft --data {f}/empty.jsonl | empty.jsonl
sft --data {f}/broken.jsonl | broken.jsonl 3
sft --data {f}/columns.jsonl | columns.jsonl 1
sft --data {f}/binary.jsonl | binary.jsonl
sft --data {f}/data.xyz | data.xyz
sft --data {f}/nothing | nothing
sft --data {f}/few.jsonl | eval_size 3
sft --data {f}/few.jsonl --eval_size 2 --batch_size 8 | batch_size: expected at most the 1 training
sft --data {f}/sft.jsonl --eval_size 8 --batch_size 64 | batch_size: expected at most the 32
sft --data {f}/sft.jsonl --eval_size 8 --max_prompt_tokens 1 | max_prompt_tokens
sft --data {f}/sft.jsonl --eval_size 8 --batch_size 8 --max_new_tokens 1 | max_new_tokens
sft --data {f}/sft.jsonl --eval_size 8 --eval_data {f}/none.jsonl | none.jsonl
sft --data {f}/forms.jsonl | forms.jsonl:4 expected a text, as forms.jsonl:1 found a conversation
sft --data {f}/talks.jsonl | talks.jsonl:6 expected a conversation
sft --data {f}/mixed | mixed: expected every name to tell a split train.jsonl extra.jsonl
sft --data no-such-owner-here/no-such-data | no-such-owner-here/no-such-data
reward | data: expected a file of preferences
dpo --data {f}/sft.jsonl | sft.jsonl:1 chosen
kto --data {f}/sft.jsonl | sft.jsonl:1 'label': expected true or false, found None
ppo --data {f}/bare.jsonl --eval_size 8 --batch_size 8 --sft_steps 2 | sft_steps bare.jsonl
ppo --data {f}/bare.jsonl --eval_size 8 --batch_size 8 --ptx_coef 1 | ptx_coef bare.jsonl
ppo --data {f}/sft.jsonl --eval_size 8 --batch_size 8 | reward_funcs: no column 'answer'
ppo --batch_size 8 --ptx_coef 1 --ptx_data {f}/none.jsonl | none.jsonl
ppo --batch_size 8 --ptx_coef 1 --ptx_data {f}/few.jsonl | ptx_data: expected a mini-batch of 8 rows
ppo --batch_size 8 --ptx_coef 1 --ptx_data {f}/bare.jsonl | bare.jsonl:1 completion
grpo --data {f}/sft.jsonl --eval_size 8 --batch_size 512 | batch_size / num_generations: at most
sft --model {f}/model/config.json | model: expected a folder or hub name the file
sft --model {f}/nothing | model: expected config.json of a saved model, found nothing
sft --model {f}/no_config | model: expected config.json no_config
sft --model {f}/no_weights | model: expected weights no_weights
sft --model {f}/none/at/all | model: expected a folder none/at/all
sft --model no-such-owner-here/no-such-model | model: no folder 'no-such-owner-here/no-such-model'
sft --model {f}/unknown_type | model: no_such_architecture
sft --model {f}/no_type | model: expected a model_type no_type/config.json
sft --model {f}/broken_config | model: broken_config/config.json cannot be read
sft --model {f}/truncated | model: truncated cannot be loaded
sft --model {f}/garbage | model: garbage cannot be loaded
sft --model {f}/partial | model: partial which lacks up_proj
sft --model {f}/adapter | model: adapter
sft --model {f}/weightless | model: weightless lacks its weights (adapter_model.safetensors)
sft --model {f}/broken_generation | model: generation_config.json cannot be read
ppo --model {f}/listed_generation | model: expected a JSON object in generation_config.json
sft --model {f}/adapter_broken | model: adapter_broken
sft --model {f}/short --data {f}/long.jsonl --eval_size 8 --batch_size 8 | model: positions for 16
sft --model {f}/short --attn_implementation no/such-kernel | model: short cannot be loaded
sft --model {f}/other_sizes | model: other_sizes
sft --model {f}/encoder | model: encoder
sft --model {f}/model --lora_rank 65 | lora_rank: expected at most 32, found 65
sft --model {f}/no_tokenizer | model: tokenizer no_tokenizer
sft --model {f}/broken_tokenizer | model: tokenizer broken_tokenizer
sft --model {f}/large_tokenizer | model: expected embeddings of
ppo --critic_model {f}/model | critic_model: model
ppo --critic_model {f}/truncated | critic_model: truncated
ppo --reward_funcs {f}/model | reward_funcs: model
ppo --reward_funcs {f}/truncated | reward_funcs: truncated
ppo --critic_model {f}/nothing | critic_model: expected config.json
ppo --critic_model {f}/rewards.py | critic_model: expected a folder or hub name
ppo --critic_model ./none | critic_model: expected a folder of a model, found none at './none'
ppo --reward_funcs {f}/nothing | reward_funcs: expected config.json
ppo --reward_funcs ./none | reward_funcs: expected a folder of a model
ppo --reward_funcs {f}/no_tokenizer | reward_funcs: no tokenizer no_tokenizer
ppo --reward_funcs {f}/broken_tokenizer | reward_funcs: no tokenizer broken_tokenizer
ppo --reward_funcs {f}/rewards.py | reward_funcs: rewards.py
ppo --reward_funcs nowhere:score | reward_funcs: 'nowhere:score': no module 'nowhere'
ppo --reward_funcs {f}/nowhere.py:score | reward_funcs: no file nowhere.py
ppo --reward_funcs {f}/rewards.py:none | reward_funcs: no 'none' in rewards.py
ppo --reward_funcs {f}/rewards.py:number | reward_funcs: expected a function, found int 3
ppo --reward_funcs {f}/syntax.py:score | reward_funcs: SyntaxError (syntax.py, line 1)
ppo --reward_funcs {f}/imports.py:score | reward_funcs: ModuleNotFoundError 'no_such_package'
ppo --reward_funcs {f}/rewards.py:needs | needs: expected a column 'solution' in the data
ppo --reward_funcs {f}/rewards.py:texts | texts: expected numbers or None, found str '1.0'
ppo --reward_funcs {f}/rewards.py:raises | raises: KeyError: 'no such key' (rewards.py, line 9)
""".strip().splitlines()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    _write(folder)
    return folder


@pytest.fixture
def told(files, tmp_path, capsys, monkeypatch):
    """Checks what a command line with an error says and leaves; returns its line."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    before = dict(sys.modules)

    def state():
        paths = (p for p in files.rglob("*") if "__pycache__" not in p.parts)
        return {str(p): p.stat().st_mtime_ns for p in paths}

    def run(args):
        AcceleratorState._reset_state(True)
        out = tmp_path / "out"
        stage, *rest = args.format(f=files).split()
        if stage == "sft" and "--data" not in rest:
            rest += ["--data", f"{files}/sft.jsonl", "--eval_size", "8", "--batch_size", "8"]
        here = state()
        status = cli.main(["train", stage, "--output_dir", str(out), *rest])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert (status, len(lines)) == (2, 1), lines
        assert lines[0].startswith("rlhf-kernels: ") and len(lines[0]) < 700
        assert not out.exists() or not list(out.iterdir())
        assert state() == here
        return lines[0]

    yield run
    for name in set(sys.modules) - set(before):
        if str(files) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


# Lines that hold only where the package is not installed.
_LACKING = {
    "--engine vllm": "vllm",
    "--report_to clearml": "clearml",
    "flash_attention_2": "flash_attn",
}


def _check(told, line):
    args, _, wanted = line.partition(" | ")
    for part, package in _LACKING.items():
        if part in args and importlib.util.find_spec(package):
            pytest.skip(f"{package} is installed")
    found = told(args)
    missing = [word for word in wanted.split() if word not in found]
    assert not missing, (missing, found)


@pytest.mark.parametrize("line", SETTINGS)
def test_settings(told, line):
    _check(told, line)


@pytest.mark.parametrize("line", FILES)
def test_files_models_and_functions(told, line):
    _check(told, line)


def test_an_engine_whose_checkpoints_are_not_ours(told, monkeypatch):
    engine = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr(stage, "Accelerator", lambda **_: engine)
    assert "accelerate: expected processes of DDP or FSDP" in told("ppo")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps 1"),
        ("DYNAMO_BACKEND", "EAGER", "no dynamo backend"),
    ],
)
def test_what_accelerate_would_change_unseen_is_refused(
    told, monkeypatch, variable, value, expected
):
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    assert f"accelerate: expected {expected}" in told("sft --device cpu")


def test_a_tracker_that_cannot_start_is_one_line(files, tmp_path, capsys, monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("api_key not configured\n(no-tty)")

    AcceleratorState._reset_state(True)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(checks, "get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr(stage.Accelerator, "init_trackers", failing)
    args = f"sft --data {files}/sft.jsonl --eval_size 8 --batch_size 8 --hidden_size 32"
    more = ["--report_to", "tensorboard", "--output_dir", str(tmp_path / "out")]
    assert cli.main(["train", *args.split(), *more]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    told = "report_to: tensorboard cannot start: RuntimeError: api_key not configured (no-tty)"
    assert line == f"rlhf-kernels: {told}"


def test_there_are_many():
    assert len(SETTINGS) + len(FILES) >= 80
