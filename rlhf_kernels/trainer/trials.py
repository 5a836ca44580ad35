"""Trials: random sequences with a model's results for each alone, to compare passes with."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import UserError
from .data import Batch
from .forward import Form, backbone, head_over, hidden_states, vocabulary

#: The tokens of prompts and completions.
Rows = list[tuple[list[int], list[int]]]
#: From a model, all rows and a padding token to the features `[tokens, D]` of each row.
Pass = Callable[[PreTrainedModel, Rows, int], list[Tensor]]

# Bounds of changes that count as rounding, relative to the spread of the features. The tolerance is
# a multiple of the measured change within these. Products of other shapes round differently.
_SHAPES = {torch.float32: (1e-4, 2e-3), torch.float64: (1e-8, 1e-6)}
_SHAPES_16_BIT = (0.1, 0.3)
# If only the tokens of other rows change, only shared experts round differently.
_OTHERS = {torch.float32: (1e-5, 5e-4), torch.float64: (1e-9, 1e-6)}
_OTHERS_16_BIT = (1e-4, 0.03)
_NOISES = 8.0

# Settings with a number of tokens at which attention, positions or scans change their method.
_BORDERS = (
    "sliding_window", "attention_window_size", "window_size", "local_attention",
    "attention_chunk_size", "chunk_size", "mamba_chunk_size", "original_max_position_embeddings",
)  # fmt: skip
# The chunk length of linear attention is a constant in transformers' code.
_LINEAR_ATTENTION_CHUNK = 64
_LENGTH = 44


class Trial:
    """Random rows with the hidden states `[T, H]` of each alone, and tolerances for rounding.

    `shapes` is the tolerance for passes of other shapes, `others` the one for passes in which only
    the tokens of other rows differ. The rows have lengths around `border`, if it is given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Rows,
        generator: torch.Generator,
        border: int | None = None,
    ) -> None:
        self.model, self.rows, self.generator, self.border = model, rows, generator, border
        self.hidden = [self._alone([*prompt, *completion]) for prompt, completion in rows]
        if not all(bool(h.isfinite().all()) for h in self.hidden):
            raise UserError(
                f"model: {name_of(model)} gives hidden states that are not finite: expected whole "
                f"weights, and a dtype that holds them (found {self.hidden[0].dtype}; "
                "try float32 or bfloat16)"
            )
        self.spread = _spread(self.hidden)
        # Rounding is measured on the longest row, with another row beside it.
        row, alone = [*rows[1][0], *rows[1][1]], self.hidden[1]
        first, second = (self._alone(row, self.fresh(row)) for _ in range(2))
        self.shapes = self._bound(first, alone, _SHAPES.get(alone.dtype, _SHAPES_16_BIT))
        self.others = self._bound(first, second, _OTHERS.get(alone.dtype, _OTHERS_16_BIT))

    def _bound(self, one: Tensor, other: Tensor, between: tuple[float, float]) -> float:
        return min(max(_NOISES * _change(one, other, self.spread), between[0]), between[1])

    def _alone(self, *rows: list[int]) -> Tensor:
        """Hidden states `[T, H]` of the first of several rows of the same length."""
        ids = torch.tensor(rows, device=self.model.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        form = Form.ALONE if len(rows) == 1 else Form.ALIGNED
        return hidden_states(self.model, Batch(ids, mask, mask), form)[0]

    def fresh(self, tokens: Sequence[int]) -> list[int]:
        """As many random tokens as `tokens` has."""
        return random_tokens(self.model, len(tokens), self.generator)

    def logits(self) -> list[Tensor]:
        """Logits `[T, V]` that predict the completion of each row, computed alone."""
        return [
            head_over(self.model, hidden[None, len(prompt) - 1 : -1]).logits()[0]
            for hidden, (prompt, _) in zip(self.hidden, self.rows, strict=True)
        ]

    def sees_order(self) -> bool:
        """Whether swapping two tokens changes a later state by more than rounding."""
        *before, a, b, c = [*self.rows[1][0], *self.rows[1][1]]
        changed = self._alone([*before, b, a, c])[-1:]
        return _change(changed, self.hidden[1][-1:], self.spread) > 4 * self.shapes

    def check_causality(self) -> None:
        """Raises UserError if later tokens change the states of earlier ones."""
        (prompt, completion), name = self.rows[1], name_of(self.model)
        before = self.hidden[1][: len(prompt)]
        other = self._alone([*prompt, *self.fresh(completion)])[: len(prompt)]
        # The comparison is False for NaN, which therefore counts as an error.
        causal = _change(other, before, self.spread) <= self.others
        if not causal and self.border is None:
            raise UserError(
                f"model: {name} is not causal, a later token changes what an earlier one predicts: "
                "expected a causal LM (BERT's kin need is_decoder in their config.json)"
            )
        if not causal or not _change(self._alone(prompt), before, self.spread) <= self.shapes:
            length = self.border or len(prompt)
            raise UserError(
                f"model: {name} computes a sequence's first tokens otherwise once it is longer "
                f"than {length}: expected max_prompt_tokens + max_new_tokens of at most {length}"
            )

    def right(self, run: Pass, alone: list[Tensor], *, beside: bool = True) -> bool:
        """Whether each row has the same result as alone, and does not depend on rows `beside` it.

        The second check repeats the pass with other random tokens in all rows but the kept ones,
        and with another padding token. Two passes keep one outer row each, which therefore depends
        on no other row. Rows around a border are long, so one pass keeps both outer rows: neither
        depends on the row at the border or on the padding token, and the trial of short rows
        shows whether they depend on each other.
        """
        spread, filler = _spread(alone), self.fresh([0])[0]
        found = run(self.model, self.rows, filler)
        pairs = zip(found, alone, strict=True)
        if not all(_change(f, a, spread) <= self.shapes for f, a in pairs):
            return False
        first, last = 0, len(self.rows) - 1
        passes = [(first,), (last,)] if self.border is None else [(first, last)]
        for kept in passes if beside else ():
            rows = [
                row if i in kept else (self.fresh(row[0]), self.fresh(row[1]))
                for i, row in enumerate(self.rows)
            ]
            others = run(self.model, rows, self.fresh([0])[0])
            if not all(_change(others[i], found[i], spread) <= self.others for i in kept):
                return False
        return True


def trials(model: PreTrainedModel, *, max_length: int) -> list[Trial]:
    """Trials of a causal model, and of a modified copy if its own weights would hide errors.

    Args:
        model: a model in evaluation mode.
        max_length: tokens of the run's longest sequence; longer borders are not tested.

    Raises:
        UserError: the model is not causal, or its hidden states are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    limit, borders = position_limit(model), _borders(model.config, max_length)
    # All three rows together have to fit into the model's positions, for packing.
    length = max(8, min(_LENGTH, max_length, limit // 2 if limit else _LENGTH))
    length = min(length, *(border - 1 for border in borders)) if borders else length
    shapes: dict[int | None, list[tuple[int, int]]] = {
        None: [(2, 3), (length - 4, 4), (length // 2 - 2, 2)]
    }
    for border in borders:
        if limit is None or border + 7 <= limit:
            shapes[border] = [(3, 4), (border - 2, 6), (border + 4, 3)]

    def on(witness: PreTrainedModel) -> list[Trial]:
        made = []
        for border, shape in shapes.items():
            draw = partial(random_tokens, witness, generator=generator)
            rows = [(draw(prompt), draw(completion)) for prompt, completion in shape]
            made.append(Trial(witness, rows, generator, border))
            # Check now: positions of some models depend on the longest sequence so far.
            made[-1].check_causality()
        return made

    found = on(_exact(model) if _chooses(model) else model)
    if not found[0].sees_order():
        found += on(_vivid(model))
    return found


def _chooses(model: PreTrainedModel) -> bool:
    """Whether 16-bit rounding can change discrete choices: of experts, or of attended tokens.

    Near a tie, rounding may choose otherwise, a change as large as that of an error.
    """
    words = ("expert", "router", "indexer")
    names = [name for name, _ in model.named_parameters()]
    return model.dtype.itemsize == 2 and any(word in name for name in names for word in words)


def _exact(model: PreTrainedModel) -> PreTrainedModel:
    """An fp32 copy with an attention that supports fp32; the model itself if memory is short."""
    try:
        exact: PreTrainedModel = copy.deepcopy(model).float()
    except torch.OutOfMemoryError:
        return model
    if "flash" in str(model.config._attn_implementation):
        exact.set_attn_implementation("sdpa")
    return exact


def name_of(model: nn.Module) -> str:
    """The name of a model in messages."""
    return type(model).__name__


def _spread(features: list[Tensor]) -> float:
    """The mean distance of features from their mean."""
    whole = torch.cat(features).float()
    return max(float((whole - whole.mean(0)).norm(dim=1).mean()), 1e-30)


def _change(found: Tensor, expected: Tensor, spread: float) -> float:
    """The largest distance over the tokens, relative to a spread; NaN if any distance is."""
    return float((found.float() - expected.float()).norm(dim=1).max()) / spread


def random_tokens(model: PreTrainedModel, count: int, generator: torch.Generator) -> list[int]:
    """Random tokens without those that the model uses for padding, images and the like."""
    text = model.config.get_text_config(decoder=True)
    settings = {**vars(model.config), **vars(text)}
    special = {v for k, v in settings.items() if "token" in k and isinstance(v, int)}
    size = vocabulary(model)
    drawn = torch.randperm(size, generator=generator)[: count + len(special)].tolist()
    tokens = [token for token in drawn if token not in special] or drawn
    # The tokens are distinct if the vocabulary has enough.
    return (tokens * count)[:count]


def _borders(config: PretrainedConfig, max_length: int) -> list[int]:
    """Lengths up to the run's longest at which the model changes its method."""
    text = config.get_text_config(decoder=True)
    # A configuration with different layers refuses to return one value for all.
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    found = {getattr(layer, name, None) for layer in layers for name in _BORDERS}
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict):
            found.add(part.get("original_max_position_embeddings"))
            if part.get("rope_type") == "dynamic":
                found.add(getattr(text, "max_position_embeddings", None))
    if "linear_attention" in (getattr(text, "layer_types", None) or ()):
        found.add(_LINEAR_ATTENTION_CHUNK)
    return sorted(n for n in found if isinstance(n, int) and 8 < n < max_length)


