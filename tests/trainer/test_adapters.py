"""Adapters: continued, referred to, saved and loaded again, over chains of stages."""

import json
import math
import types

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
)

from tests.trainer import model_zoo
from tests.trainer.trainer_tools import (
    one_thread,  # noqa: F401
    supervised,
    supervised_batch,
    tiny_policy,
    tiny_task,
    write_jsonl,
)

from rlhf_kernels.trainer import adapters, checks, models, run
from rlhf_kernels.trainer.config import ModelConfig, UserError
from rlhf_kernels.trainer.data import bpe_tokenizer

peft = pytest.importorskip("peft")

IDS = torch.tensor([[3, 7, 5, 4, 9, 2]])
ROWS = models.Batch(IDS, torch.ones_like(IDS, dtype=torch.bool), IDS[:, 3:] >= 0)
SIZES = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer(["what is one and two it is three"] * 3, 290)


def base_model(folder, tokenizer, config=None, cls=AutoModelForCausalLM, **more):
    torch.manual_seed(0)
    config = config or LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, **more)
    cls.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def saved_adapter(folder, base, tokenizer, config, cls=AutoModelForCausalLM):
    """An adapter on disk that changes the model."""
    model = peft.get_peft_model(cls.from_pretrained(base), config)
    disturb(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def disturb(model, scale=0.1):
    """Moves everything that is trained, as an optimizer's step does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += scale * torch.randn(weight.shape, generator=generator).to(weight.dtype)


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear"} | options)


def policy_of(path, tokenizer, **options):
    return models.build_policy(ModelConfig(model=path, **options), tokenizer, max_length=64)


def logits_of(model):
    with torch.no_grad():
        return models.causal_lm(model)(input_ids=IDS).logits


class _Networks:
    def __init__(self, policy):
        self.policy = policy


def hidden(head):
    return torch.nn.functional.linear(head.hidden, head.weight).detach()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_an_adapter_is_trained_further_and_its_model_is_the_reference(
    tmp_path, tokenizer, rank, dtype
):
    base = base_model(tmp_path / "base", tokenizer)
    path = saved_adapter(tmp_path / "sft", base, tokenizer, lora())
    sft = peft.AutoPeftModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    policy = policy_of(path, tokenizer, lora_rank=rank, dtype=dtype)
    assert torch.equal(logits_of(policy), logits_of(sft))
    theirs = logits_of(AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)))
    # transformers itself rounds the adapter to the dtype; peft and we keep it in fp32.
    tolerance = 0.02 if dtype == "bfloat16" else 0.0
    torch.testing.assert_close(theirs, logits_of(sft), atol=tolerance, rtol=tolerance)
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    assert not torch.equal(logits_of(policy), logits_of(bare))
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n and ".default." in n for n in trained)
    # The reference is the policy as it was, also when the policy has moved.
    reference = models.Reference(policy)
    assert reference.model is None and reference.adapter is not None
    assert [n for n, p in policy.named_parameters() if p.requires_grad] == trained
    start = hidden(models.lm_head(policy, ROWS))
    assert torch.equal(hidden(reference(_Networks(policy), ROWS)), start)
    disturb(policy)
    moved = hidden(models.lm_head(policy, ROWS))
    assert not torch.equal(moved, start)
    assert torch.equal(hidden(reference(_Networks(policy), ROWS)), start)
    assert torch.equal(hidden(models.lm_head(policy, ROWS)), moved)
    assert [n for n, p in policy.named_parameters() if p.requires_grad] == trained
    # What is saved is one adapter, of the same base model, and loads everywhere.
    adapters.save_network(policy, tmp_path / "out", policy.state_dict())
    assert not (tmp_path / "out" / adapters.FROZEN).exists()
    again = policy_of(str(tmp_path / "out"), tokenizer, dtype=dtype)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=getattr(torch, dtype)
    )
    assert torch.equal(logits_of(again), logits_of(policy))
    assert torch.equal(auto(input_ids=IDS).logits, logits_of(policy))


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True),
        lora(use_rslora=True, lora_alpha=2),
        lora(bias="all"),
        lora(modules_to_save=["lm_head", "embed_tokens"]),
        lora(rank_pattern={"q_proj": 2}),
        lora(lora_dropout=0.5),
        lora(target_modules=["embed_tokens", "q_proj"]),
        lora(init_lora_weights="pissa"),
        lora(init_lora_weights="olora"),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(r=2, target_modules=["q_proj"]),
        peft.LoKrConfig(r=2, target_modules=["q_proj"]),
        peft.OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"]),
        peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        peft.HRAConfig(r=2, target_modules=["q_proj"]),
        peft.LNTuningConfig(target_modules=["input_layernorm"]),
    ],
    ids=(
        "dora rslora bias saved ranks dropout embeddings pissa olora "
        "ia3 loha lokr oft vera hra norms"
    ).split(),
)
def test_other_adapters_are_trained_further(tmp_path, tokenizer, config):
    base = base_model(tmp_path / "base", tokenizer, attention_bias=True)
    path = saved_adapter(tmp_path / "sft", base, tokenizer, config)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(path)
    policy = policy_of(path, tokenizer)
    expected = auto(input_ids=IDS).logits
    assert torch.equal(logits_of(policy), expected)
    reference = models.Reference(policy)
    start = hidden(reference(_Networks(policy), ROWS))
    assert torch.equal(hidden(models.lm_head(policy, ROWS)), start)
    loss = models.lm_head(policy, ROWS).logprobs(ROWS.labels).sum()
    loss.backward()
    assert all(p.grad is not None for n, p in policy.named_parameters() if p.requires_grad)
    disturb(policy)
    assert torch.equal(hidden(reference(_Networks(policy), ROWS)), start)
    assert not torch.equal(hidden(models.lm_head(policy, ROWS)), start)
    adapters.save_network(policy, tmp_path / "out", policy.state_dict())
    again = policy_of(str(tmp_path / "out"), tokenizer)
    torch.testing.assert_close(logits_of(again), logits_of(policy), atol=0, rtol=0)


@pytest.mark.parametrize("config", [GPT2Config, OPTConfig])
def test_adapters_of_other_architectures(tmp_path, tokenizer, config):
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2, "ffn_dim": 32}
    made = config(**sizes, num_hidden_layers=1, word_embed_proj_dim=32)
    base = base_model(tmp_path / "base", tokenizer, made)
    fresh = policy_of(base, tokenizer, lora_rank=2)
    reference = models.Reference(fresh)
    assert reference.model is None and reference.adapter is None
    disturb(fresh)
    adapters.save_network(fresh, tmp_path / "out", fresh.state_dict())
    policy = policy_of(str(tmp_path / "out"), tokenizer)
    assert torch.equal(logits_of(policy), logits_of(fresh))
    with torch.no_grad():
        bare = AutoModelForCausalLM.from_pretrained(base)
        off = hidden(reference(_Networks(fresh), ROWS))
        torch.testing.assert_close(off, bare(input_ids=IDS).logits[:, 2:-1])


@pytest.mark.parametrize("made", [MixtralConfig, OlmoeConfig])
def test_experts_take_adapters(tmp_path, tokenizer, made):
    # transformers keeps the weights of all experts in one parameter, which is no linear layer.
    few = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
    config = made(**SIZES | few, intermediate_size=32, num_key_value_heads=2)
    base = base_model(tmp_path / "base", tokenizer, config)
    bare = logits_of(AutoModelForCausalLM.from_pretrained(base))
    fresh = policy_of(base, tokenizer, lora_rank=2)
    assert torch.equal(logits_of(fresh), bare)
    off = models.Reference(fresh)
    disturb(fresh)
    torch.testing.assert_close(hidden(off(_Networks(fresh), ROWS)), bare[:, 2:-1])
    models.lm_head(fresh, ROWS).logprobs(ROWS.labels).sum().backward()
    experts = [p for n, p in fresh.named_parameters() if p.requires_grad and "experts" in n]
    assert experts and all(p.grad.any() for p in experts)
    moved = logits_of(fresh)
    assert (moved - bare).abs().max() > 0.01
    adapters.save_network(fresh, tmp_path / "out", fresh.state_dict())
    again = policy_of(str(tmp_path / "out"), tokenizer)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(again), moved) and torch.equal(logits_of(theirs), moved)
    reference = models.Reference(again)
    # OLMoE has no classifier in transformers: its critic's class is ours.
    critic = models.build_critic(again, ModelConfig())
    expected = models.hidden_states(models.causal_lm(again), ROWS)
    torch.testing.assert_close(models.hidden_states(critic, ROWS), expected, atol=1e-5, rtol=1e-5)
    disturb(again)
    torch.testing.assert_close(hidden(reference(_Networks(again), ROWS)), moved[:, 2:-1])


def test_a_peft_without_target_parameters_has_a_frozen_copy():
    config = types.SimpleNamespace(peft_type="LORA", bias="none", init_lora_weights=True)
    policy = types.SimpleNamespace(peft_config={adapters.TRAINED: config})
    assert adapters.can_freeze_twin(policy)
    config.target_parameters = ["experts.down_proj"]
    assert not adapters.can_freeze_twin(policy)


def test_adapters_that_cannot_be_trained_are_refused_by_name(tmp_path, tokenizer):
    base = base_model(tmp_path / "base", tokenizer)
    path = saved_adapter(tmp_path / "sft", base, tokenizer, lora())
    for options, said in (
        ({"lora_rank": 8}, f"lora_rank: expected unset or 4 as in the adapter of {path}"),
        ({"lora_alpha": 5}, "lora_alpha: expected unset or 8"),
    ):
        with pytest.raises(UserError, match=said):
            policy_of(path, tokenizer, **options)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    odd = saved_adapter(tmp_path / "prompts", base, tokenizer, prompts)
    with pytest.raises(UserError, match=r"found PROMPT_TUNING in .*prompts"):
        policy_of(odd, tokenizer)
    tokens = lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5]})
    odd = saved_adapter(tmp_path / "tokens", base, tokenizer, tokens)
    with pytest.raises(UserError, match="found LORA with trainable_token_indices"):
        policy_of(odd, tokenizer)
    # Their base model is not that of the folder: peft itself loads another model from these.
    for options, said in (
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights 'pissa_niter_4'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "found LORA with layer_replication"),
    ):
        odd = saved_adapter(tmp_path / next(iter(options)), base, tokenizer, lora(**options))
        with pytest.raises(UserError, match=said):
            policy_of(odd, tokenizer)
    odd = saved_adapter(tmp_path / "biased", base, tokenizer, lora(lora_bias=True))
    with pytest.raises(UserError, match="its adapter cannot be merged"):
        models.build_critic(policy_of(odd, tokenizer), ModelConfig())
    head = lora(target_modules=["lm_head"])
    odd = saved_adapter(tmp_path / "head", base, tokenizer, head)
    with pytest.raises(UserError, match="leaves the LM head alone"):
        policy_of(odd, tokenizer)
    # The base model has gone, is another's, or is this folder.
    settings = tmp_path / "sft" / "adapter_config.json"
    content = json.loads(settings.read_text())
    gone = str(tmp_path / "gone")
    other = base_model(tmp_path / "wide", tokenizer, LlamaConfig(**SIZES | {"hidden_size": 64}))
    for name, said in (
        (gone, f"the adapter in {path} is one of {gone}: .* correct base_model_name_or_path"),
        (other, f"the adapter in {path} does not fit {other}"),
        (path, f"the adapter in {path} names its own folder"),
        (None, f"the adapter in {path} names no base model"),
    ):
        settings.write_text(json.dumps(content | {"base_model_name_or_path": name}))
        with pytest.raises(UserError, match=said):
            policy_of(path, tokenizer)
    # One adapter upon another.
    settings.write_text(json.dumps(content))
    upon = json.loads((tmp_path / "biased" / "adapter_config.json").read_text())
    upon = json.dumps(upon | {"base_model_name_or_path": path})
    (tmp_path / "biased" / "adapter_config.json").write_text(upon)
    with pytest.raises(UserError, match=f"one of {path}, which is an adapter too; merge that one"):
        policy_of(str(tmp_path / "biased"), tokenizer)
    # Weights of other names are not left out in silence.
    settings.write_text(json.dumps(content | {"target_modules": ["q_proj"]}))
    with pytest.raises(UserError, match="has beyond the model's weights"):
        policy_of(path, tokenizer)


def test_an_adapter_does_not_replace_its_own_base_model(tmp_path, tokenizer):
    base = base_model(tmp_path / "policy", tokenizer)
    path = saved_adapter(tmp_path / "sft", base, tokenizer, lora())
    for options in ({"model": base, "lora_rank": 4}, {"model": path}):
        with pytest.raises(UserError, match=f"output_dir: .* replace its own base model {base}"):
            checks.check_base(tmp_path, ModelConfig(**options))
        checks.check_base(tmp_path / "other", ModelConfig(**options))
    checks.check_base(tmp_path, ModelConfig(model=base))
    checks.check_base(tmp_path, ModelConfig(lora_rank=4))


def test_an_adapter_of_a_built_model_is_saved_merged(tmp_path):
    task = tiny_task()
    config = ModelConfig(hidden_size=32, num_heads=2, lora_rank=2)
    policy = models.build_policy(config, task.tokenizer, max_length=64)
    disturb(policy)
    adapters.save_network(policy, tmp_path / "policy", policy.state_dict())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(logits_of(loaded), logits_of(policy), atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "policy" / "adapter_config.json").exists()
    reward = models.build_reward_model(config, task.tokenizer, max_length=64)
    trained = [n for n, p in reward.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "score" in n for n in trained) and len(trained) > 2
    disturb(reward)
    adapters.save_network(reward, tmp_path / "reward", reward.state_dict())
    again = models.load_reward_model(str(tmp_path / "reward"), ModelConfig())
    expected = models.sequence_rewards(reward, ROWS)
    torch.testing.assert_close(models.sequence_rewards(again, ROWS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad", [0, None])
def test_a_reward_models_adapter_scores_the_same_everywhere(tmp_path, tokenizer, pad):
    base = base_model(tmp_path / "base", tokenizer, pad_token_id=pad)
    config = ModelConfig(model=base, lora_rank=4)
    with pytest.warns(UserWarning, match=r"score.weight of .* are new"):
        reward = models.build_reward_model(config, tokenizer, max_length=64)
    disturb(reward)
    path = tmp_path / "reward"
    adapters.save_network(reward, path, reward.state_dict())
    tokenizer.save_pretrained(path)
    kept = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    two = models.Batch(IDS.expand(2, 6), kept, kept[:, 3:])
    expected = models.sequence_rewards(reward, two)
    auto = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(path, num_labels=1)
    again = models.load_reward_model(str(path), ModelConfig())
    further = models.build_reward_model(ModelConfig(model=str(path)), tokenizer, max_length=64)
    critic = models.build_critic(further, ModelConfig(), str(path))
    for i, row in enumerate(two.rows(slice(0, 2)).attention_mask):
        alone = IDS[:, row]
        for model in (auto, theirs):
            torch.testing.assert_close(model(input_ids=alone).logits[0, 0], expected[i])
        value = models.scalar_head(critic)(critic.model(alone).last_hidden_state)[0, -1, 0]
        torch.testing.assert_close(value, expected[i], atol=1e-5, rtol=1e-5)
    # Without a padding token in the base model's settings batches are padded on the other side.
    torch.testing.assert_close(models.sequence_rewards(again, two), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(models.sequence_rewards(further, two), expected)
    trained = [n for n, p in further.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "score" in n for n in trained)
    assert all(p.requires_grad for p in critic.parameters())


def test_stages_follow_one_another_on_adapters(tmp_path, tokenizer):
    base = base_model(tmp_path / "base", tokenizer)
    texts = [(f"what is {i} and {j}", f" it is {i + j}") for i in range(6) for j in range(6)]
    sft = write_jsonl(tmp_path / "sft.jsonl", [{"prompt": p, "completion": c} for p, c in texts])
    pairs = [{"prompt": p, "chosen": c, "rejected": " two"} for p, c in texts]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    common = ["--eval_size", "4", "--batch_size", "8", "--total_steps", "2", "--device", "cpu"]
    common += ["--learning_rate", "0.03", "--warmup_steps", "0", "--max_new_tokens", "12"]

    def stage(name, model, out, *more):
        argv = ["--model", str(model), "--output_dir", str(tmp_path / out), *common, *more]
        run.train(name, argv)
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def logits(path):
        return logits_of(AutoModelForCausalLM.from_pretrained(path))

    stage("sft", base, "sft", "--data", sft, "--lora_rank", "4")
    first = tmp_path / "sft" / "policy"
    assert (logits(first) - logits(base)).abs().max() > 0.01
    with pytest.warns(UserWarning, match="are new"):
        stage("reward", first, "reward", "--data", pairs, "--lora_rank", "4")
    reward = tmp_path / "reward" / "reward"
    rows = stage("dpo", first, "dpo", "--data", pairs)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[1]["loss"] != pytest.approx(math.log(2), abs=1e-4)
    second = tmp_path / "dpo" / "policy"
    assert (logits(second) - logits(first)).abs().max() > 1e-3
    online = ["--data", sft, "--reward_funcs", str(reward), "--kl_coef", "0.1"]
    rows = stage("ppo", second, "ppo", *online, "--critic_model", str(reward), "--epochs", "1")
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5) and abs(rows[1]["kl"]) > 1e-4
    rows = stage("grpo", second, "grpo", *online, "--num_generations", "4", "--lora_rank", "4")
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    for out in ("ppo", "grpo"):
        third = tmp_path / out / "policy"
        named = json.loads((third / "adapter_config.json").read_text())
        assert named["base_model_name_or_path"] == base
        assert (logits(third) - logits(second)).abs().max() > 1e-4


def test_the_reference_is_what_a_supervised_phase_made_of_a_new_adapter():
    task = tiny_task()

    def policy():
        return tiny_policy(task, lora_rank=2)

    trained = policy()
    supervised(trained, task, 3, 3e-2)
    batch = supervised_batch(task, task.train[:4])
    expected = hidden(models.lm_head(trained, batch))
    reference = models.Reference(trained, moved=True)
    disturb(trained)
    assert torch.equal(hidden(reference(_Networks(trained), batch)), expected)
    # A run that is resumed has it from the checkpoint, on an adapter that is new again.
    again = policy()
    restored = models.Reference(again, moved=True)
    restored.load_state_dict({k: v.clone() for k, v in reference.state_dict().items()})
    assert torch.equal(hidden(restored(_Networks(again), batch)), expected)
    with pytest.raises(ValueError, match="of other weights"):
        restored.load_state_dict({})


def test_the_critic_starts_from_the_policys_adapter(tmp_path, tokenizer):
    base = base_model(tmp_path / "base", tokenizer)
    path = saved_adapter(tmp_path / "sft", base, tokenizer, lora())
    policy = policy_of(path, tokenizer)
    critic = models.build_critic(policy, ModelConfig())
    found = models.hidden_states(critic, ROWS)
    expected = models.hidden_states(models.causal_lm(policy), ROWS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(models.values(critic, ROWS), torch.zeros(1, 3))


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_adapters_of_models_whose_mixers_read_some_weights_alone(tmp_path, kind):
    """peft refuses those layers; the others are adapted."""
    pytest.importorskip("peft")
    model = model_zoo.small_model(kind)
    config = ModelConfig(model=str(tmp_path), lora_rank=2)
    wrapped = adapters.new_adapter(model, config, task="CAUSAL_LM")
    adapted = {n.split(".lora_A")[0] for n, _ in wrapped.named_parameters() if ".lora_A" in n}
    assert {name.rpartition(".")[2] for name in adapted} - {"x_proj", "dt_proj"} == {"in_proj"}
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    before = logits_of(model_zoo.small_model(kind))
    with torch.no_grad():
        assert not torch.equal(wrapped(input_ids=IDS).logits, before)
