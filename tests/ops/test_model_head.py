"""Head.from_model: right on models of many kinds, refused where there is more than a head."""

import copy
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn

import rlhf_kernels as rk

pytest.importorskip("transformers")
from tests.trainer.model_zoo import small_model

#: Model type -> more settings, and what its head then is (bias, softcap, logit scale).
KINDS = {
    "llama": ({}, False, None, 1.0),
    "gpt2": ({}, False, None, 1.0),
    "gpt_neox": ({}, False, None, 1.0),
    "opt": ({}, False, None, 1.0),
    "bloom": ({}, False, None, 1.0),
    "gemma2": ({"final_logit_softcapping": 5.0}, False, 5.0, 1.0),
    "gemma3": ({}, False, None, 1.0),
    "cohere": ({"logit_scale": 0.25}, False, None, 0.25),
    "cohere2": ({"logit_scale": 0.5}, False, None, 0.5),
    "granite": ({"logits_scaling": 4.0}, False, None, 0.25),
    "qwen2": ({"tie_word_embeddings": True}, False, None, 1.0),
    "phi": ({}, True, None, 1.0),
    "gptj": ({}, True, None, 1.0),
    "mixtral": ({}, False, None, 1.0),
    "mamba": ({}, False, None, 1.0),
    "falcon": ({}, False, None, 1.0),
}


def refused(model, match, **options):
    with pytest.raises(ValueError, match=rf"^Head\.from_model: \w+ .*{match}"):
        rk.Head.from_model(model, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_of_the_head_are_the_models(kind):
    more, bias, softcap, scale = KINDS[kind]
    model = small_model(kind, **more)
    head = rk.Head.from_model(model)
    assert head.weight is model.get_output_embeddings().weight
    assert (head.bias is not None, head.softcap, head.logit_scale) == (bias, softcap, scale)
    assert rk.Head.from_model(model, check=False) == head
    assert head.arguments() == head._asdict()
    ids = torch.arange(20, 32).view(2, 6)
    with torch.no_grad():
        base = model.base_model if model.base_model is not model else model.model
        hidden = base(input_ids=ids).last_hidden_state[:, :-1]
        logits = model(input_ids=ids).logits[:, :-1]
        found = rk.linear_token_logprobs(hidden, labels=ids[:, 1:], **head.arguments()).logprobs
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.logits(hidden), logits, rtol=1e-4, atol=1e-4)


def test_the_head_fits_the_policy_loss():
    model = small_model("cohere")
    head, labels = rk.Head.from_model(model), torch.zeros(2, 3, dtype=torch.int64)
    args = torch.randn(2, 3, head.weight.shape[1]), -torch.ones(2, 3), torch.ones(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    rk.linear_policy_loss(
        args[0], labels=labels, old_logprobs=args[1], advantages=args[2], mask=mask,
        **head.arguments(),
    ).loss.backward()  # fmt: skip
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", ("llama", "gemma2", "phi"))
def test_sixteen_bits(kind, dtype):
    model = small_model(kind).to(dtype)
    assert rk.Head.from_model(model).weight.dtype is dtype
    plain = model.forward
    # The bound of a single bf16 logit would allow all but the last.
    for factor in (0.98, 1.02, 1.1):
        model.forward = _with(model, lambda logits, factor=factor: logits * factor)
        refused(model, "does more between")
        model.forward = plain


def test_the_model_stays_as_it_is():
    model = small_model("llama").train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    state, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    rk.Head.from_model(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(w, weights[k]) for k, w in model.state_dict().items())
    assert not model.lm_head._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


def _with(model, change):
    """The model's forward, its logits changed."""
    plain = model.forward

    def forward(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    return forward


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.001,
        lambda logits: logits + 0.01,
        lambda logits: 100 * torch.tanh(logits / 100),
        lambda logits: logits.clamp(max=20.0),
        lambda logits: torch.where(logits > 1e9, logits, torch.nan),
        lambda logits: logits[..., :-1],
    ],
    ids=["scale", "shift", "cap", "clamp", "nan", "cut"],
)
def test_what_a_model_does_to_its_logits_is_seen(change):
    model = small_model("llama")
    model.forward = _with(model, change)
    refused(model, "does more between|gives logits")


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("cohere", "logit_scale", 1.0),
        ("granite", "logits_scaling", 7.0),
        ("gemma2", "final_logit_softcapping", None),
        ("llama", "final_logit_softcapping", 30.0),
    ],
)
def test_settings_that_a_model_does_not_follow_are_seen(kind, setting, value):
    model = small_model(kind)
    if kind in ("cohere", "granite", "gemma2"):
        # Read when the model is built, or on every pass: what it does stays what it was.
        before = copy.deepcopy(model.config)
        plain = model.forward

        def forward(*args, **kwargs):
            now, model.config = model.config, before
            try:
                return plain(*args, **kwargs)
            finally:
                model.config = now

        model.forward = forward
    model.config = copy.deepcopy(model.config)
    setattr(model.config, setting, value)
    refused(model, "does more between")


