"""Numbers that are not: a run stops before its weights change, and says which rows."""

import math

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from tests.trainer.trainer_tools import (
    accelerator,
    one_thread,  # noqa: F401
    online_trainer,
    tiny_policy,
    tiny_task,
    write_jsonl,
)

import rlhf_kernels as rk
from rlhf_kernels import cli
from rlhf_kernels.trainer import checkpoint, models, online
from rlhf_kernels.trainer.config import ModelConfig, OptimConfig
from rlhf_kernels.trainer.finite import Micro, NonFinite, check_weights, finite
from rlhf_kernels.trainer.learner import Learner
from rlhf_kernels.trainer.objectives import SFT
from rlhf_kernels.trainer.offline import OfflineTrainer
from rlhf_kernels.trainer.timing import timed


def sft(**options) -> OfflineTrainer:
    task = tiny_task()
    policy = tiny_policy(task)
    optim = OptimConfig(
        **{"batch_size": 16, "micro_batch_size": 4, "warmup_steps": 1, "total_steps": 50} | options
    )
    learner = Learner(accelerator(), {"policy": policy}, {"policy": 1e-3}, optim)
    made = SFT(task.tokenizer, None)
    return OfflineTrainer(learner, made, task.train[:64], task.held_out[:8], optim, seed=0)


def state(trainer) -> list[torch.Tensor]:
    """Weights and moments."""
    learner = trainer.learner
    moments = [
        t
        for s in learner.optimizer.state.values()
        for t in s.values()
        if isinstance(t, torch.Tensor)
    ]
    return [t.detach().clone() for t in [*learner.networks.parameters(), *moments]]


def same(trainer, before) -> bool:
    now = state(trainer)
    return len(now) == len(before) and all(map(torch.equal, now, before))


class _NanGradient(torch.autograd.Function):
    """The identity, with a gradient of NaN where `bad`."""

    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (math.nan if ctx.bad else 1.0), None


def poison(trainer, what: str, number: int = 5, steps: int = 1):
    """Makes the loss or the gradient of one row of the next batches NaN; returns that row."""
    items = trainer.next_items()
    trainer.next_items = lambda: items
    wanted, objective = items[number], trainer.objective
    plain, left = type(objective).loss, [steps]

    def loss(networks, part, size):
        found, metrics = plain(objective, networks, part, size)
        bad = any(item is wanted for item in part) and left[0] > 0
        if what == "loss":
            return found * (math.nan if bad else 1.0), metrics
        return _NanGradient.apply(found, bad), metrics

    objective.loss = loss
    return wanted, left


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_the_row_is_named_and_nothing_changes(what):
    trainer = sft()
    trainer.step()
    wanted, _ = poison(trainer, what)
    before = state(trainer)
    # The sixth row is in the second micro-batch of four.
    with pytest.raises(
        NonFinite, match=f"step 1, micro-batch 2 of 4, {what} is not finite"
    ) as found:
        trainer.step()
    assert same(trainer, before) and trainer.steps_done == 1
    text = trainer.objective.tokenizer.decode(wanted[0]).replace(" ", "")
    message = str(found.value)
    assert text in message and message.count("row") <= 2 + message.count("rows")
    assert "learning_rate" in message and "\n" not in message
    assert not found.value.broken


def test_some_steps_in_a_row_may_pass():
    trainer = sft(skip_nonfinite=2)
    trainer.step()
    _, left = poison(trainer, "loss", steps=1)
    before = state(trainer)
    for _ in range(2):
        left[0] = 1
        row = trainer.step()
        assert row["skipped"] == 1.0 and math.isnan(row["grad_norm"]) and same(trainer, before)
    left[0] = 0
    assert trainer.step()["skipped"] == 0.0 and not same(trainer, before)
    left[0], before = 1, state(trainer)
    trainer.step()
    trainer.step()
    with pytest.raises(NonFinite):
        trainer.step()
    assert same(trainer, before) and trainer.steps_done == 6


