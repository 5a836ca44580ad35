"""The proof that a model's passes are right, what ends a rollout, and what is refused."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import create_causal_mask
from transformers.models.llama import modeling_llama

from tests.trainer.model_zoo import settings, small_model
from tests.trainer.trainer_tools import one_thread, online_trainer, tiny_policy, tiny_task  # noqa: F401

from rlhf_kernels.trainer import models, probe, trials
from rlhf_kernels.trainer.config import ModelConfig, UserError
from rlhf_kernels.trainer.data import Batch, pad
from rlhf_kernels.trainer.decoding import Decoding
from rlhf_kernels.trainer.endings import end_token_ids
from rlhf_kernels.trainer.finite import NonFinite
from rlhf_kernels.trainer.forward import Form
from rlhf_kernels.trainer.modes import settled, use_checkpointing
from rlhf_kernels.trainer.rewards import Rewards


def _fresh(kind: str, **more):
    """Weights as transformers initialises them: nearly uniform attention."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(settings(kind, **more)).eval()


def _proved(model, **options):
    """The model's form, decoding and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        probe.prove(model, **({"max_length": 64} | options))
    texts = [str(w.message) for w in said if str(w.message).startswith("model:")]
    return model.form, model.decoding, texts


def _attends(dtype) -> bool:
    """Whether torch's attention takes a mask: not in bfloat16 on a CPU with AMX that
    ATEN_CPU_CAPABILITY takes for one with AVX2 alone.
    """
    q = torch.randn(1, 4, 64, 8).to(dtype)
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    try:
        nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_faults_show_in_models_that_were_just_initialised(dtype):
    packed = Form.PACKED if _attends(dtype) else Form.PADDED
    expected = {"llama": packed, "opt": Form.PADDED, "bloom": Form.PADDED}
    for kind, form in expected.items():
        model = _fresh(kind).to(dtype)
        found, decoding, said = _proved(model, packing=True)
        assert (found, decoding) == (form, Decoding.CACHED)
        # Said once, with its name and what happens instead.
        name = type(model).__name__
        sentence = f"model: {name} is not right with packing, so its passes are padded"
        assert said == ([] if form is Form.PACKED else [sentence])
        assert _proved(model)[0] is Form.PADDED


def test_a_model_that_adds_nothing_to_its_states_yet_is_seen_through():
    # Output projections of zero: no token sees another one, until training changes them.
    model = _fresh("opt")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.self_attn.out_proj.weight.zero_()
    assert _proved(model, packing=True)[0] is Form.PADDED
    assert all((p == 0).all() for n, p in model.named_parameters() if "out_proj.weight" in n)


def test_leaks_are_found_whatever_makes_them(monkeypatch):
    def without_bounds(*args, position_ids=None, **options):
        return create_causal_mask(*args, position_ids=None, **options)

    def without_padding(*args, **options):
        return create_causal_mask(*args, **options | {"attention_mask": None, "position_ids": None})

    model = _fresh("llama")
    monkeypatch.setattr(modeling_llama, "create_causal_mask", without_bounds)
    assert _proved(model, packing=True)[0] is Form.PADDED
    monkeypatch.setattr(modeling_llama, "create_causal_mask", without_padding)
    form, decoding, said = _proved(model)
    assert (form, decoding) == (Form.ALIGNED, Decoding.WHOLE)
    assert len(said) == 2 and "padding on the left" in said[0] and "its cache" in said[1]
    monkeypatch.undo()
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda *a, **k: None)
    with pytest.raises(UserError, match="model: LlamaForCausalLM is not causal"):
        probe.prove(model, max_length=64)


def test_padding_that_reaches_other_rows_leaves_one_row_at_a_time(monkeypatch):
    model = _fresh("llama")
    layer = model.model.layers[0]
    forward = layer.forward

    def mixing(hidden, *args, **options):
        # As experts with a capacity do: what other rows hold changes a row.
        others = hidden.mean((0, 1), keepdim=True) * (len(hidden) > 1)
        return forward(hidden + 0.01 * others, *args, **options)

    monkeypatch.setattr(layer, "forward", mixing)
    form, decoding, said = _proved(model)
    assert (form, decoding) == (Form.ALONE, Decoding.WHOLE) and len(said) == 2


def test_a_head_that_caps_large_logits_only_is_refused():
    model = _fresh("llama")
    forward = model.forward

    def capped(*args, **options):
        found = forward(*args, **options)
        found.logits = 30.0 * torch.tanh(found.logits / 30.0)
        return found

    model.forward = capped
    # Fresh logits are so small that the cap changes nothing yet.
    ids = torch.arange(5, 12)[None]
    torch.testing.assert_close(forward(ids).logits, capped(ids).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="LlamaForCausalLM does more between"):
        probe.check_head(model)


def test_proof_disturbs_nothing():
    model = _fresh("mamba").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    _proved(model, packing=True)
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_positions_that_change_at_a_length_are_refused_beyond_it():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = small_model("llama", max_position_embeddings=20, rope_parameters=rope)
    model.config.original_max_position_embeddings = 20
    assert _proved(model, max_length=20)[0] is Form.PADDED
    with pytest.raises(UserError, match="otherwise once it is longer than 20"):
        probe.prove(model, max_length=40)


@pytest.mark.parametrize("borders", [{}, {"original_max_position_embeddings": 50}])
def test_stretched_positions_are_crossed_beyond_the_usual_lengths(borders):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0} | borders
    model = small_model("llama", max_position_embeddings=50, rope_parameters=rope)
    assert _proved(model, max_length=50, packing=True)[0] is Form.PACKED
    with pytest.raises(UserError, match="otherwise once it is longer than 50"):
        probe.prove(model, max_length=100)


def test_experts_in_16_bits_are_no_fault():
    # Near a tie rounding sends a token to another expert: a change as large as a fault's.
    sizes = {"num_local_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 6}
    for seed in range(2):
        model = _fresh("granitemoe", **sizes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in (p for p in model.parameters() if p.ndim > 1):
                drawn = torch.randn(weight.shape, generator=generator)
                weight.copy_(drawn * weight.shape[-1] ** -0.5)
        model.bfloat16()
        assert _proved(model, packing=True) == (Form.PACKED, Decoding.CACHED, [])
        assert model.dtype is torch.bfloat16 and model.form is Form.PACKED


def test_weights_that_a_pass_changes():
    # RWKV halves deep layers' weights in evaluation, which would be saved.
    model = _fresh("rwkv", num_hidden_layers=4, rescale_every=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.arange(5, 14)[None]
    # Training mode leaves them as they are.
    expected = copy.deepcopy(model).train()(ids, use_cache=False).logits
    _proved(settled(model), max_length=16)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config.rescale_every == 2
    model = _fresh("llama")
    model.model.unused = torch.nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))

    def same(weight):
        return weight.clone()

    changes = []

    def written(*_):
        # A change takes place once, because two of them may undo each other.
        change = changes.pop() if changes else same
        model.model.unused.copy_(change(model.model.unused))

    model.register_forward_hook(written)
    # Adapters of experts write their weights back as they were.
    probe.prove(model, max_length=16)
    lowest = torch.tensor([1, 0, 0], dtype=torch.int32)
    for change in (
        *(lambda w: 0.5 * w, torch.neg, lambda w: w.flip(0), lambda w: w.roll(1)),
        # The lowest bit of one element.
        lambda w: (w.view(torch.int32) ^ lowest).view(torch.float32),
    ):
        changes.append(change)
        with pytest.raises(UserError, match=r"changes its own weights .*\(model.unused\)"):
            probe.prove(model, max_length=16)
        assert not changes
    model.register_forward_hook(
        lambda *_: model.register_parameter("late", torch.nn.Parameter(torch.ones(1)))
    )
    with pytest.raises(UserError, match=r"changes its own weights .*\(late\)"):
        probe.prove(model, max_length=16)


def test_a_digest_is_of_the_bits_in_their_order():
    size = probe._DIGESTED
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.uint8):
        weight = torch.arange(3 * size + 7).remainder(251).to(dtype)
        parts = weight[size : 2 * size], weight[:size], weight[2 * size :]
        palindrome = weight[[0, 1, 1, 0]], weight[[1, 0, 0, 1]]
        found = [probe._digest(w) for w in (weight, torch.cat(parts), weight[:-1], *palindrome)]
        assert len(set(found)) == len(found)
        # The layout does not matter, and a NaN is a number like others.
        strided = weight.repeat_interleave(2)[::2]
        assert probe._digest(strided) == found[0]
    nan = torch.full((3,), torch.nan)
    assert probe._digest(nan) == probe._digest(nan.clone())
    assert probe._digest(torch.zeros(3)) != probe._digest(-torch.zeros(3))
    assert probe._digest(torch.empty(0)) == 0


def test_a_model_whose_settings_do_not_fit_is_one_sentence():
    model = _fresh("llama")
    model.model.layers[0].self_attn.o_proj = torch.nn.Linear(7, 32)
    with pytest.raises(UserError, match=r"LlamaForCausalLM does not compute 8 tokens \(Runtime"):
        probe.prove(model, max_length=16)


def test_a_model_that_cannot_recompute():
    with pytest.raises(UserError, match=r"gradient_checkpointing: expected false, .*CTRL"):
        use_checkpointing(_fresh("ctrl"), True)


def test_encoders_and_missing_positions_are_refused():
    sizes = {"vocab_size": 99, "d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16}
    with pytest.raises(UserError, match="T5ForConditionalGeneration has an encoder"):
        probe.prove(T5ForConditionalGeneration(T5Config(**sizes)), max_length=64)
    limits = {"gpt2": 256, "opt": 256, "bart": 256, "xlm-roberta": 255, "ctrl": 256, "gptj": 256}
    limits |= {"llama": None, "bloom": None, "mamba": None, "gemma3": None}
    assert {kind: trials.position_limit(_fresh(kind)) for kind in limits} == limits
    probe.check_length(_fresh("gpt2"), [256, 3])
    with pytest.raises(UserError, match=r"for 256 tokens, but .* take up to 257: lower"):
        probe.check_length(_fresh("gpt2"), iter([3, 257]))
    policy = _fresh("gpt2", n_positions=10, max_position_embeddings=10, vocab_size=15)
    with pytest.raises(UserError, match="has positions for 10 tokens"):
        online_trainer("grpo", policy=policy)


class _Ends(torch.nn.Linear):
    """A head that prefers one token by far."""

    token = 0

    def forward(self, x):
        logits = super().forward(x)
        logits[..., self.token] += 50
        return logits


def _ending(model, token: int):
    head = _Ends(*reversed(model.lm_head.weight.shape), bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    head.token, model.lm_head = token, head
    return model


def test_every_declared_end_ends_a_rollout():
    task = tiny_task()
    tokenizer = task.tokenizer
    eos, vocabulary = tokenizer.eos_token_id, len(tokenizer)
    model = tiny_policy(task)
    assert end_token_ids(model, tokenizer) == (eos,)
    model.config.eos_token_id = 5
    model.generation_config = GenerationConfig(eos_token_id=[7, 8, vocabulary + 100, -1])
    assert end_token_ids(model, tokenizer) == tuple(sorted({eos, 5, 7, 8}))
    model.generation_config.eos_token_id = []
    assert end_token_ids(model, tokenizer) == tuple(sorted({eos, 5}))
    model.generation_config.eos_token_id = "</s>"
    with pytest.raises(UserError, match="eos_token_id of its generation_config"):
        end_token_ids(model, tokenizer)
    whole = _fresh("gemma3")
    whole.config.text_config.eos_token_id = [1, 42]
    whole.config.eos_token_id = whole.generation_config.eos_token_id = None
    assert end_token_ids(whole) == (1, 42)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_end_that_only_the_model_declares(temperature):
    trainer = online_trainer("remax", batch_size=8)
    sample, task = trainer.sample, trainer.sample.task
    policy = _ending(trainer.learner.networks.policy, 9)
    policy.generation_config.eos_token_id = [9]
    seen = {}

    def spy(prompts, completions, completion_ids, finished, **columns):
        seen.update(texts=completions, ids=completion_ids, finished=finished)
        return [0.0] * len(prompts)

    sample.rewards = Rewards([spy], [1.0])
    found = sample(task.train[:8], temperature=temperature)
    assert found.finished.all() and seen["finished"] == [True] * 8
    # One token, which is no part of the text though the tokenizer does not call it special.
    assert seen["ids"] == [[9]] * 8 and seen["texts"] == [""] * 8
    assert trainer.evaluate()["texts"] == [""] * len(task.held_out)
    # The padding token as an end: what pads is no end, and the end is kept.
    policy.generation_config.eos_token_id = []
    policy.config.eos_token_id = policy.lm_head.token = task.tokenizer.pad_token_id
    found = sample(task.train[:8], temperature=temperature)
    assert found.finished.all() and (found.batch.completion_mask.sum(1) == 1).all()


def test_chat_templates_that_close_a_turn_with_another_token():
    task = tiny_task()
    tokenizer, policy = task.tokenizer, tiny_policy(task)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    policy.resize_token_embeddings(len(tokenizer))
    words = "{{ m['role'] + ': ' + m['content'] + '<|im_end|>\n' }}"
    turn = "{% for m in messages %}" + words + "{% endfor %}"
    for template, expected in (
        (turn, {end, tokenizer.eos_token_id}),
        (turn.replace("<|im_end|>", " "), {tokenizer.eos_token_id}),
        # Content in parts only; and a template that leaves out words, which closes nothing.
        (turn.replace("m['content']", "m['content'][0]['text']"), {end, tokenizer.eos_token_id}),
        ("{% for m in messages %}<|im_end|>{{ m['role'] }}{% endfor %}", {tokenizer.eos_token_id}),
        ("{{ raise_exception('no') }}", {tokenizer.eos_token_id}),
        (None, {tokenizer.eos_token_id}),
    ):
        tokenizer.chat_template = template
        assert {*end_token_ids(policy, tokenizer)} == expected


def test_tokens_beyond_the_tokenizer_leave_no_text():
    trainer = online_trainer("grpo", batch_size=8)
    sample = trainer.sample
    policy = trainer.learner.networks.policy
    size = len(sample.task.tokenizer)
    policy.resize_token_embeddings(size + 8)
    _ending(policy, size + 3)
    found = sample(sample.task.train[:4], temperature=0)
    assert not found.finished.any() and (found.batch.completion_ids == size + 3).all()
    assert sample.texts(found.batch) == [""] * 4


def test_logits_that_are_not_finite_are_refused():
    model = tiny_policy(tiny_task())
    # In a rollout and in an evaluation, which look at the sampler's log-probabilities.
    trainer = online_trainer("grpo", batch_size=8)
    with torch.no_grad():
        trainer.learner.networks.policy.lm_head.weight[4] = torch.nan
    for run in (trainer.step, trainer.evaluate):
        with pytest.raises(NonFinite, match=r"log-probability .*is not finite in"):
            run()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="model: LlamaForCausalLM"):
        probe.prove(model, max_length=64)


def test_the_saved_policy_keeps_its_generation_config(tmp_path):
    model = tiny_policy(tiny_task())
    model.generation_config = GenerationConfig(eos_token_id=[1, 7], temperature=0.6, do_sample=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.eos_token_id == [1, 7]
    assert again.generation_config.temperature == 0.6


def test_critics_are_proved():
    rows = [([5, 60, 7], [20, 21, 72, 23]), ([9, 8, 77, 6, 50, 4, 31], [30])]
    for kind in ("opt", "bloom"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            critic = models.build_critic(_fresh(kind), ModelConfig(packing=True))
        assert critic.form is Form.PADDED
        torch.nn.init.normal_(models.scalar_head(critic).weight)
        parts = pad([p for p, _ in rows], 0, left=True), pad([c for _, c in rows], 0, left=False)
        ids, mask = (torch.cat(pair, 1) for pair in zip(*parts, strict=True))
        together = models.values(critic, Batch(ids, mask, parts[1][1]))
        for found, (prompt, completion) in zip(together, rows, strict=True):
            alone = torch.tensor([prompt + completion])
            kept = torch.ones_like(alone, dtype=torch.bool)
            batch = Batch(alone, kept, kept[:, : len(completion)])
            expected = models.values(critic, batch)[0]
            torch.testing.assert_close(found[: len(completion)], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("leak", "form"), [(0.0, Form.PADDED), (2e-5, Form.ALIGNED)])
def test_padding_that_reaches_a_row_beyond_a_border_only_is_found(monkeypatch, leak, form):
    """A leak that the comparison with the row alone takes for rounding, beyond a window of 12."""
    model = small_model("mistral", sliding_window=12)
    layer = model.model.layers[-1]
    forward = layer.forward

    def leaking(hidden, *args, **options):
        # Adds the first position: padding if a short row is padded on the left, else its own token.
        first = hidden[:, :1] * (leak if hidden.shape[1] > 14 else 0.0)
        return forward(hidden + first, *args, **options)

    monkeypatch.setattr(layer, "forward", leaking)
    assert _proved(model)[0] is form
