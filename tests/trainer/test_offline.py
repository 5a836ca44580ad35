"""The stages that learn from a dataset: supervised, reward model and DPO."""

import json
import math
import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.trainer.trainer_tools import (
    CPU,
    accelerator,
    one_thread,  # noqa: F401
    supervised,
    tiny_policy,
    tiny_task,
    write_jsonl,
)

import rlhf_kernels as rk
from rlhf_kernels import cli
from rlhf_kernels.config.enums import PREFERENCE_LOSSES
from rlhf_kernels.config.preference import OF_DIFFERENCES, REFERENCE_FREE
from rlhf_kernels.trainer import models
from rlhf_kernels.trainer.config import (
    DPOConfig,
    KTOConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    UserError,
)
from rlhf_kernels.trainer.data import Row
from rlhf_kernels.trainer.learner import Learner
from rlhf_kernels.trainer.offline import (
    DPO,
    KTO,
    SFT,
    OfflineTrainer,
    RewardModelling,
    wilson_interval,
)


def preferences(count: int = 200) -> list[Row]:
    """Prefers the right sum to a wrong one."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        a, b = draw.randrange(9), draw.randrange(9)
        rows.append(Row(f"{a}+{b}=", None, str(a + b), str(a + b + draw.choice([1, -1, 2]))))
    return rows


def labelled() -> list[Row]:
    """Every other completion is wrong, and labelled so."""
    return [
        Row(r.prompt, r.rejected if i % 2 else r.chosen, columns={"label": i % 2 == 0})
        for i, r in enumerate(preferences())
    ]


def offline_trainer(objective: str, *, micro=0, seed=0, rows=None, rate=3e-3, **options):
    task = tiny_task()
    optim = OptimConfig(
        batch_size=32, learning_rate=rate, warmup_steps=1, micro_batch_size=micro, total_steps=100
    )
    if objective == "reward":
        torch.manual_seed(seed)
        config = ModelConfig(hidden_size=32, num_heads=2)
        network = models.build_reward_model(config, task.tokenizer, max_length=64)
        made = RewardModelling(task.tokenizer, None, RewardConfig(**options))
        networks = {"reward": network}
    else:
        policy = tiny_policy(task, seed)
        networks = {"policy": policy}
        made = SFT(task.tokenizer, None)
        if objective == "dpo":
            config = DPOConfig(**options)
            reference = models.Reference(policy) if config.has_reference else None
            made = DPO(task.tokenizer, None, config, reference)
        if objective == "kto":
            made = KTO(task.tokenizer, None, KTOConfig(**options), models.Reference(policy))
    learner = Learner(accelerator(), networks, dict.fromkeys(networks, rate), optim)
    made_rows = {"sft": lambda: task.train[:200], "kto": labelled}
    rows = rows or made_rows.get(objective, preferences)()
    return OfflineTrainer(learner, made, rows[:-40], rows[-40:], optim, seed=seed)


OBJECTIVES = [
    ("sft", {}),
    ("reward", {"margin": 0.5, "center_coef": 0.1}),
    ("dpo", {}),
    ("dpo", {"loss_type": ["ipo"]}),
    ("dpo", {"loss_type": ["robust"], "label_smoothing": 0.1}),
    ("dpo", {"loss_type": ["hinge"]}),
    ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.5}),
    ("dpo", {"loss_type": ["simpo"], "beta": 2.0}),
    ("kto", {"beta": 0.5}),
    ("kto", {"loss_type": "apo_zero_unpaired", "beta": 0.5}),
]


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
def test_loss_falls_and_held_out_metrics_improve(objective, options):
    trainer = offline_trainer(objective, **options)
    before = trainer.evaluate()["scores"]
    rows = [trainer.step() for _ in range(40)]
    after = trainer.evaluate()["scores"]
    assert after["loss"] < before["loss"]
    assert sum(r["loss"] for r in rows[-5:]) < sum(r["loss"] for r in rows[:5])
    if objective != "sft":
        # What the answer's first token cannot tell stays at chance.
        assert after["accuracy"] > 0.6 and after["accuracy"] > before["accuracy"]
        assert after["accuracy_low"] < after["accuracy"] < after["accuracy_high"]
        assert after["margin"] > max(0.0, before["margin"])


@pytest.mark.parametrize(("objective", "options"), OBJECTIVES)
def test_gradient_of_micro_batches_is_the_whole_batchs(objective, options):
    found = []
    for micro in (0, 5, 16):
        trainer = offline_trainer(objective, micro=micro, **options)
        if objective in ("dpo", "kto"):
            # Away from the reference, where the margin is 0.
            with torch.no_grad():
                for p in trainer.learner.networks.parameters():
                    p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        metrics = trainer._sum(trainer.learner.accumulate(trainer.losses(trainer.next_items())))
        gradients = {n: p.grad.clone() for n, p in trainer.learner.networks.named_parameters()}
        found.append((metrics, gradients))
    (metrics, whole), *others = found
    assert max(g.abs().max() for g in whole.values()) > 1e-4
    for other, parts in others:
        assert other == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        for name, g in whole.items():
            torch.testing.assert_close(parts[name], g, atol=2e-6, rtol=5e-4)


def test_sft_loss_is_the_models_own():
    trainer = offline_trainer("sft")
    items = trainer.next_items()
    loss, _ = trainer.losses(items)[0](trainer.learner.networks)
    total, count = 0.0, 0
    policy = trainer.learner.networks.policy
    for prompt, completion in items:
        ids = torch.tensor([prompt + completion])
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        total += policy(input_ids=ids, labels=labels).loss.item() * len(completion)
        count += len(completion)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def sequence_sum(model, prompt: list[int], completion: list[int]) -> float:
    """log p(completion | prompt) from the model's own logits."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return logprobs.gather(-1, ids[0, 1:, None])[-len(completion) :].sum().item()


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("micro", [0, 5])
def test_kto_loss_from_its_definition(loss_type, micro):
    """Shows the Kahneman-Tversky loss of 2402.01306, its baseline from mismatched examples."""
    trainer = offline_trainer(
        "kto",
        micro=micro,
        loss_type=loss_type,
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.1,
    )
    policy = trainer.learner.networks.policy
    # Away from the reference, where the baseline is 0.
    for _ in range(12):
        trainer.step()
    items = trainer.next_items()

    def ratio(prompt, completion):
        frozen = trainer.reference.model
        own = sequence_sum(policy, prompt, completion)
        return own - sequence_sum(frozen, prompt, completion)

    kl = sum(ratio(x.prompt, items[i - 1].completion) for i, x in enumerate(items)) / len(items)
    baseline = max(kl, 0.0) if loss_type == "kto" else 0.0
    assert baseline > 0.01 or loss_type != "kto"
    expected = 0.0
    for x in items:
        z = 0.3 * (ratio(x.prompt, x.completion) - baseline)
        sigmoid = 1 / (1 + math.exp(z if x.desirable else -z))
        expected += (1.5 if x.desirable else 0.1) * sigmoid / len(items)
    metrics = trainer._sum([f(trainer.learner.networks)[1] for f in trainer.losses(items)])
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["kl"] == pytest.approx(baseline, rel=1e-4, abs=1e-6)
    good = [0.3 * ratio(x.prompt, x.completion) for x in items if x.desirable]
    assert metrics["reward_desirable"] == pytest.approx(sum(good) / len(good), rel=1e-4)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_loss_from_its_definition(loss_type):
    trainer = offline_trainer("dpo", loss_type=[loss_type], beta=0.3)
    policy, reference = trainer.learner.networks.policy, trainer.objective.reference.model
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    items = trainer.next_items()
    loss, metrics = trainer.losses(items)[0](trainer.learner.networks)

    def logprob(model, prompt, completion):
        ids = torch.tensor([prompt + completion])
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1], -1)
        picked = logprobs.gather(1, torch.tensor(completion)[:, None]).sum()
        return picked / len(completion) if loss_type == "ipo" else picked

    expected, right = 0.0, 0.0
    for pair in items:
        d = (
            logprob(policy, pair.prompt, pair.chosen)
            - logprob(reference, pair.prompt, pair.chosen)
            - logprob(policy, pair.prompt, pair.rejected)
            + logprob(reference, pair.prompt, pair.rejected)
        )
        if loss_type == "ipo":
            expected += (d - 1 / 0.6).square().item() / len(items)
        else:
            expected -= torch.nn.functional.logsigmoid(0.3 * d).item() / len(items)
        right += float(d > 0) / len(items)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert metrics["accuracy"].item() == pytest.approx(right)


@pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
def test_every_preference_loss_by_name(loss_type):
    """With what the trainer gives it: lengths, shared lengths, the reference where there is one."""
    options = {"label_smoothing": 0.1} if loss_type == "exo_pair" else {}
    options |= {"ld_alpha": 0.5} if loss_type != "sft" else {}
    options |= {"f_divergence_type": "js_divergence"} if loss_type in OF_DIFFERENCES else {}
    trainer = offline_trainer("dpo", loss_type=[loss_type], **options)
    policy, reference = trainer.learner.networks.policy, trainer.objective.reference
    assert (reference is None) == (loss_type in REFERENCE_FREE)
    before = [] if reference is None else [{k: v.clone() for k, v in policy.state_dict().items()}]
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    items = trainer.next_items()
    loss, metrics = trainer.losses(items)[0](trainer.learner.networks)

    def sums():
        found = torch.zeros(2, len(items))
        for i, pair in enumerate(items):
            shared = min(len(pair.chosen), len(pair.rejected))
            for side, answer in enumerate((pair.chosen, pair.rejected)):
                logits = policy(input_ids=torch.tensor([pair.prompt + answer])).logits[0]
                picked = torch.log_softmax(logits[len(pair.prompt) - 1 : -1], -1)
                picked = picked.gather(1, torch.tensor(answer)[:, None])[:, 0]
                rest = 1.0 if loss_type == "sft" else 0.5
                found[side, i] = picked[:shared].sum() + rest * picked[shared:].sum()
        return found

    with torch.no_grad():
        values = [sums()]
        for state in before:
            policy.load_state_dict(state)
            values.append(sums())
    given = {"f_divergence": options.get("f_divergence_type", "reverse_kl")}
    expected = rk.preference_loss(
        *torch.cat(values), loss=loss_type, label_smoothing=options.get("label_smoothing", 0.0),
        chosen_lengths=torch.tensor([len(p.chosen) for p in items]),
        rejected_lengths=torch.tensor([len(p.rejected) for p in items]), **given,
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    margins = expected.chosen_rewards - expected.rejected_rewards
    assert metrics["margin"].item() == pytest.approx(margins.mean().item(), rel=1e-3, abs=1e-5)


def test_reward_margins_come_from_the_column_first():
    rows = [r._replace(columns={"margin": 2.0}) for r in preferences(100)]
    trainer = offline_trainer("reward", rows=rows, margin=0.5)
    assert {p.margin for p in trainer.train} == {2.0}
    items = trainer.next_items()
    loss, _ = trainer.losses(items)[0](trainer.learner.networks)
    batch = trainer.objective.batch(items, CPU)
    chosen, rejected = models.sequence_rewards(trainer.learner.networks.reward, batch).chunk(2)
    assert loss.item() == pytest.approx(
        rk.reward_model_loss(chosen, rejected, margin=2.0).loss.item(), rel=1e-5
    )
    assert {p.margin for p in offline_trainer("reward", margin=0.5).train} == {0.5}


def test_completions_that_are_too_long_are_dropped():
    task = tiny_task()
    objective = SFT(task.tokenizer, 3)
    assert objective.encode(Row("1+2=", "33")) is not None
    assert objective.encode(Row("1+2=", "333")) is None


def test_wilson_interval():
    # Newcombe 1998: 15 of 148.
    low, high = wilson_interval(15 / 148, 148)
    assert low == pytest.approx(0.0624, abs=2e-4) and high == pytest.approx(0.1605, abs=2e-4)


def test_pipeline_by_the_command_line(tmp_path):
    """SFT, then reward model and DPO on it, then PPO with the reward model, all from files."""
    text = [{"prompt": r.prompt, "completion": r.chosen} for r in preferences()]
    pairs = [
        {"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in preferences()
    ]
    shared = ["--eval_size", "20", "--threads", "1", "--batch_size", "16", "--total_steps", "3"]
    shared += ["--max_new_tokens", "6"]
    sft = ["--data", write_jsonl(tmp_path / "text.jsonl", text), "--vocab_size", "280"]
    sft += ["--hidden_size", "32", "--num_heads", "2", "--output_dir", str(tmp_path / "sft")]
    assert cli.main(["train", "sft", *shared, *sft]) == 0
    model = ["--model", str(tmp_path / "sft" / "policy")]
    data = ["--data", write_jsonl(tmp_path / "pairs.jsonl", pairs)]
    labels = [
        {"prompt": r.prompt, "completion": r.completion, "label": r.columns["label"]}
        for r in labelled()
    ]
    labels = ["--data", write_jsonl(tmp_path / "labels.jsonl", labels)]
    # KTO takes preferences too: a desirable and an undesirable completion each.
    runs = {"reward": data, "dpo": data, "kto": data, "kto labels": labels}
    for run, rows in runs.items():
        out = ["--output_dir", str(tmp_path / run)]
        assert cli.main(["train", run.split()[0], *shared, *model, *rows, *out]) == 0
        summary = json.loads((tmp_path / run / "summary.json").read_text())
        keys = {"loss", "accuracy", "accuracy_low", "accuracy_high", "margin"}
        assert keys <= summary["held_out_after"].keys()
        assert (tmp_path / run / "curves.png").exists()
    reward = tmp_path / "reward" / "reward"
    loaded = AutoModelForSequenceClassification.from_pretrained(reward)
    assert loaded.score.weight.shape == (1, 32)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": r["prompt"]} for r in text])
    ppo = ["--data", prompts, "--reward_funcs", str(reward), "--critic_model", str(reward)]
    ppo += ["--output_dir", str(tmp_path / "ppo"), "--reward_normalize"]
    assert cli.main(["train", "ppo", *shared, *model, *ppo]) == 0
    log = (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()
    assert len(log) == 3 and "reward/reward" in json.loads(log[0])


def test_supervised_helper_learns():
    task = tiny_task()
    losses = supervised(tiny_policy(task), task, 30, 3e-3)
    assert losses[-1] < losses[0] - 0.3


def test_rows_that_are_too_long_are_counted_and_never_all_dropped():
    task = tiny_task()
    network = tiny_policy(task)
    learner = Learner(accelerator(), {"policy": network}, {"policy": 1e-3}, OptimConfig())
    rows = [Row("1=", "1" * n) for n in (1, 2, 9, 9)]
    made = OfflineTrainer(
        learner, SFT(task.tokenizer, 4), rows, rows[1:3], OptimConfig(batch_size=2), seed=0
    )
    assert (len(made.train), len(made.held_out), made.dropped) == (2, 1, 3)
    for train, held_out, name in ((rows[2:], [], "2 training"), (rows, rows[3:], "1 held-out")):
        with pytest.raises(UserError, match=f"max_new_tokens: .* of all {name} rows are longer"):
            OfflineTrainer(learner, SFT(task.tokenizer, 4), train, held_out, OptimConfig(), seed=0)


def test_a_margin_of_null_stops_the_reward_stage_alone(tmp_path, capsys):
    rows = [
        {"prompt": f"p{i} ", "chosen": f"a{i}", "rejected": f"b{i}", "margin": None}
        for i in range(12)
    ]
    flags = f"--data {write_jsonl(tmp_path / 'd.jsonl', rows)} --vocab_size 280 --total_steps 1"
    sizes = (
        "--device cpu --hidden_size 16 --num_layers 1 --num_heads 2 --batch_size 4 --eval_size 4"
    )
    for stage, status in (("dpo", 0), ("kto", 0), ("reward", 2)):
        out = ["--output_dir", str(tmp_path / stage)]
        assert cli.main(["train", stage, *flags.split(), *sizes.split(), *out]) == status
    assert "d.jsonl:1: 'margin': expected a finite number of fp32, found None" in (
        capsys.readouterr().err
    )
