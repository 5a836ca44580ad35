"""The online step: every algorithm, its ratio, its gradients, KL control, PPO's variants."""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from tests.trainer.trainer_tools import (
    one_thread,  # noqa: F401
    online_trainer,
    timeless,
    tiny_policy,
    tiny_task,
)

import rlhf_kernels as rk
from rlhf_kernels.trainer import models
from rlhf_kernels.trainer.algorithms import ALGORITHMS
from rlhf_kernels.trainer.config import OnlineConfig
from rlhf_kernels.trainer.modes import settled
from rlhf_kernels.trainer.rewards import Rewards
from rlhf_kernels.trainer.rollout import Samples, merge


class Call(NamedTuple):
    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@pytest.fixture
def calls(monkeypatch):
    """The calls of kernels that a test causes; weights as they were."""
    found = []

    def spy(name):
        function = getattr(rk, name)

        def called(*args, **kwargs):
            copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            found.append(Call(name, tuple(copies), kwargs))
            return function(*args, **kwargs)

        monkeypatch.setattr(rk, name, called)

    for name in ("linear_policy_loss", "group_advantages", "value_loss"):
        spy(name)
    return found


def losses_of(calls):
    return [c for c in calls if c.function == "linear_policy_loss"]


def old_and_new(call):
    """Old log-probabilities of a policy loss, and those of its own hidden states."""
    hidden, weight, labels, old = call.args[:4]
    with torch.no_grad():
        new = rk.linear_token_logprobs(hidden, weight, labels).logprobs
    return old, new


# A teacher has its own test: what it teaches is no reward.
REWARDED = [name for name, algorithm in ALGORITHMS.items() if not algorithm.teacher]