@pytest.mark.parametrize("check", (True, False))
@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("cohere", "logit_scale", -0.5),
        ("cohere", "logit_scale", 0.0),
        ("granite", "logits_scaling", -4.0),
        ("gemma2", "final_logit_softcapping", -5.0),
    ],
)
def test_settings_that_no_operation_takes_are_refused(kind, setting, value, check):
    refused(
        small_model(kind, **{setting: value}),
        "declares logit scale .* and cap .*: expected positive numbers",
        check=check,
    )


def test_what_is_done_to_the_hidden_states_is_seen():
    model = small_model("llama")
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
    refused(model, "hooks on its LM head")
    model = small_model("llama")
    plain = model.lm_head
    model.lm_head = type("Scaled", (nn.Linear,), {"forward": lambda m, x: plain(x * 0.5)})(32, 99)
    model.lm_head.weight = plain.weight
    model.lm_head.bias = None
    refused(model, "does more between")


def _parametrised(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)


def _adapted(model):
    # An adapter that does nothing yet, as a new one of LoRA.
    model.lm_head.lora_A = nn.Linear(32, 2)


def _quantised(model):
    weight = (model.lm_head.weight * 10).to(torch.int8)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)


def _own_forward(model):
    model.lm_head.forward = types.MethodType(lambda m, x: x @ m.weight.T, model.lm_head)


def _none(model):
    model.get_output_embeddings = lambda: None


def _partitioned(model):
    model.lm_head.weight.ds_id = 1


def _flattened(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flatten())


def _encoder(model):
    model.config.is_encoder_decoder = True


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_parametrised, "parametrised LM head"),
        (_adapted, "more parameters .*lora_A.*adapters"),
        (_quantised, r"torch\.int8 .*neither quantised"),
        (_own_forward, "another forward than its class's"),
        (_none, "has no LM head"),
        (_partitioned, "ZeRO-3"),
        (_flattened, "nor flattened"),
        (_encoder, "has an encoder"),
    ],
)
def test_what_is_no_plain_head_is_refused(spoil, match):
    model = small_model("llama")
    spoil(model)
    refused(model, match, check=False)


def test_models_of_others_are_refused():
    refused(nn.Linear(3, 4), "is no Hugging Face model")
    with torch.device("meta"):
        model = small_model("llama")
    refused(model, "on the meta device")
    refused(small_model("bert"), "does more between")


def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    body = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(small_model("llama"), body)
    assert rk.Head.from_model(model).weight is model.get_base_model().lm_head.weight
    head = peft.LoraConfig(target_modules=["lm_head"])
    refused(peft.get_peft_model(small_model("llama"), head), "more parameters .*adapters")


def test_wrappers_and_shards(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = small_model("llama")
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert rk.Head.from_model(wrapped).weight is model.lm_head.weight
        assert rk.Head.from_model(torch.compile(model)).weight is model.lm_head.weight
        flat = FullyShardedDataParallel(
            small_model("llama"), device_id=torch.device("cpu"), use_orig_params=True
        )
        refused(flat, "summon_full_params")
        sharded = fully_shard(small_model("llama"), mesh=init_device_mesh("cpu", (1,)))
        refused(sharded, "DTensor.*unshard it, or make a Head of weight.full_tensor")
        sharded.unshard()
        assert rk.Head.from_model(sharded, check=False).weight.shape == (99, 32)
    finally:
        dist.destroy_process_group()


def test_a_head_that_peft_trains_whole():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(small_model("llama"), config)
    found = rk.Head.from_model(model).weight
    with torch.no_grad():
        found.mul_(2)
    assert found.requires_grad and rk.Head.from_model(model).weight is found
    with model.disable_adapter():
        before = rk.Head.from_model(model).weight
    assert not before.requires_grad
    assert torch.equal(before * 2, found)


def test_hooks_are_the_callers_affair_without_the_check():
    model = small_model("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    refused(model, "hooks on its LM head")
    assert rk.Head.from_model(model, check=False).weight is model.lm_head.weight