def position_limit(model: PreTrainedModel) -> int | None:
    """The length of the model's table of positions; None if it computes positions."""
    text = model.config.get_text_config(decoder=True)
    length = getattr(text, "max_position_embeddings", None)
    base = backbone(model)
    if not isinstance(length, int):
        return getattr(text, "max_seq_len", None) if text.model_type == "mpt" else None
    tables = [
        (name, module.num_embeddings, getattr(module, "offset", _padding_rows(module)))
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
    ]
    tables += [(name, len(buffer), 0) for name, buffer in base.named_buffers() if buffer.ndim > 1]
    rows = [
        min(size - offset, length)
        for name, size, offset in tables
        if any(word in name for word in ("pos", "wpe"))
        and "relative" not in name
        and "vision" not in name
        and length <= size <= length + 4
    ]
    return min(rows, default=None)


def _padding_rows(table: nn.Embedding) -> int:
    """The number of rows up to the padding row, after which positions begin."""
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _vivid(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with random matrices, large enough that attention is selective and sees positions.

    In a newly initialised model each token attends to all alike, and attention may add nothing to
    the states. This would hide errors that appear after training.
    """
    vivid = copy.deepcopy(model)
    if "flash" not in str(model.config._attn_implementation):
        vivid = vivid.float()
    generator = torch.Generator().manual_seed(1)
    for module in vivid.modules():
        if not isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | Conv1D):
            continue
        weight = module.weight
        inputs = weight[0].numel()
        if isinstance(module, nn.Embedding | Conv1D):
            inputs = 1 if isinstance(module, nn.Embedding) else len(weight)
        drawn = torch.randn(weight.shape, generator=generator) * (1.5 / inputs**0.5)
        weight.data.copy_(drawn)
    return vivid