@pytest.mark.parametrize("name", REWARDED)
@pytest.mark.parametrize("micro_batch_size", [0, 8])
def test_first_ratio_is_exactly_one(name, micro_batch_size, calls):
    trainer = online_trainer(name, epochs=1, micro_batch_size=micro_batch_size, dynamic_sampling=1)
    row = trainer.step()
    assert row["policy/ratio_min"] == row["policy/ratio_max"] == 1.0
    assert row["policy/clip_frac_low"] == row["policy/clip_frac_high"] == 0.0
    assert row["policy/k3_old"] == row["policy/k1_old"] == 0.0
    found = losses_of(calls)
    assert len(found) == (32 // micro_batch_size if micro_batch_size else 1)
    # The policy's own, whatever the number of tokens of a product.
    assert all(old_and_new(call)[0] is None for call in found)
    assert all((old_and_new(call)[1] < 0).any() for call in found)
    assert row["policy/grad_norm"] > 0


@pytest.mark.parametrize(("mini_batch_size", "epochs"), [(8, 1), (16, 2), (32, 2)])
def test_first_ratio_of_several_updates(mini_batch_size, epochs, calls):
    torch.set_num_threads(2)
    trainer = online_trainer("ppo", mini_batch_size=mini_batch_size, epochs=epochs)
    trainer.step()
    found = losses_of(calls)
    assert len(found) == epochs * 32 // mini_batch_size
    assert torch.equal(*old_and_new(found[0]))
    assert not torch.equal(*old_and_new(found[-1]))


@pytest.mark.parametrize("name", ["ppo", "grpo", "reinforce++"])
def test_one_update_does_not_recompute(name, calls):
    """The policy's forward passes of a step: one with gradients, none before it."""
    trainer = online_trainer(name, epochs=1, kl_coef=0.0)
    seen = []
    policy = models.causal_lm(trainer.learner.networks.policy)
    hook = policy.base_model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    generated = trainer.rollout()[1]
    decoded = len(seen)
    trainer.rollout = lambda: ([], generated)
    trainer.step()
    hook.remove()
    assert seen[decoded:] == [True]


def test_first_ratio_is_one_in_a_model_with_dropout(calls):
    task = tiny_task()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(task.tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    assert config.resid_pdrop > 0 and config.attn_pdrop > 0
    policy = settled(AutoModelForCausalLM.from_config(config)).train()
    row = online_trainer("ppo", policy=policy, mini_batch_size=8, epochs=1).step()
    assert row["kl"] == pytest.approx(0.0, abs=1e-5)
    assert torch.equal(*old_and_new(losses_of(calls)[0]))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradient_of_micro_batches_is_the_whole_batchs(name):
    """Accumulation over micro-batches gives the gradient of the full batch."""
    gradients = []
    for micro in (0, 8, 12):
        # Rewards differ within groups, lengths between rows.
        trainer = online_trainer(
            name, epochs=1, micro_batch_size=micro, dynamic_sampling=1, max_grad_norm=1e9,
            kl_coef=0.1, entropy_coef=0.01,
        )  # fmt: skip
        with torch.no_grad():
            for p in trainer.reference.model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        seen = {}

        def step(steps, frozen=(), learner=trainer.learner, seen=seen):
            for n, p in learner.networks.named_parameters():
                seen[n] = p.grad.clone()
            return torch.ones(1)

        trainer.learner.step = step
        trainer.step()
        gradients.append(seen)
    whole, *others = gradients
    assert max(g.abs().max() for g in whole.values()) > 1e-4
    for parts in others:
        for n, g in whole.items():
            torch.testing.assert_close(parts[n], g, atol=2e-6, rtol=2e-4, msg=lambda m, n=n: n + m)


def test_only_policy_and_critic_move():
    trainer = online_trainer("ppo")
    networks = trainer.learner.networks
    parts = (networks.policy, networks.critic, trainer.reference.model)
    before = [torch.cat([p.detach().flatten().clone() for p in m.parameters()]) for m in parts]
    trainer.step()
    after = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in parts]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [True, True, False]


def test_runs_repeat_bitwise():
    def run(seed: int) -> list[dict[str, float]]:
        trainer = online_trainer("ppo", seed=seed, kl_target=1.0, mini_batch_size=16)
        # Unrelated use of the global generator must not matter.
        torch.rand(seed + 1)
        return [timeless(trainer.step()) for _ in range(3)]

    first, second, other = run(0), run(0), run(1)
    assert first == second
    assert first != other
    assert all(math.isfinite(v) for row in first for v in row.values())


# Settings with which each algorithm learns `sevens` in 20 steps. A random policy scores below
# 0.15.
_FAST = {"learning_rate": 5e-3, "warmup_steps": 1, "batch_size": 64, "total_steps": 20}
_OPTIONS = {"ppo": {"critic_learning_rate": 5e-3, "epochs": 1}, "gspo": {"mini_batch_size": 32}}


@pytest.mark.parametrize("name", REWARDED)
def test_algorithm_raises_the_reward(name):
    trainer = online_trainer(name, **_FAST | {"kl_coef": 0.0} | _OPTIONS.get(name, {}))
    rewards = [trainer.step()["reward"] for _ in range(20)]
    assert rewards[0] < 0.15
    assert sum(rewards[-3:]) / 3 > 0.5, rewards


def test_distillation_has_the_gradient_of_the_reverse_kl_at_the_sampled_tokens():
    task = tiny_task()
    teacher = tiny_policy(task, seed=7)
    trainer = online_trainer(
        "distill", teacher=teacher, kl_coef=0.5, max_grad_norm=1e9, temperature=0.7
    )
    policy, seen = models.causal_lm(trainer.learner.networks.policy), {}
    samples = trainer.rollout()[1]
    trainer.rollout = lambda: ([], samples)

    def step(*_, **__):
        seen.update((n, p.grad.clone()) for n, p in policy.named_parameters())
        return torch.ones(1)

    trainer.learner.step = step
    trainer.step()
    batch = samples.batch

    def logprobs(model):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        found = (logits / 0.7).log_softmax(-1)[:, :-1].gather(-1, batch.input_ids[:, 1:, None])
        return found.squeeze(-1)[:, -batch.completion_mask.shape[1] :]

    own = logprobs(policy)
    with torch.no_grad():
        apart = logprobs(teacher) - own
    loss = -(0.5 * apart * own)[batch.completion_mask].mean()
    policy.zero_grad()
    loss.backward()
    assert max(g.abs().max() for g in seen.values()) > 1e-3
    for n, p in policy.named_parameters():
        torch.testing.assert_close(seen[n], p.grad, atol=1e-6, rtol=1e-3, msg=lambda m, n=n: n + m)


def test_distillation_approaches_the_teacher_and_ignores_rewards():
    teacher = tiny_policy(tiny_task(), seed=7)
    with torch.no_grad():
        # Far from uniform.
        teacher.lm_head.weight.mul_(8.0)
    before = [p.clone() for p in teacher.parameters()]
    trainer = online_trainer("distill", teacher=teacher, **_FAST)
    kl = [trainer.step()["kl"] for _ in range(20)]
    assert sum(kl[-3:]) / 3 < 0.6 * kl[0], kl
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    runs = []
    for reward in (0.0, 5.0):
        trainer = online_trainer("distill", teacher=teacher)
        same = [lambda completions, r=reward, **_: [r] * len(completions)]
        trainer.sample.rewards.functions[:] = same
        runs.append([trainer.step()["kl"] for _ in range(2)])
    assert runs[0] == runs[1]


def test_kl_penalty_holds_the_policy_back():
    def final_kl(name: str, kl_coef: float) -> float:
        trainer = online_trainer(name, kl_coef=kl_coef, learning_rate=5e-3, warmup_steps=1)
        return [trainer.step()["kl"] for _ in range(8)][-1]

    for name in ("ppo", "grpo", "rloo"):
        assert final_kl(name, 2.0) < 0.6 * final_kl(name, 1e-6), name


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_kl_is_that_of_the_sampled_completions(name):
    trainer = online_trainer(name, learning_rate=5e-3, warmup_steps=1, epochs=1)
    trainer.step()
    samples = []
    rollout = trainer.rollout
    trainer.rollout = lambda: samples.append(rollout()) or samples[-1]
    batch_and_policy = {}

    def step(*args, run=trainer.learner.accumulate, **kwargs):
        batch = samples[-1][1].batch
        networks = trainer.learner.networks
        with torch.no_grad():
            new = models.lm_head(networks.policy, batch).logprobs(batch.labels)
            ref = models.lm_head(trainer.reference.model, batch).logprobs(batch.labels)
        batch_and_policy["kl"] = (new - ref).sum(1).mean().item()
        return run(*args, **kwargs)

    trainer.learner.accumulate = step
    row = trainer.step()
    assert row["kl"] == pytest.approx(batch_and_policy["kl"], rel=1e-3)
    assert abs(row["kl"]) > 1e-3


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_adaptive_kl_follows_its_target(name):
    trainer = online_trainer(
        name, kl_coef=0.02, kl_target=1e-7, kl_horizon=320.0, learning_rate=5e-3, warmup_steps=1
    )
    coefficients = []
    for _ in range(4):
        row = trainer.step()
        coefficients.append((row["kl_coef"], row["kl"]))
    for (now, kl), (then, _) in itertools.pairwise(coefficients):
        # The first KL is 0 but for rounding; the later ones are far from this target.
        error = min(max(kl / 1e-7 - 1, -0.2), 0.2)
        assert then == pytest.approx(now * (1 + 0.1 * error))
    if name == "grpo":
        # The loss before last used the coefficient of its step.
        assert trainer.loss.kl_coef == coefficients[-1][0]


def test_ppo_penalty_adapts_its_coefficient():
    options = {"objective": "penalty", "epochs": 3, "learning_rate": 3e-3, "warmup_steps": 1}
    trainer = online_trainer("ppo", **options, penalty_coef=1.0, penalty_target=1e-9)
    assert trainer.loss.objective == "penalty"
    trainer.step()
    assert trainer.loss.penalty_coef == 2.0
    trainer = online_trainer("ppo", **options, penalty_coef=1.0, penalty_target=1e9)
    assert trainer.step()["policy/k3_old"] > 0
    assert trainer.loss.penalty_coef == 0.5
    with pytest.raises(ValueError, match="penalty_target"):
        online_trainer("ppo", **options | {"epochs": 1}, penalty_target=0.1)


def test_critic_warm_up_trains_the_critic_alone():
    trainer = online_trainer("ppo", critic_warmup_steps=1, learning_rate=1e-2)
    networks = trainer.learner.networks

    def weights(network):
        return torch.cat([p.detach().flatten().clone() for p in network.parameters()])

    policy, critic = weights(networks.policy), weights(networks.critic)
    trainer.step()
    assert torch.equal(policy, weights(networks.policy))
    assert not torch.equal(critic, weights(networks.critic))
    trainer.step()
    assert not torch.equal(policy, weights(networks.policy))


def test_critic_from_a_reward_model(tmp_path):
    task = tiny_task()
    policy = tiny_policy(task)
    torch.manual_seed(3)
    from rlhf_kernels.trainer.config import ModelConfig

    config = ModelConfig(hidden_size=32, num_heads=2)
    reward = models.build_reward_model(config, task.tokenizer, max_length=64)
    reward.save_pretrained(tmp_path / "rm")
    critic = models.build_critic(policy, config, str(tmp_path / "rm"))
    theirs = dict(reward.named_parameters())
    for name, weight in critic.named_parameters():
        assert torch.equal(weight, theirs[name]), name
    assert models.scalar_head(critic).weight.abs().sum() > 0


def test_reward_normalisation_and_clip():
    trainer = online_trainer("ppo", reward_normalize=True, reward_clip=0.5)
    samples = trainer.rollout()[1]
    shaped = trainer._shaped(samples)
    raw = samples.scores.double()
    expected = ((raw - raw.mean()) / raw.std()).clamp(-0.5, 0.5).float()
    torch.testing.assert_close(shaped, expected)
    assert shaped.abs().max() == 0.5
    again = trainer._shaped(samples._replace(scores=samples.scores + 10))
    both = torch.cat([raw, raw + 10])
    torch.testing.assert_close(
        again, ((raw + 10 - both.mean()) / both.std()).clamp(-0.5, 0.5).float()
    )


def test_overlong_penalty():
    trainer = online_trainer("dapo", overlong_buffer=2)
    samples = trainer.rollout()[1]
    lengths = samples.batch.completion_mask.sum(1)
    for score, shaped, n, done in zip(
        samples.scores, trainer._shaped(samples), lengths, samples.finished, strict=True
    ):
        # Of 5 tokens the last 2 cost, and what is cut off costs 1.
        penalty = {4: -0.5, 5: -1.0}.get(int(n), 0.0) if done else -1.0
        assert shaped == pytest.approx(float(score) + penalty)
    assert {True, False} == set(samples.finished.tolist())


def test_joint_gradient_clip():
    norms = {}
    for joint in (False, True):
        trainer = online_trainer("ppo", joint_grad_clip=joint, max_grad_norm=1e-3, epochs=1)
        after = {}

        def grab(
            *args, run=trainer.learner.optimizer.step, learner=trainer.learner, after=after, **kw
        ):
            for group, name in zip(learner.optimizer.param_groups, ("p", "c"), strict=True):
                after[name] = torch.stack([p.grad.norm() for p in group["params"]]).norm().item()
            return run(*args, **kw)

        trainer.learner.optimizer.step = grab
        trainer.step()
        norms[joint] = after
    assert norms[False] == {"p": pytest.approx(1e-3, rel=1e-2), "c": pytest.approx(1e-3, rel=1e-2)}
    assert math.hypot(*norms[True].values()) == pytest.approx(1e-3, rel=1e-2)


def test_ptx_loss_adds_the_supervised_gradient():
    def change(coefficient: float):
        trainer = online_trainer("ppo", ptx_coef=coefficient, epochs=1, max_grad_norm=1e9)
        seen = {}

        def step(steps, frozen=()):
            for n, p in trainer.learner.networks.policy.named_parameters():
                seen[n] = p.grad.clone()
            return torch.ones(2)

        trainer.learner.step = step
        trainer.step()
        return seen, trainer

    without, _ = change(0.0)
    once, trainer = change(1.5)
    networks, ptx = trainer.learner.networks, trainer.ptx
    ptx.sampler.order = torch.empty(0, dtype=torch.long)
    ptx.sampler.generator.manual_seed(0)
    trainer.learner.optimizer.zero_grad()
    loss, _ = ptx.losses(ptx.next_items())[0](networks)
    loss.backward()
    for name, p in networks.policy.named_parameters():
        torch.testing.assert_close(once[name], without[name] + 1.5 * p.grad, atol=1e-5, rtol=1e-3)


def test_importance_correction_uses_the_samplers_logprobs(calls):
    trainer = online_trainer("grpo", correction="token", correction_max=1.5)
    rollout = trainer.rollout
    rows, samples = rollout()
    mask = samples.batch.completion_mask
    # The sampler claims to have been far less certain: every weight is cut at its bound.
    trainer.rollout = lambda: (rows, samples._replace(logprobs=samples.logprobs - 3.0))
    row = trainer.step()
    assert row["policy/correction_mean"] == pytest.approx(1.5)
    call = losses_of(calls)[0]
    torch.testing.assert_close(
        call.kwargs["rollout_logprobs"][mask] + 3.0,
        old_and_new(call)[1][mask],
        atol=1e-4,
        rtol=1e-4,
    )
    assert call.kwargs["config"].correction_max == 1.5


def test_samplers_logprobs_are_the_trainers():
    trainer = online_trainer("ppo", temperature=0.7)
    samples = trainer.rollout()[1]
    head = models.lm_head(trainer.learner.networks.policy, samples.batch)
    with torch.no_grad():
        expected = head.logprobs(samples.batch.labels, temperature=0.7)
    torch.testing.assert_close(samples.logprobs, expected, atol=1e-5, rtol=1e-5)


def test_dynamic_sampling_keeps_groups_that_differ():
    trainer = online_trainer("dapo", num_generations=4, batch_size=16, dynamic_sampling=8)
    drawn = []

    def second(prompts, **_):
        # The first group alone differs.
        drawn.append(prompts)
        return [float(i == 1) for i in range(16)]

    trainer.sample.rewards = Rewards([second], [1.0])
    rows, samples = trainer.rollout()
    assert len(drawn) == 4
    groups = samples.scores.view(4, 4)
    assert (groups.std(1) > 0).all() and samples.batch.input_ids.shape[0] == 16
    assert [r.prompt for r in rows] == [d[0] for d in drawn]
    ids, task = samples.batch.input_ids, trainer.sample.task
    for i, row in enumerate(rows):
        prompt = ids[4 * i][: -samples.batch.completion_mask.shape[1]]
        prompt = prompt[samples.batch.attention_mask[4 * i][: len(prompt)]]
        assert task.tokenizer.decode(prompt) == row.prompt


def test_merge_pads_prompts_on_the_left():
    trainer = online_trainer("ppo", batch_size=4)
    rows = sorted(trainer.sample.task.train, key=lambda r: len(r.prompt))
    short = trainer.sample(rows[:4], temperature=1.0)
    long = trainer.sample(rows[-4:], temperature=1.0)
    both: Samples = merge([short, long], trainer.sample.task.tokenizer.pad_token_id)
    for part, start in ((short, 0), (long, 4)):
        chosen = both.select(torch.arange(start, start + 4))
        for i in range(4):
            kept = chosen.batch.input_ids[i][chosen.batch.attention_mask[i]]
            assert torch.equal(kept, part.batch.input_ids[i][part.batch.attention_mask[i]])
        assert torch.equal(chosen.scores, part.scores)


def test_remax_counts_from_the_greedy_completion(calls):
    trainer = online_trainer("remax", num_generations=2, temperature=2.0)
    trainer.step()
    found = next(c for c in calls if c.function == "group_advantages")
    greedy = found.kwargs["greedy_rewards"]
    assert torch.equal(greedy[0::2], greedy[1::2])
    advantages = losses_of(calls)[0].args[4]
    torch.testing.assert_close(advantages, found.args[0] - greedy)


def test_bad_settings_are_refused():
    cases = [
        ({"mini_batch_size": 7}, "mini_batch_size: expected a divisor of batch_size=32"),
        ({"num_generations": 5}, "num_generations: expected a divisor of batch_size=32"),
        ({"dynamic_sampling": 2}, "dynamic_sampling: expected 1 where num_generations is 1"),
        ({"clip_low": 2.0}, "clip_low"),
        ({"temperature": 0.0}, "temperature"),
        ({"objective": "what"}, "objective"),
    ]
    for options, match in cases:
        with pytest.raises(ValueError, match=match):
            online_trainer("ppo", **options)
    assert dataclasses.asdict(OnlineConfig())["clip_low"] is None
