"""Reward models and critics: their own scores, in batches as alone, and nothing made up."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    FalconMambaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    OPTConfig,
)

from tests.trainer.classifiers import KINDS, SKIPPED, small_classifier, small_config
from tests.trainer.trainer_tools import one_thread, tiny_policy, tiny_task  # noqa: F401

from rlhf_kernels.trainer import adapters, models
from rlhf_kernels.trainer.config import ModelConfig, UserError
from rlhf_kernels.trainer.data import Batch, bpe_tokenizer, load_tokenizer
from rlhf_kernels.trainer.modes import recompute, settled, use_checkpointing
from rlhf_kernels.trainer.rewards import RewardModel, load_rewards
from rlhf_kernels.trainer.tokenizers import check_alike


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer(["what is one and two it is three"] * 3, 280)


def saved(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows_of(config):
    """Rows with padding on either side, both sides and neither."""
    ids = torch.randint(4, 60, (4, 19), generator=torch.Generator().manual_seed(0))
    kept = torch.zeros(4, 19, dtype=torch.bool)
    for i, part in enumerate((slice(0, 19), slice(18, 19), slice(3, 10), slice(0, 12))):
        kept[i, part] = True
        if config.is_encoder_decoder:
            # They read the score at the end token.
            ids[i, part.stop - 1] = 2
    return Batch(ids, kept, kept[:, 10:])


CHEAP = ("bert", "roberta", "deberta-v2", "distilbert", "t5", "gpt2", "llama", "xlnet", "reformer")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=() if k in CHEAP else pytest.mark.slow)
        for k in KINDS
        if k not in SKIPPED
    ],
)
def test_scores_in_a_batch_are_the_models_own_of_each_row_alone(kind, tmp_path, tokenizer):
    model = small_classifier(kind)
    batch = rows_of(model.config)
    with torch.no_grad():
        pairs = zip(batch.input_ids, batch.attention_mask, strict=True)
        expected = torch.cat([model(input_ids=ids[kept][None]).logits[:, 0] for ids, kept in pairs])
    assert expected.max() - expected.min() > 1e-3
    loaded = models.load_reward_model(saved(tmp_path, model, tokenizer), ModelConfig())
    found = models.sequence_rewards(loaded, batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    if kind != "reformer":
        found.sum().backward()
        reached = [p.grad is not None for p in loaded.parameters()]
        assert sum(reached) > 0.6 * len(reached)


def test_no_padding_token_and_the_end_token_as_padding(tmp_path, tokenizer):
    batch = rows_of(small_config(LlamaConfig))
    for pad in (None, 5):
        model = small_classifier("llama", pad_token_id=pad)
        loaded = models.load_reward_model(saved(tmp_path, model, tokenizer), ModelConfig())
        found = models.sequence_rewards(loaded, batch)
        assert loaded.config.pad_token_id == pad
        for i, (ids, kept) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True)):
            alone = model(input_ids=ids[kept][None]).logits[0, 0]
            torch.testing.assert_close(found[i], alone, atol=1e-5, rtol=1e-5)


def test_what_is_no_trained_reward_model_is_refused(tmp_path, tokenizer):
    policy = AutoModelForCausalLM.from_config(small_config(LlamaConfig))
    path = saved(tmp_path / "policy", policy, tokenizer)
    expected = r"expected a trained reward model in .*policy, but .* no trained score.weight"
    with pytest.raises(UserError, match=f"reward_funcs: {expected}"):
        RewardModel(path, ModelConfig(), torch.device("cpu"))
    with pytest.raises(UserError, match=f"critic_model: {expected}"):
        models.build_critic(policy, ModelConfig(), path)
    path = saved(tmp_path / "three", small_classifier("bert", num_labels=3), tokenizer)
    with pytest.raises(UserError, match=r"num_labels 1\), found 3 in .*three"):
        models.load_reward_model(path, ModelConfig())
    config = ModelConfig(model=path)
    with pytest.raises(UserError, match=r"model: .*num_labels 1\), found 3 in .*three"):
        models.build_reward_model(config, tokenizer, max_length=32)
    # A weight of the base model that is missing is not made up either.
    model = small_classifier("llama")
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "holes", state_dict=weights)
    with pytest.raises(UserError, match=r"which lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load_reward_model(str(tmp_path / "holes"), ModelConfig())
    path = saved(tmp_path / "headless", small_classifier("llama"), tokenizer)
    with pytest.raises(UserError, match=r"which lacks lm_head\.weight"):
        models.build_policy(ModelConfig(model=path), tokenizer, max_length=32)


def test_a_row_beyond_the_positions_is_refused_with_its_number(tmp_path, tokenizer):
    model = small_classifier("roberta", max_position_embeddings=16)
    loaded = models.load_reward_model(saved(tmp_path, model, tokenizer), ModelConfig())
    batch = rows_of(model.config)
    limit = r"RobertaForSequenceClassification: expected at most 15 tokens, found 19 in row 0"
    with pytest.raises(UserError, match=limit):
        models.sequence_rewards(loaded, batch)
    models.sequence_rewards(loaded, batch.rows(slice(1, 4)))


# Without positions and a cache of keys.
_STATES = {
    MambaConfig: {"state_size": 4, "time_step_rank": 4},
    FalconMambaConfig: {"state_size": 4, "time_step_rank": 4},
    Mamba2Config: {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1},
}


@pytest.mark.parametrize(
    "made", [GraniteConfig, CohereConfig, MambaConfig, Mamba2Config, FalconMambaConfig]
)
def test_architectures_without_a_classifier_get_a_scalar_head(made, tmp_path, tokenizer):
    config = small_config(made, vocab_size=300, tie_word_embeddings=True, **_STATES.get(made, {}))
    torch.manual_seed(0)
    path = saved(tmp_path / "base", AutoModelForCausalLM.from_config(config), tokenizer)
    policy = models.build_policy(ModelConfig(model=path), tokenizer, max_length=32)
    critic = models.build_critic(policy, ModelConfig())
    batch = rows_of(config)
    assert torch.equal(models.values(critic, batch), torch.zeros(4, 9))
    states = models.hidden_states(policy, batch)[batch.attention_mask]
    found = models.hidden_states(critic, batch)[batch.attention_mask]
    torch.testing.assert_close(found, states, atol=1e-5, rtol=1e-5)
    # A reward model of it trains, is saved, scores and starts a critic.
    with pytest.warns(UserWarning, match=r"score.weight of .* are new"):
        reward = models.build_reward_model(ModelConfig(model=path), tokenizer, max_length=32)
    expected = models.sequence_rewards(reward, batch)
    assert expected.std() > 0
    out = tmp_path / "reward"
    adapters.save_network(reward, out, reward.state_dict())
    again = models.load_reward_model(str(out), ModelConfig())
    assert torch.equal(models.sequence_rewards(again, batch), expected)
    critic = models.build_critic(policy, ModelConfig(), str(out))
    value = models.scalar_head(critic)(models.hidden_states(critic, batch))[0, -1, 0]
    torch.testing.assert_close(value, expected[0], atol=1e-5, rtol=1e-5)


def test_an_end_token_beyond_the_vocabulary_is_no_fault(tmp_path, tokenizer):
    # The default of GPT-2's configuration, 50256.
    config = small_config(GPT2Config, vocab_size=300, eos_token_id=50256)
    path = saved(tmp_path / "base", AutoModelForCausalLM.from_config(config), tokenizer)
    with pytest.warns(UserWarning, match=r"score.weight of .* are new"):
        reward = models.build_reward_model(ModelConfig(model=path), tokenizer, max_length=32)
    models.sequence_rewards(reward, rows_of(config)).sum().backward()


def test_a_critic_reads_the_policys_tokens(tmp_path, tokenizer):
    policy = tiny_policy(tiny_task())
    path = saved(tmp_path / "few", small_classifier("llama", vocab_size=8), tokenizer)
    size = policy.config.vocab_size
    with pytest.raises(UserError, match=f"critic_model: expected .* policy's {size} tokens .* 8"):
        models.build_critic(policy, ModelConfig(), path)
    with pytest.raises(UserError, match=r"reward_funcs: expected embeddings of \d+ tokens.* 8"):
        load_rewards([path], [], default=[], config=ModelConfig(), device=torch.device("cpu"))
    check_alike(tokenizer, path, setting="critic_model")
    other = bpe_tokenizer(["entirely other words than those"], 300)
    with pytest.raises(
        UserError, match=r"critic_model: .* in which \d+ is '.*', found .* in that of"
    ):
        check_alike(other, path, setting="critic_model")
    # Names of special tokens may differ, and a folder may have no tokenizer.
    renamed = load_tokenizer(path)
    renamed.add_special_tokens({"pad_token": "<new>"})
    check_alike(renamed, path, setting="critic_model")
    small_classifier("llama").save_pretrained(tmp_path / "bare")
    check_alike(other, str(tmp_path / "bare"), setting="critic_model")


def test_an_encoder_is_no_critic(tmp_path, tokenizer):
    policy = tiny_policy(tiny_task())
    for kind in ("bert", "distilbert", "electra", "t5"):
        path = saved(tmp_path / kind, small_classifier(kind), tokenizer)
        with pytest.raises(UserError, match="critic_model: expected a decoder with a linear score"):
            models.build_critic(policy, ModelConfig(), path)


@pytest.mark.parametrize("made", [LlamaConfig, GPT2Config, OPTConfig, FalconConfig])
def test_recomputing_passes_agree_and_settings_stay(made, tmp_path):
    rates = ("dropout", "attention_dropout", "hidden_dropout", "layerdrop", "resid_pdrop")
    config = small_config(made)
    given = {rate: 0.5 for rate in rates if hasattr(config, rate)}
    for rate, value in given.items():
        setattr(config, rate, value)
    torch.manual_seed(0)
    model = settled(AutoModelForCausalLM.from_config(config))
    batch = rows_of(config)
    expected = models.hidden_states(model, batch).detach()
    use_checkpointing(model, True)
    for _ in range(2):
        found = models.hidden_states(model, batch)
        assert torch.equal(found[batch.attention_mask], expected[batch.attention_mask])
    assert any(m.training for m in model.modules())
    recompute(model, False)
    assert not any(m.training for m in model.modules())
    # What is saved is the model's own settings.
    model.save_pretrained(tmp_path)
    kept = made.from_pretrained(tmp_path)
    assert {rate: getattr(kept, rate) for rate in given} == given


def test_the_reference_keeps_ties():
    config = small_config(LlamaConfig, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    copied = models.Reference(settled(model)).model
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.lm_head.weight is not model.lm_head.weight
