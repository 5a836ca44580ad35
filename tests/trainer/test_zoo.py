"""Log-probabilities and rollouts of the model types that transformers ships, against one sequence.

The oracle is the model's own forward over one sequence at a time, without padding and cache.
"""

import warnings

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.trainer.model_zoo import LEFT_OUT, VOCABULARY, small_model
from tests.trainer.trainer_tools import one_thread  # noqa: F401

from rlhf_kernels.trainer.config import UserError
from rlhf_kernels.trainer.data import Batch, pad
from rlhf_kernels.trainer.decoding import Decoding
from rlhf_kernels.trainer.endings import end_token_ids
from rlhf_kernels.trainer.forward import Form, accepted, lm_head
from rlhf_kernels.trainer.generation import generate
from rlhf_kernels.trainer.probe import prove

# Form where packing is asked for, form where it is not, and decoding; None: refused.
P, L, A = Form.PACKED, Form.PADDED, Form.ALIGNED
TELLING = {
    "llama": (P, L, Decoding.CACHED),
    "gpt2": (P, L, Decoding.CACHED),
    "gemma3": (P, L, Decoding.CACHED),
    "mixtral": (P, L, Decoding.CACHED),
    "opt": (L, L, Decoding.CACHED),
    "bloom": (L, L, Decoding.CACHED),
    "gpt_oss": (L, L, Decoding.CACHED),
    "lfm2": (L, L, Decoding.CACHED),
    "mamba": (L, L, Decoding.CACHED),
    "jamba": (L, L, Decoding.CACHED),
    "bart": (A, A, Decoding.WHOLE),
    "rwkv": (A, A, Decoding.WHOLE),
    "roberta": None,
    "xlnet": None,
}
# Both sides padded, and every length another one.
ROWS = [([5, 60, 7], [20, 21, 72, 23]), ([9, 8, 77, 6, 50, 4, 31, 12], [30, 32]), ([11], [40, 41])]
STEPS = 5


def _scores(model, ids: list[int]) -> torch.Tensor:
    """Log-probabilities `[T, V]` over one sequence."""
    with torch.no_grad():
        inputs = accepted(model, input_ids=torch.tensor([ids]), use_cache=False)
        return torch.log_softmax(model(**inputs).logits[0].double(), -1)


def _batch(rows) -> Batch:
    prompts, completions = zip(*rows, strict=True)
    parts = pad(prompts, 0, left=True), pad(completions, 0, left=False)
    ids, mask = (torch.cat(pair, 1) for pair in zip(*parts, strict=True))
    return Batch(ids, mask, parts[1][1])


def _check_logprobs(model) -> None:
    batch = _batch(ROWS)
    with torch.no_grad():
        found = lm_head(model, batch).logprobs(batch.labels)
    for row, (prompt, completion) in zip(found, ROWS, strict=True):
        scores = _scores(model, prompt + completion)[len(prompt) - 1 : -1]
        expected = scores[torch.arange(len(completion)), completion].float()
        torch.testing.assert_close(row[: len(completion)], expected, atol=2e-4, rtol=2e-4)


def _greedy(model, prompt: list[int], ends) -> tuple[list[int], list[float]]:
    tokens, logprobs = [], []
    while len(tokens) < STEPS and not (tokens and tokens[-1] in ends):
        best = _scores(model, prompt + tokens)[-1].max(-1)
        tokens.append(int(best.indices))
        logprobs.append(float(best.values))
    return tokens, logprobs


def _check_rollout(model) -> None:
    prompts = [prompt for prompt, _ in ROWS]
    # An end that one row meets before the others do.
    end = _greedy(model, prompts[0], ())[0][1]
    ends = {end, *end_token_ids(model)}
    ids, mask = pad(prompts, 0, left=True)
    uniforms = torch.zeros(len(prompts), STEPS, dtype=torch.float64)
    options = {"eos_token_id": end, "pad_token_id": 0, "temperature": 0}
    batch, logprobs = generate(model, ids, mask, uniforms, **options)
    for i, prompt in enumerate(prompts):
        tokens, expected = _greedy(model, prompt, ends)
        assert batch.completion_ids[i][batch.completion_mask[i]].tolist() == tokens
        found = logprobs[i, : len(tokens)]
        torch.testing.assert_close(found, torch.tensor(expected), atol=2e-4, rtol=2e-4)


def _try(kind: str) -> tuple | None:
    """The forms that a model was proved in, after both were held against the oracle."""
    model = small_model(kind)
    forms = []
    for packing in (True, False):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                prove(model, max_length=64, packing=packing)
        except UserError as error:
            assert str(error).startswith(f"model: {type(model).__name__} ")
            assert not hasattr(model, "form")
            return None
        forms.append(model.form)
        _check_logprobs(model)
    _check_rollout(model)
    return (*forms, model.decoding)


@pytest.mark.parametrize("kind", TELLING)
def test_telling_architectures(kind):
    assert _try(kind) == TELLING[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*TELLING}))
def test_every_architecture(kind):
    if kind in LEFT_OUT:
        pytest.skip(LEFT_OUT[kind])
    found = _try(kind)
    print("\nform", kind, "refused" if found is None else [way.value for way in found])


def test_alibi_and_windows():
    # Falcon has a form with ALiBi; windows that bind within the run are crossed by the proof.
    kinds = [("falcon", {"alibi": True})]
    kinds += [(kind, {"sliding_window": 9}) for kind in ("mistral", "gemma2", "gemma3_text")]
    for kind, more in kinds:
        model = small_model(kind, **more)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prove(model, max_length=32, packing=True)
        assert model.config.vocab_size == VOCABULARY
        _check_logprobs(model)
        _check_rollout(model)
