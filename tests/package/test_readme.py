"""Commands of README and docs/, and the examples that presume a model, run as they are written."""

import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.trainer import trainer_tools
from tests.trainer.model_zoo import small_model
from tests.trainer.trainer_tools import one_thread  # noqa: F401

import rlhf_kernels as rk
from rlhf_kernels import cli
from rlhf_kernels.trainer import models
from rlhf_kernels.trainer.config import ModelConfig
from rlhf_kernels.trainer.stage import settings_of
from rlhf_kernels.trainer.tokenizers import bpe_tokenizer

ROOT = Path(__file__).parents[2]
README, TRAINER = ROOT / "README.md", ROOT / "docs" / "trainer.md"
DOCS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))

# Lines that no test runs, and why.
SKIPPED = {
    "make ": "sets up an environment and runs the suite that this is a part of",
    "RLHF_KERNELS_CUDA=1 pip install": "needs nvcc; test_cuda_build.py builds",
    "pip install": "needs a package index; test_install.py installs without one",
    "accelerate launch": "its configuration asks for eight GPUs; its second half is run alone",
}
# What is appended so that a run of 100 steps ends soon.
SHORTER = {"rlhf-kernels train grpo": "--total_steps 1 --threads 1"}


def blocks(path: Path, language: str) -> list[str]:
    """Fenced code of a language ("" for none)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [code for kind, code in found if kind == language]


def commands(path: Path) -> list[str]:
    lines = [line for block in blocks(path, "") for line in block.splitlines()]
    return [line.partition(" #")[0].strip() for line in lines if line.strip()]


def tiny(folder: Path, reward: bool = False) -> None:
    """A causal LM, or a reward model, with its tokenizer."""
    tokenizer = bpe_tokenizer(["Question: what is 1 + 2? #### 3"] * 3, 300)
    config = ModelConfig(hidden_size=32, num_layers=1, num_heads=2)
    build = models.build_reward_model if reward else models.build_policy
    build(config, tokenizer, max_length=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files that the commands name, and their programs on the path."""
    folder = tmp_path_factory.mktemp("readme")
    rows = [
        {"question": f"What is {i} + {j}?", "answer": f"#### {i + j}"}
        for i in range(30)
        for j in range(30)
    ]
    for name in ("problems.jsonl", "PROMPTS.jsonl", "FILE.jsonl"):
        trainer_tools.write_jsonl(folder / name, rows)
    (folder / "my_rewards.py").write_text(
        "def score(completions, **columns):\n    return [len(c) / 10 for c in completions]\n"
    )
    (folder / "ppo.yaml").write_text("max_operand: 30\nhidden_size: 32\n")
    tiny(folder / "PATH")
    tiny(folder / "SFT")
    tiny(folder / "RM", reward=True)
    (folder / "examples").symlink_to(ROOT / "examples")
    # As pip makes them: the first entry of sys.path is the script's folder, not the current one.
    programs = folder / "bin"
    programs.mkdir()
    start = "import sys; from rlhf_kernels.cli import main; sys.exit(main())"
    scripts = {
        "rlhf-kernels": f"#!{sys.executable}\n{start}\n",
        "python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n',
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    return folder


def run(command: str, folder: Path) -> str:
    """Output of a command line, which must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (command, done.stdout[-500:], done.stderr[-2000:])
    return done.stdout


def test_every_command_is_run_or_skipped_for_a_reason(place):
    ran = []
    for line in (line for path in DOCS for line in commands(path)):
        if line.startswith(tuple(SKIPPED)):
            continue
        more = next((flags for start, flags in SHORTER.items() if line.startswith(start)), "")
        run(f"{line} {more}", place)
        ran.append(line)
    assert [line.split()[0] for line in ran] == [*["python"] * 3, "rlhf-kernels"]
    # The default output folder, in the current one.
    log = (place / "runs" / "grpo" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(log[0])["reward/score"] > 0


def test_the_half_of_a_launch_that_is_ours(place, monkeypatch, capsys):
    (line,) = [line for line in commands(TRAINER) if line.startswith("accelerate launch")]
    launcher, module, rest = line.partition(" -m rlhf_kernels.trainer ")
    assert module and (place / re.search(r"--config_file (\S+)", launcher)[1]).is_file()
    monkeypatch.chdir(place)
    assert cli.main(["train", *rest.split(), "--dry_run", "--device", "cpu"]) == 0
    assert "ppo on arithmetic" in capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_with_the_command_in_their_head(path, place, monkeypatch, capsys):
    head = " ".join(re.findall(r"^# ?(.*)$", path.read_text(), re.MULTILINE)).replace("\\ ", " ")
    command = re.search(r"rlhf-kernels (train \w+ --config \S+(?:\s+--\w+ [\w./]+)*)", head)[1]
    monkeypatch.chdir(place)
    assert cli.main([*command.split(), "--dry_run", "--device", "cpu", "--threads", "1"]) == 0
    settings = json.loads((text := capsys.readouterr().out)[text.index("\n{") :])
    assert settings["output_dir"] == f"runs/{path.stem}"


def test_every_flag_that_is_mentioned_exists():
    known = {
        f.name for stage in cli.TRAINERS for made in settings_of(stage)[0] for f in fields(made)
    }
    known |= {"config", "traceback", "help", "any_setting"}
    # These flags belong to accelerate, torchrun, Ray and the doctor.
    other = {"config_file", "nproc_per_node", "runtime-env-json", "integrations"}
    found = {}
    for path in (*DOCS, *EXAMPLES, ROOT / "examples" / "pipeline.sh"):
        for flag in re.findall(r"(?<![\w-])--([A-Za-z][\w-]*)", path.read_text()):
            found.setdefault(flag, path.name)
    unknown = {flag: name for flag, name in found.items() if flag not in known | other}
    assert not unknown
    assert {"reward_funcs", "resume", "dry_run", "config"} <= found.keys()


def test_python_of_the_readme():
    """The step, on a model of transformers."""
    pytest.importorskip("transformers")
    step, _ = blocks(README, "python")
    torch.manual_seed(0)
    model = small_model("llama")
    ids = torch.randint(3, 90, (16, 7))
    given = {
        "model": model, "input_ids": ids, "rewards": torch.rand(16),
        "mask": torch.ones(16, 6).bool(), "print": lambda *_: None,
    }  # fmt: skip
    exec(compile(step, "README: A step of GRPO", "exec"), given)
    metrics = given["result"].metrics.as_dict()
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["tokens"] == 16 * 6
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0


def test_python_of_the_patches():
    """Patch and report, as README and docs/integrations.md have them; taken back at the end."""
    pytest.importorskip("trl")
    trl = pytest.importorskip("rlhf_kernels.integrations.trl")
    report, patch = blocks(ROOT / "docs" / "integrations.md", "python")[:2]
    for code in (blocks(README, "python")[1], patch):
        shown: list[str] = []
        try:
            exec(compile(code, "the patch", "exec"), {})
            exec(compile(report, "the report", "exec"), {"print": shown.append})
        finally:
            trl.unpatch()
        assert shown and shown[0]


def test_python_of_a_step_of_ppo():
    """The two blocks of the table of operations, in a namespace of what the text presumes."""
    use, head = blocks(ROOT / "docs" / "operations" / "index.md", "python")
    torch.manual_seed(0)
    tokens, words, units = 6, 30, 8

    def model(input_ids):
        return SimpleNamespace(logits=output(body(input_ids).last_hidden_state))

    embedding, output = torch.nn.Embedding(words, units), torch.nn.Linear(units, words, bias=False)

    def body(input_ids):
        return SimpleNamespace(last_hidden_state=embedding(input_ids))

    model.model, model.lm_head = body, output
    ids = torch.randint(words, (2, tokens))
    old = -3.5 * torch.ones(2, tokens - 1)
    values = torch.zeros(2, tokens - 1)
    given = {
        "model": model, "input_ids": ids, "scores": torch.tensor([1.0, -1.0]), "values": values,
        "old_logprobs": old, "ref_logprobs": old.clone(), "mask": torch.ones_like(old).bool(),
        "new_values": torch.ones_like(values).requires_grad_(), "print": lambda *_: None,
    }  # fmt: skip
    exec(compile(use, "operations: from logits", "exec"), given)
    logits = model(ids).logits[:, :-1] / 0.9
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(given["logprobs"], expected)
    assert output.weight.grad.abs().sum() > 0 and given["new_values"].grad is not None
    given["config"] = rk.PolicyLossConfig.dapo()
    exec(compile(head, "operations: from hidden states", "exec"), given)
    assert given["policy"].loss.isfinite()


def test_python_of_the_integrations():
    """The loop and the subclass of docs/integrations.md, on a model and a batch made up here."""
    transformers = pytest.importorskip("transformers")
    _, _, loop, subclass = blocks(ROOT / "docs" / "integrations.md", "python")
    torch.manual_seed(0)
    model = small_model("llama")
    ids = torch.randint(3, 90, (16, 7))
    kept = torch.ones_like(ids)
    kept[:, :3] = 0
    with torch.no_grad():
        old = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    given = {
        "model": model, "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "completion_mask": kept, "rewards": torch.rand(16), "updates": 2,
        "old_logprobs": old.gather(-1, ids[:, 1:, None])[..., 0],
        "optimizer": torch.optim.SGD(model.parameters(), 0.1), "print": lambda *_: None,
        "transformers": transformers,
    }  # fmt: skip
    exec(compile(loop, "integrations.md: A plain PyTorch loop", "exec"), given)
    metrics = given["result"].metrics.as_dict()
    # The second update no longer takes the sampling policy's own step.
    assert metrics["tokens"] == 16 * 4 and metrics["k3_old"] > 0
    exec(compile(subclass, "integrations.md: A subclass", "exec"), given)
    labels = ids.where(kept != 0, -100)
    expected = model(input_ids=ids, labels=labels).loss
    compute_loss = given["Supervised"].compute_loss
    found = compute_loss(None, model, {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(found, expected)
    count = torch.tensor(100)
    found, _ = compute_loss(None, model, {"input_ids": ids, "labels": labels}, True, count)
    torch.testing.assert_close(found, expected * 16 * 4 / 100)
