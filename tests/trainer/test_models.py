"""The trainer's networks and its sampler."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
)

from tests.trainer.trainer_tools import (
    one_thread,  # noqa: F401
    online_trainer,
    supervised,
    supervised_batch,
    tiny_policy,
    tiny_task,
)

from rlhf_kernels.trainer import models, probe, rewards
from rlhf_kernels.trainer.config import ModelConfig
from rlhf_kernels.trainer.data import Row, bpe_tokenizer, pad, prompt_tokens
from rlhf_kernels.trainer.generation import generate
from rlhf_kernels.trainer.vllm_engine import VLLMEngine

CHAT = [{"role": "user", "content": "Hi"}]


def test_padding_does_not_change_hidden_states_values_and_rewards():
    task = tiny_task()
    policy = tiny_policy(task)
    critic = models.build_critic(policy, ModelConfig())
    torch.nn.init.normal_(critic.score.weight)
    rows = [Row("1+2=", "3"), Row("10-22=", "-12")]
    together = supervised_batch(task, rows)
    rewards_together = models.sequence_rewards(critic, together)
    for i, row in enumerate(rows):
        alone = supervised_batch(task, [row])
        width = alone.completion_mask.shape[1]
        for function, model in (
            (lambda m, b: models.lm_head(m, b).hidden, policy),
            (models.values, critic),
        ):
            inside = function(model, together)[i, :width]
            torch.testing.assert_close(inside, function(model, alone)[0], atol=1e-5, rtol=1e-5)
        # The first value and hidden state are those of the prompt's last token.
        ids = torch.tensor([task.tokenizer(row.prompt)["input_ids"]])
        head = models.lm_head(policy, together)
        logits = torch.nn.functional.linear(head.hidden[i, 0], head.weight)
        expected = policy(input_ids=ids).logits[0, -1]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        reward = models.sequence_rewards(critic, alone)[0]
        torch.testing.assert_close(rewards_together[i], reward, atol=1e-5, rtol=1e-5)


_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIZES |= {"intermediate_size": 32, "vocab_size": 50, "num_key_value_heads": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**_SIZES, head_dim=16, final_logit_softcapping=3.0),
        GraniteConfig(**_SIZES, logits_scaling=4.0),
        GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2),
    ],
)
def test_head_of_other_architectures(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    ids = torch.randint(50, (2, 7))
    batch = models.Batch(ids, torch.ones_like(ids, dtype=torch.bool), ids[:, 3:] >= 0)
    with torch.no_grad():
        found = models.lm_head(model, batch).logprobs(batch.labels)
        logits = model(input_ids=ids).logits[:, 2:-1]
    expected = torch.log_softmax(logits, -1).gather(2, ids[:, 3:, None])[..., 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    probe.check_head(model)


def test_head_that_does_more_is_refused():
    task = tiny_task()
    policy = tiny_policy(task)
    forward = policy.forward

    def doubled(*args, **kwargs):
        found = forward(*args, **kwargs)
        return type(found)(logits=found.logits * 2)

    policy.forward = doubled
    with pytest.raises(ValueError, match="LlamaForCausalLM does more"):
        probe.check_head(policy)


def test_lora_trains_adapters_and_switches_them_off_as_reference():
    pytest.importorskip("peft")
    task = tiny_task()
    policy = tiny_policy(task, lora_rank=4)
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    reference = models.Reference(policy)
    assert reference.model is None
    trainer = online_trainer("grpo", policy=policy, learning_rate=5e-2, warmup_steps=1)
    first, second = trainer.step(), trainer.step()
    assert first["kl"] == pytest.approx(0.0, abs=1e-5) and abs(second["kl"]) > 1e-3


def test_gradient_checkpointing_changes_no_gradient():
    task = tiny_task()
    batch = supervised_batch(task, task.train[:8])
    found = []
    for checkpointing in (False, True):
        policy = tiny_policy(task, gradient_checkpointing=checkpointing)
        seen = []
        layer = policy.model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        models.lm_head(policy, batch).logprobs(batch.labels).sum().backward()
        assert len(seen) == 1 + checkpointing
        # Decoding keeps its cache.
        logprobs = online_trainer("ppo", policy=policy).rollout()[1].logprobs
        assert logprobs.isfinite().all() and not policy.training
        found.append([p.grad for p in policy.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_greedy_generation_is_that_of_transformers():
    task = tiny_task()
    policy = tiny_policy(task)
    # A few supervised steps: a random model would emit one token for ever.
    supervised(policy, task, 60, 3e-3)
    ids, mask = pad([prompt_tokens(task.tokenizer, r.prompt) for r in task.held_out], 0, left=True)
    assert not mask.all()
    options = {"eos_token_id": task.tokenizer.eos_token_id}
    options["pad_token_id"] = task.tokenizer.pad_token_id
    ours = generate(policy, ids, mask, torch.zeros(len(ids), 8), temperature=0, **options).batch
    theirs = policy.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=8, **options
    )
    width = theirs.shape[1]
    assert torch.equal(ours.input_ids[:, :width], theirs)
    assert (ours.input_ids[:, width:] == options["pad_token_id"]).all()
    lengths = ours.completion_mask.sum(1)
    assert lengths.min() < lengths.max()
    for row, length in zip(ours.completion_ids, lengths, strict=True):
        assert (row[: length - 1] != options["eos_token_id"]).all()
        assert (row[length:] == options["pad_token_id"]).all()


def test_sampling_follows_the_model_and_belongs_to_the_row():
    task = tiny_task()
    policy = tiny_policy(task)
    with torch.no_grad():
        policy.lm_head.weight.mul_(20)
    ids, mask = pad([task.tokenizer("1+2=")["input_ids"]] * 4096, 0, left=True)
    options = {"eos_token_id": task.tokenizer.eos_token_id, "pad_token_id": 0, "temperature": 2.0}
    uniforms = torch.rand(4096, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch, logprobs = generate(policy, ids, mask, uniforms, **options)
    logits = policy(input_ids=ids[:1]).logits[0, -1]
    expected = torch.softmax(logits / 2.0, -1).detach()
    found = batch.completion_ids[:, 0].bincount(minlength=len(expected)) / 4096
    assert expected.max() > 2 * expected.mean()
    torch.testing.assert_close(found, expected, atol=0.04, rtol=0)
    torch.testing.assert_close(logprobs[:, 0].exp(), expected[batch.completion_ids[:, 0]])
    part = generate(policy, ids[100:120], mask[100:120], uniforms[100:120], **options)
    assert torch.equal(part.batch.input_ids, batch.input_ids[100:120])


def test_critic_starts_at_zero_and_holds_the_policys_weights():
    task = tiny_task()
    policy = tiny_policy(task)
    critic = models.build_critic(policy, ModelConfig())
    batch = supervised_batch(task, [Row("1+2=", "3")])
    assert torch.equal(models.values(critic, batch), torch.zeros(1, 2))
    weights = dict(critic.model.named_parameters())
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, weights[name])
        assert weight.data_ptr() != weights[name].data_ptr()


def test_truncated_completions_are_not_finished():
    trainer = online_trainer("ppo", batch_size=64, generation_batch_size=24)
    seen = {}

    def spy(prompts, completions, completion_ids, answer, finished, **columns):
        seen.update(ids=completion_ids, finished=finished, answer=answer, texts=completions)
        return [0.0] * len(prompts)

    sample = trainer.sample
    sample.rewards, sample.max_new_tokens = rewards.Rewards([spy], [1.0]), 3
    rows, eos = sample.task.train[:64], sample.task.tokenizer.eos_token_id
    found = sample(rows, temperature=1.0)
    assert seen["finished"] == [ids[-1] == eos for ids in seen["ids"]] == found.finished.tolist()
    assert {True, False} == set(seen["finished"])
    assert all(eos not in ids[:-1] and len(ids) <= 3 for ids in seen["ids"])
    assert seen["answer"] == [r.completion for r in rows]
    # An end token at once is an empty completion of one token.
    assert any(
        text == "" and len(ids) == 1 for text, ids in zip(seen["texts"], seen["ids"], strict=True)
    )


def test_conversations_reach_rewards_as_messages():
    sample = online_trainer("ppo").sample
    seen = {}

    def spy(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions)
        return [1.0] * len(prompts)

    tokenizer = bpe_tokenizer(["user: Hi assistant: Hello"] * 3, 300)
    sample.task = type(sample.task)("chat", tokenizer, [Row(CHAT)], [Row(CHAT)])
    sample.engine.tokenizer, sample.rewards = tokenizer, rewards.Rewards([spy], [1.0])
    policy = models.build_policy(ModelConfig(hidden_size=32, num_heads=2), tokenizer, max_length=64)
    sample.learner.networks.policy = policy
    sample([Row(CHAT)], temperature=1.0)
    assert seen["prompts"] == [CHAT]
    assert [m["role"] for m in seen["completions"][0]] == ["assistant"]


def test_packing_changes_neither_states_nor_gradients():
    task = tiny_task()
    rows = [Row("1+2=", "3"), Row("10-22=", "-12"), Row("7+8=", "15")]
    batch, found = supervised_batch(task, rows), []
    for packing in (False, True):
        policy = tiny_policy(task, packing=packing)
        seen = []
        layer = policy.model.layers[0]
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape))
        logprobs = models.lm_head(policy, batch).logprobs(batch.labels)
        logprobs.sum().backward()
        assert seen[0][:2] == ((1, int(batch.attention_mask.sum())) if packing else (3, 10))
        rewards = models.sequence_rewards(models.build_critic(policy, ModelConfig()), batch)
        found.append([logprobs, rewards, *(p.grad for p in policy.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


class FakeLLM:
    """vLLM's interface as far as the engine uses it: greedy, by the weights that it was given."""

    made = None

    def __init__(self, model, **options):
        type(self).made = options
        self.model = AutoModelForCausalLM.from_pretrained(model)
        torch.nn.init.zeros_(self.model.lm_head.weight)
        runner = SimpleNamespace(model=self)
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def load_weights(self, weights):
        self.model.load_state_dict(dict(weights))

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, params, use_tqdm):
        return [self.complete(*pair) for pair in zip(prompts, params, strict=True)]

    def complete(self, prompt, params):
        ids, tokens, logprobs = list(prompt["prompt_token_ids"]), [], []
        while len(tokens) < params.max_tokens and not {*tokens[-1:]} & {*params.stop_token_ids}:
            scores = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).detach()
            tokens.append(int(scores.argmax()))
            ids.append(tokens[-1])
            logprobs.append({tokens[-1]: SimpleNamespace(logprob=float(scores.max()))})
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=logprobs)])