def test_weights_that_an_update_breaks_stop_the_run():
    trainer = sft()
    trainer.learner.rates = [3e38]
    with pytest.raises(NonFinite, match=r"step 0: weights are not finite .* 3e\+38") as found:
        trainer.step()
    assert found.value.broken
    trainer = sft()
    plain = trainer.learner.optimizer.step

    def step():
        plain()
        with torch.no_grad():
            list(trainer.learner.networks.parameters())[-1].view(-1)[-1] = math.inf

    trainer.learner.optimizer.step = step
    with pytest.raises(NonFinite, match="step 0: weights are not finite after the update") as found:
        trainer.step()
    assert found.value.broken


def test_weights_that_are_loaded():
    task = tiny_task()
    policy = tiny_policy(task)
    name, weight = list(policy.named_parameters())[3]
    weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match=f"policy: expected finite weights, .* in {name}"):
        check_weights("policy", policy)
    with pytest.raises(ValueError, match="policy: expected finite weights"):
        Learner(accelerator(), {"policy": policy}, {"policy": 1e-3}, OptimConfig())
    trainer = sft()
    held = trainer.learner.state_dict()
    held["weights"] = {k: v * math.nan for k, v in held["weights"].items()}
    with pytest.raises(ValueError, match="expected finite weights"):
        trainer.learner.load_state_dict(held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite_of_every_dtype_and_place(dtype, bad):
    tensors = [
        torch.randn(7, 33).to(dtype),
        torch.randn(1000).to(dtype),
        torch.ones((), dtype=dtype),
    ]
    assert finite([*tensors, torch.arange(3), torch.empty(0)])
    # Large, and yet finite: squares would not be.
    assert finite([torch.full((5,), torch.finfo(dtype).max, dtype=dtype)])
    for tensor in tensors:
        copies = [t.clone() for t in tensors]
        index = next(i for i, t in enumerate(tensors) if t is tensor)
        copies[index].view(-1)[-1] = bad
        assert not finite(copies)


def test_float16_weights_are_refused():
    with pytest.raises(ValueError, match=r"dtype: .*mixed_precision fp16 keeps float32 weights"):
        ModelConfig(dtype="float16")
    policy = tiny_policy(tiny_task()).half()
    with pytest.raises(ValueError, match="dtype: expected float32 or bfloat16"):
        Learner(accelerator(), {"policy": policy}, {"policy": 1e-3}, OptimConfig())
    Learner(accelerator(), {"policy": policy.bfloat16()}, {"policy": 1e-3}, OptimConfig())


# --- a loss scale --------------------------------------------------------------------------------


def scaled(scale: float = 65536.0, **options) -> OfflineTrainer:
    """A trainer whose engine has the loss scale that mixed_precision fp16 has on a GPU."""
    trainer = sft(**options)
    learner = trainer.learner
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    learner.accelerator.scaler = scaler
    learner.accelerator.native_amp = True
    learner.accelerator.state._mixed_precision = "fp16"
    learner.optimizer = AcceleratedOptimizer(learner.optimizer.optimizer, scaler=scaler)
    learner.accelerator._optimizers = [learner.optimizer]
    return trainer


@pytest.fixture
def no_mixed_precision():
    yield
    accelerator().state._mixed_precision = "no"


@pytest.mark.usefixtures("no_mixed_precision")
def test_infinite_gradients_under_a_loss_scale_are_the_scalers():
    trainer = scaled()
    scaler = trainer.learner.accelerator.scaler
    _, left = poison(trainer, "gradient norm")
    before = state(trainer)
    trainer.step()
    assert scaler.get_scale() == 32768.0 and trainer.learner.skipped == 0
    assert all(map(torch.equal, before, trainer.learner.networks.parameters()))
    left[0] = 0
    trainer.step()
    assert not all(map(torch.equal, before, trainer.learner.networks.parameters()))
    # A checkpoint holds the scale.
    held = trainer.learner.state_dict()
    scaler.update(8.0)
    trainer.learner.load_state_dict(held)
    assert scaler.get_scale() == 32768.0
    left[0] = 1
    with pytest.raises(NonFinite, match=r"the loss scale of mixed_precision fp16 fell to 0\.5"):
        for _ in range(17):
            trainer.step()


@pytest.mark.usefixtures("no_mixed_precision")
def test_a_loss_that_is_not_finite_is_no_business_of_the_scaler():
    trainer = scaled(skip_nonfinite=1)
    scaler = trainer.learner.accelerator.scaler
    _, left = poison(trainer, "loss")
    before = state(trainer)
    assert trainer.step()["skipped"] == 1.0
    assert scaler.get_scale() == 65536.0 and same(trainer, before)
    left[0] = 0
    trainer.step()
    assert not same(trainer, before)


@pytest.mark.usefixtures("no_mixed_precision")
def test_several_networks_under_a_loss_scale():
    """Gradients are divided by the scale once, whatever the number of norms."""
    norms = []
    for scale in (1.0, 1024.0):
        trainer = online_trainer("ppo", epochs=1)
        learner = trainer.learner
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        learner.accelerator.scaler, learner.accelerator.native_amp = scaler, True
        learner.accelerator.state._mixed_precision = "fp16"
        learner.optimizer = AcceleratedOptimizer(learner.optimizer.optimizer, scaler=scaler)
        learner.accelerator._optimizers = [learner.optimizer]
        row = trainer.step()
        norms.append((row["policy/grad_norm"], row["value/grad_norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and min(norms[0]) > 0


# --- online --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["sampler", "advantage", "critic", "reference", "reward"])
def test_a_rollout_that_is_not_finite(what, monkeypatch):
    trainer = online_trainer("ppo", skip_nonfinite=1, reward_normalize=True)
    trainer.step()
    before, moments = state(trainer), dict(trainer.moments.state_dict())
    plain = trainer.rollout

    def rollout():
        rows, samples = plain()
        if what == "sampler":
            samples.logprobs[3, 0] = math.nan
        if what == "reward":
            samples.scores[3] = math.inf
        return rows, samples

    trainer.rollout = rollout
    if what == "advantage":
        real = trainer.algorithm.advantages

        def advantages(rollout):
            found, returns = real(rollout)
            found[3, 0] = math.nan
            return found, returns

        algorithm = online.dataclasses.replace(trainer.algorithm, advantages=advantages)
        trainer.algorithm = algorithm
    if what in ("critic", "reference"):
        network = trainer.learner.networks.critic if what == "critic" else trainer.reference.model
        head = models.scalar_head(network) if what == "critic" else network.get_output_embeddings()
        head.register_forward_hook(lambda m, i, o: o * math.nan)
        if what == "reference":
            with torch.no_grad():
                head.weight.fill_(math.nan)
    row = trainer.step()
    assert row["skipped"] == 1.0 and row["step"] == 1 and same(trainer, before)
    if what in ("sampler", "reward"):
        assert trainer.moments.state_dict() == moments
    with pytest.raises(NonFinite, match=f"step 2, rollout: .*{what}.* is not finite in completion"):
        trainer.step()
    assert same(trainer, before) and math.isfinite(trainer.kl.value)


@pytest.mark.parametrize("name", ["policy", "value", "ptx"])
def test_losses_of_an_online_step(name, monkeypatch):
    """Policy, critic and supervised losses; the first update of two is passed over."""
    trainer = online_trainer("ppo", skip_nonfinite=1, ptx_coef=0.1, epochs=1, mini_batch_size=16)
    before, calls = state(trainer), [0]
    plain = {"policy": models.Head.policy_loss, "value": rk.value_loss}.get(name)

    def bad(*args, **kwargs):
        calls[0] += 1
        found = plain(*args, **kwargs)
        # The explanation looks at every row alone.
        return found._replace(loss=found.loss * math.nan) if calls[0] == 1 else found

    if name == "ptx":
        plain_ptx = type(trainer.ptx.objective).loss

        def loss(networks, part, size):
            calls[0] += 1
            found, metrics = plain_ptx(trainer.ptx.objective, networks, part, size)
            return found * (math.nan if calls[0] == 1 else 1.0), metrics

        trainer.ptx.objective.loss = loss
    elif name == "policy":
        monkeypatch.setattr(models.Head, "policy_loss", bad)
    else:
        monkeypatch.setattr(online.rk, "value_loss", bad)
    row = trainer.step()
    assert row["skipped"] == 1.0 and not same(trainer, before)
    assert all(math.isfinite(v) for v in row.values())
    trainer.learner.config.skip_nonfinite = 0
    calls[0], before = 0, state(trainer)
    with pytest.raises(NonFinite, match=r"step 1, micro-batch \d of 2, loss is not"):
        trainer.step()
    assert same(trainer, before)


@pytest.mark.parametrize("micro", [0, 4])
def test_an_online_loss_names_its_completions(monkeypatch, micro):
    trainer = online_trainer("ppo", epochs=1, mini_batch_size=16, micro_batch_size=micro)
    before, plain, held = state(trainer), models.Head.policy_loss, []

    def bad(head, labels, *args, **kwargs):
        # The completion at the end of the first micro-batch, whatever is beside it.
        held.extend([] if held else [labels[-1].clone()])
        found = plain(head, labels, *args, **kwargs)
        own = bool((labels == held[0]).all(1).any())
        return found._replace(loss=found.loss * (math.nan if own else 1.0))

    monkeypatch.setattr(models.Head, "policy_loss", bad)
    row = (micro or 16) - 1
    where = rf"step 0, micro-batch 1 of {16 // (micro or 16)}, loss is not finite: completion {row}"
    with pytest.raises(NonFinite, match=rf"{where} \('.*' -> '.*'\); weights stay"):
        trainer.step()
    assert same(trainer, before)


def test_evaluation_that_is_not_finite():
    trainer = sft()
    plain, wanted = type(trainer.objective).loss, trainer.held_out[2]

    def loss(networks, part, size):
        found, metrics = plain(trainer.objective, networks, part, size)
        return found * (math.nan if any(i is wanted for i in part) else 1.0), metrics

    trainer.objective.loss = loss
    with pytest.raises(NonFinite, match=r"evaluation: loss is not finite: held-out row 2 \("):
        trainer.evaluate()
    online = online_trainer("grpo")
    with torch.no_grad():
        next(online.learner.networks.policy.parameters()).fill_(math.nan)
    with pytest.raises(NonFinite, match="evaluation: the policy's log-probability is not finite"):
        online.evaluate()


# --- the command line ----------------------------------------------------------------------------


def test_a_run_that_stops_keeps_its_last_good_state(tmp_path, monkeypatch, capsys):
    """Saved at the failure, named by file and line, and continued where it can be."""
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(40)]
    data = write_jsonl(tmp_path / "sums.jsonl", rows)
    flags = f"--data {data} --device cpu --threads 1 --eval_size 8 --batch_size 8 --vocab_size 280"
    flags += " --hidden_size 16 --num_layers 1 --num_heads 2 --total_steps 6 --learning_rate 1e-3"
    assert cli.main(["train", "sft", *flags.split(), "--output_dir", str(tmp_path / "good")]) == 0
    plain, seen = SFT.loss, [0]

    def loss(self, networks, items, size):
        found, metrics = plain(self, networks, items, size)
        training = torch.is_grad_enabled()
        seen[0] += training
        bad = seen[0] == 4
        return found * (math.nan if bad else 1.0), metrics

    monkeypatch.setattr(SFT, "loss", loss)
    out = ["--output_dir", str(tmp_path / "bad")]
    assert cli.main(["train", "sft", *flags.split(), *out]) == 2
    (line,) = [n for n in capsys.readouterr().err.splitlines() if n.startswith("rlhf-kernels")]
    assert "step 3, micro-batch 1 of 1, loss is not finite: " in line and "sums.jsonl:" in line
    assert line.endswith("--resume continues from step 3")
    assert not (tmp_path / "bad" / "policy").exists()
    held = checkpoint.load(checkpoint.newest(tmp_path / "bad"), "sft")
    assert held["trainer"]["steps_done"] == 3
    monkeypatch.setattr(SFT, "loss", plain)
    assert cli.main(["train", "sft", *flags.split(), *out, "--resume"]) == 0
    good, bad = (tmp_path / n / "policy" / "model.safetensors" for n in ("good", "bad"))
    assert good.read_bytes() == bad.read_bytes()


def test_micro_batches_have_rows():
    micro = Micro(lambda networks, rows: sum(rows), [1, 2, 3], str)
    assert micro(None) == 6 and [m(None) for m in micro.each()] == [1, 2, 3]
    assert [str(m) for m in micro.each()] == ["1", "2", "3"]


def test_the_stopwatch_is_read_at_every_offline_step():
    trainer = sft()
    for _ in range(3):
        row = trainer.step()
        assert 0 < row["time/kernels"] < row["time/step"] and timed.spans == []
