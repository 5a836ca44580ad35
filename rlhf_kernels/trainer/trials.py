"""Random sequences on a model, each as it comes out alone, against which passes are held."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import UserError
from .data import Batch
from .forward import Form, backbone, head_over, hidden_states

#: Prompts and completions as tokens.
Rows = list[tuple[list[int], list[int]]]
#: Features `[tokens, D]` of each row, from a model, all rows and the token that fills padding.
Pass = Callable[[PreTrainedModel, Rows, int], list[Tensor]]

# Changes, relative to the features' spread, that count as rounding: between these two, a multiple
# of what was measured. Where shapes differ, matrix products round differently.
_SHAPES = {torch.float32: (1e-4, 2e-3), torch.float64: (1e-8, 1e-6)}
_SHAPES_16_BIT = (0.1, 0.3)
# Where only the tokens of other rows differ, only shared experts round differently.
_OTHERS = {torch.float32: (1e-5, 5e-4), torch.float64: (1e-9, 1e-6)}
_OTHERS_16_BIT = (1e-4, 0.03)
_NOISES = 8.0

# Settings: numbers of tokens at which attention, positions or scans change their ways.
_BORDERS = (
    "sliding_window", "attention_window_size", "window_size", "local_attention",
    "attention_chunk_size", "chunk_size", "mamba_chunk_size", "original_max_position_embeddings",
)  # fmt: skip
# Chunk length of linear attention: a constant in transformers' own code.
_LINEAR_ATTENTION_CHUNK = 64
_LENGTH = 44


class Trial:
    """Rows on a model: the hidden states `[T, H]` of each alone, and how exact they are.

    `shapes` and `others` are the largest changes that are rounding where a pass has other shapes,
    and where only the tokens of other rows differ. `border` is the length that the rows surround.
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
        # The longest row beside another one.
        row, alone = [*rows[1][0], *rows[1][1]], self.hidden[1]
        first, second = (self._alone(row, self.fresh(row)) for _ in range(2))
        self.shapes = self._bound(first, alone, _SHAPES.get(alone.dtype, _SHAPES_16_BIT))
        self.others = self._bound(first, second, _OTHERS.get(alone.dtype, _OTHERS_16_BIT))

    def _bound(self, one: Tensor, other: Tensor, between: tuple[float, float]) -> float:
        return min(max(_NOISES * _change(one, other, self.spread), between[0]), between[1])

    def _alone(self, *rows: list[int]) -> Tensor:
        """Hidden states `[T, H]` of the first of rows that are equally long."""
        ids = torch.tensor(rows, device=self.model.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        form = Form.ALONE if len(rows) == 1 else Form.ALIGNED
        return hidden_states(self.model, Batch(ids, mask, mask), form)[0]

    def fresh(self, tokens: Sequence[int]) -> list[int]:
        """As many random tokens."""
        return random_tokens(self.model, len(tokens), self.generator)

    def logits(self) -> list[Tensor]:
        """Logits `[T, V]` that predict each row's completion, alone."""
        return [
            head_over(self.model, hidden[None, len(prompt) - 1 : -1]).logits()[0]
            for hidden, (prompt, _) in zip(self.hidden, self.rows, strict=True)
        ]

    def sees_order(self) -> bool:
        """Whether an exchange of two tokens changes a later state by more than rounding."""
        *before, a, b, c = [*self.rows[1][0], *self.rows[1][1]]
        changed = self._alone([*before, b, a, c])[-1:]
        return _change(changed, self.hidden[1][-1:], self.spread) > 4 * self.shapes

    def check_causality(self) -> None:
        """Raises UserError where what comes later changes what came before."""
        (prompt, completion), name = self.rows[1], name_of(self.model)
        before = self.hidden[1][: len(prompt)]
        other = self._alone([*prompt, *self.fresh(completion)])[: len(prompt)]
        # The comparison is false for NaN, which so counts as a fault.
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
        """Whether each row comes out as it does alone, and whatever stands `beside` it.

        The second needs further passes, in which rows that are kept must not change while other
        rows and the filler are drawn anew. Two passes keep one outer row each: it depends on no
        other row. Rows around a border are long, so they take one pass, which keeps both outer
        rows: neither depends on the row at the border or on the filler, and how they depend on
        each other is what the trial of short rows shows.
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
    """Trials on a causal model, and on a stronger copy where its own weights would hide a fault.

    Args:
        model: in evaluation mode.
        max_length: the run's longest sequence; borders beyond it are not tried.

    Raises:
        UserError: the model is not causal, or its hidden states are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    limit, borders = position_limit(model), _borders(model.config, max_length)
    # The three rows fit the positions one after the other, too.
    length = max(8, min(_LENGTH, max_length, limit // 2 if limit else _LENGTH))
    length = min(length, *(border - 1 for border in borders)) if borders else length
    shapes = {None: [(2, 3), (length - 4, 4), (length // 2 - 2, 2)]}
    for border in borders:
        if limit is None or border + 7 <= limit:
            shapes[border] = [(3, 4), (border - 2, 6), (border + 4, 3)]

    def on(witness: PreTrainedModel) -> list[Trial]:
        made = []
        for border, shape in shapes.items():
            rows = [tuple(random_tokens(witness, n, generator) for n in pair) for pair in shape]
            made.append(Trial(witness, rows, generator, border))
            # Check at once: positions of some models depend on the longest sequence seen so far.
            made[-1].check_causality()
        return made

    found = on(_exact(model) if _chooses(model) else model)
    if not found[0].sees_order():
        found += on(_vivid(model))
    return found


def _chooses(model: PreTrainedModel) -> bool:
    """Whether 16-bit rounding decides where tokens go: experts, or an index of what is attended.

    Near a tie it sends a token elsewhere, a change as large as that of a fault.
    """
    words = ("expert", "router", "indexer")
    names = [name for name, _ in model.named_parameters()]
    return model.dtype.itemsize == 2 and any(word in name for name in names for word in words)


def _exact(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in fp32, with the attention that takes it; the model itself where memory is short."""
    try:
        exact = copy.deepcopy(model).float()
    except torch.OutOfMemoryError:
        return model
    if "flash" in str(model.config._attn_implementation):
        exact.set_attn_implementation("sdpa")
    return exact


def name_of(model: nn.Module) -> str:
    """The model's name in messages."""
    return type(model).__name__


def _spread(features: list[Tensor]) -> float:
    """Mean distance of features from their mean."""
    whole = torch.cat(features).float()
    return max(float((whole - whole.mean(0)).norm(dim=1).mean()), 1e-30)


def _change(found: Tensor, expected: Tensor, spread: float) -> float:
    """Largest distance over the tokens, relative to a spread; NaN where there is one."""
    return float((found.float() - expected.float()).norm(dim=1).max()) / spread


def random_tokens(model: PreTrainedModel, count: int, generator: torch.Generator) -> list[int]:
    """Random tokens, none of which means padding, an image or the like to the model."""
    text = model.config.get_text_config(decoder=True)
    settings = {**vars(model.config), **vars(text)}
    special = {v for k, v in settings.items() if "token" in k and isinstance(v, int)}
    size = model.get_input_embeddings().num_embeddings
    drawn = torch.randperm(size, generator=generator)[: count + len(special)].tolist()
    tokens = [token for token in drawn if token not in special] or drawn
    # Distinct ones where the vocabulary has enough.
    return (tokens * count)[:count]


def _borders(config: PretrainedConfig, max_length: int) -> list[int]:
    """Lengths within the run's at which the model changes its ways."""
    text = config.get_text_config(decoder=True)
    # A configuration whose layers differ refuses to name one value for all.
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
    """Tokens for which the model has a table of positions; None where it computes them."""
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
    """Rows up to the one that stands for padding, after which positions begin."""
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _vivid(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with matrices drawn anew, so large that attention prefers and positions matter.

    In a model that was just initialised each token attends to all alike and may add nothing to the
    states, which hides what training brings out.
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