def test_vllm_engine_completes_as_ours(monkeypatch, tmp_path):
    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = FakeLLM, SimpleNamespace
    fake.__spec__ = ModuleSpec("vllm", None)
    trainer = online_trainer("ppo")
    task, learner = trainer.sample.task, trainer.learner
    with pytest.raises(ValueError, match="engine: expected the package vllm"):
        VLLMEngine(learner, task.tokenizer, tmp_path, max_length=64, memory=0.5)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    engine = VLLMEngine(learner, task.tokenizer, tmp_path, max_length=64, memory=0.5)
    assert FakeLLM.made["max_model_len"] == 64
    assert FakeLLM.made["logprobs_mode"] == "processed_logprobs"
    supervised(learner.networks.policy, task, 60, 3e-3)
    # Only the model declares this end token; it must end completions of ours and of vLLM's.
    digit = task.tokenizer.convert_tokens_to_ids("1")
    learner.networks.policy.generation_config.eos_token_id = [task.tokenizer.eos_token_id, digit]
    ours = trainer.sample(task.held_out[:16], temperature=0).trimmed()
    assert (ours.batch.completion_ids == digit).any()
    trainer.sample.engine = engine
    theirs = trainer.sample(task.held_out[:16], temperature=0).trimmed()
    assert ours.finished.any()
    for a, b in zip(ours.batch, theirs.batch, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.scores, theirs.scores)
    with pytest.raises(ValueError, match="engine: expected 'transformers' with FSDP or LoRA"):
        monkeypatch.setattr(learner.networks.policy, "disable_adapter", None, raising=False)
        VLLMEngine(learner, task.tokenizer, tmp_path, max_length=64, memory=0.5)
