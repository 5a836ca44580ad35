"""Bounds of the fused head's results, per element and from its operands.

The logits are a product, so each carries an error of c * eps * (|h| @ |w|), and that of its
rounding where the library leaves it in 16 bits. From there the errors are carried through the
softmax and the two products of the backward pass to first order, beside the roundings of each step.
Nothing here depends on what a machine's GEMM rounds. All values are exact ones, in float64.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import reference
from rlhf_kernels.kernels import backends
from rlhf_kernels.testing import PRODUCT_ROUNDINGS, assert_within_bound, product_bound

EPS = torch.finfo(torch.float32).eps
# Roundings of a step in float32: a few operations, each by half an eps.
C = PRODUCT_ROUNDINGS
# At least those of the largest tile of a kernel, 256 threads' 64 bfloat16 values on CUDA.
TILE_LANES = 1 << 15


def half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Error of rounding values to a 16-bit dtype; zero for float32, which is among the steps'."""
    if dtype == torch.float32:
        return torch.zeros_like(values)
    info = torch.finfo(dtype)
    return info.eps / 2 * values.abs() + info.eps * info.smallest_normal / 2


def _interpreted(t: Tensor) -> bool:
    """Whether Triton's interpreter is in use, which cuts off what does not fit into bfloat16."""
    return t.device.type == "cpu" and backends.select("token_logprobs", t.device) == "triton"


class SoftmaxBounds:
    """Exact logits [N, V], their softmax and the errors that these carry.

    Args:
        logits: before scale, cap and temperature; float64.
        error: bound of the error that each carries.
        dtype: of the logits and of their gradient.
        temperature: a number, or one per token.
        softcap: as given to the operation.
        logit_scale: as given to the operation.
        kept: [N, V], the words that stay in the distribution; None: all.
    """

    def __init__(
        self,
        logits: Tensor,
        error: Tensor,
        dtype: torch.dtype,
        *,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        kept: Tensor | None = None,
    ) -> None:
        self._ulps = 2 if _interpreted(logits) and dtype == torch.bfloat16 else 1
        self.dtype = dtype
        t = torch.as_tensor(temperature, dtype=torch.float64).detach()
        t = t.reshape(-1, 1) if t.dim() else t
        self._transform(logits, error, logit_scale / t, softcap, t)
        if kept is not None:
            # A row without words is no distribution; it is left as if it had them all.
            kept = kept | ~kept.any(-1, keepdim=True)
            # After the cap, which makes a number of -inf.
            self.x = torch.where(kept, self.x, -torch.inf)
            self.x_error = torch.where(kept, self.x_error, 0)
        peak = self.x.amax(-1, keepdim=True)
        self.logp = (self.x - peak).log_softmax(-1)
        self.p = self.logp.exp()
        # log p has the error of its logit and that of the logarithm of the sum; this is the latter.
        self.sum_error = (self.p * self.x_error.nan_to_num(0.0).exp()).sum(-1, keepdim=True).log()
        # In the vocabulary, though its probability may be less than a float64 holds.
        alive = self.logp.isfinite()
        size = (self.x - peak).abs().where(alive, 0)
        self.rounding = C * EPS * torch.clamp(size, min=torch.tensor(self.x.shape[-1]).log())
        self.logp_error = (self.x_error + self.sum_error + self.rounding).where(alive, 0)
        # A probability is at most 1, whatever its logit's error; exp may give 0 from about where
        # the normal numbers end.
        smallest = 4 * torch.finfo(torch.float32).smallest_normal
        self.p_error = (self.p * self.logp_error.expm1() + smallest).clamp(max=1.0)
        self.plogp = torch.where(self.p > 0, self.logp, 0)

    def _transform(
        self, z: Tensor, error: Tensor, scale: Tensor, softcap: float | None, t: Tensor
    ) -> None:
        """x = softcap(logits) / temperature with its slope and the errors of both."""
        if softcap is None:
            self.x, self.slope = z * scale, scale.expand_as(z)
            self.slope_error = C * EPS * self.slope
            steps = torch.zeros(())
        else:
            tanh = torch.tanh(z * scale * t / softcap)
            self.x = softcap * tanh / t
            self.slope = scale * (1 - tanh.square())
            bend = (2 * scale * scale * t / softcap * tanh * (1 - tanh.square())).abs()
            # 1 - tanh^2 loses what tanh rounds.
            self.slope_error = bend * error + C * EPS * scale
            steps = C * EPS * softcap / t
        # -inf is exact: a word that is taken out.
        finite = self.x.isfinite()
        self.x_error = torch.where(finite, self.slope * error + steps, 0)

    def logprobs(self, labels: Tensor) -> Tensor:
        """Of the log-probabilities, in the shape of labels."""
        index = labels.reshape(-1, 1).clamp(min=0).long()
        return self.logp_error.gather(-1, index).view(labels.shape)

    def entropy(self, shape: Sequence[int] = (-1,)) -> Tensor:
        """Of the entropies."""
        return self._entropy_error().view(*shape)

    def lse(self, shape: Sequence[int] = (-1,)) -> Tensor:
        """Of the log-sum-exps."""
        peak = self.x.amax(-1, keepdim=True).abs()
        size = torch.clamp(peak, min=torch.tensor(self.x.shape[-1]).log())
        # That of the largest logit is in `sum_error` already, which is of all logits' errors.
        return (self.sum_error + C * EPS * size).view(*shape)

    def collision(self, shape: Sequence[int] = (-1,)) -> Tensor:
        """Of the sums of squared probabilities."""
        return self._collision_error().view(*shape)

    def _collision_error(self) -> Tensor:
        each = self.p_error * (2 * self.p + self.p_error)
        return (each + C * EPS * self.p.square()).sum(-1, keepdim=True)

    def _entropy_error(self) -> Tensor:
        entropy = -(self.p * self.plogp).sum(-1, keepdim=True)
        carried = (self.p * (self.plogp + entropy).abs() * self.x_error).sum(-1, keepdim=True)
        steps = (self.p * (self.rounding + C * EPS * self.plogp.abs())).sum(-1, keepdim=True)
        # Words, and lanes of a tile beyond the last, of almost no mass count as if of the least
        # there is.
        mass = (self.p.shape[-1] + TILE_LANES) * torch.finfo(torch.float32).smallest_normal
        return carried + steps + self.sum_error.square() + 100 * mass

    def token_gradient(
        self,
        labels: Tensor,
        g: Tensor,
        h: Tensor | None = None,
        g_error: Tensor | None = None,
        h_error: Tensor | None = None,
        *,
        of_collision: Tensor | None = None,
        of_lse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(gradient, bound) of the logits [N, V] from those of the results of rows.

        Args:
            labels: negative ones give no gradient.
            g: upstream of the log-probabilities.
            h: upstream of the entropies, or None.
            g_error: bound of the error that g carries.
            h_error: bound of the error that h carries.
            of_collision: upstream of the sums of squared probabilities, or None.
            of_lse: upstream of the log-sum-exps, or None.
        """
        kept = (labels >= 0).reshape(-1, 1)

        def column(t: Tensor | None) -> Tensor:
            t = torch.zeros(()) if t is None else t
            flat = t.detach().double().expand(labels.shape).reshape(-1, 1)
            return torch.where(kept, flat, 0)

        g, h, g_error, h_error = (column(t) for t in (g, h, g_error, h_error))
        c, z = column(of_collision), column(of_lse)
        hit = torch.zeros_like(self.p).scatter_(-1, labels.reshape(-1, 1).clamp(min=0).long(), 1.0)
        entropy = -(self.p * self.plogp).sum(-1, keepdim=True)
        depth = self.plogp + entropy
        gx = g * (hit - self.p) - h * self.p * depth
        carried = g_error * (hit - self.p).abs() + h_error * self.p * depth.abs()
        carried += g.abs() * self.p_error + h.abs() * (
            self.p_error * depth.abs() + self.p * (self.logp_error + self._entropy_error())
        )
        steps = g.abs() * (hit + self.p) + h.abs() * self.p * (self.plogp.abs() + entropy)
        # Of p^2 and of the log-sum-exp: 2 p (p - collision) and p.
        collision = self.p.square().sum(-1, keepdim=True)
        excess = self.p - collision
        gx = gx + 2 * c * self.p * excess + z * self.p
        carried += (
            2
            * c.abs()
            * (self.p_error * excess.abs() + self.p * (self.p_error + self._collision_error()))
        )
        carried += z.abs() * self.p_error
        steps += 2 * c.abs() * self.p * (self.p + collision) + z.abs() * self.p
        return self._through_slope(gx, carried + C * EPS * steps)

    def kl(self, ref: "SoftmaxBounds", reverse: bool, shape: Sequence[int] = (-1,)) -> Tensor:
        """Of KL(self || ref) if reverse, else of KL(ref || self)."""
        return self._kl(ref, reverse)[1].view(*shape)

    def _kl(self, ref: "SoftmaxBounds", reverse: bool) -> tuple[Tensor, Tensor]:
        """(KL, bound) [N, 1]."""
        left, right = (self, ref) if reverse else (ref, self)
        ratio = left.plogp - right.plogp
        kl = (left.p * ratio).sum(-1, keepdim=True)
        carried = left.p * (ratio - kl).abs() * left.x_error
        carried = carried + (left.p - right.p).abs() * right.x_error
        steps = left.p * (
            left.rounding + right.rounding + C * EPS * (left.plogp + right.plogp).abs()
        )
        return kl, (carried + steps).sum(-1, keepdim=True)

    def kl_gradient(
        self, ref: "SoftmaxBounds", reverse: bool, upstream: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(gradient, bound) of the logits [N, V] of self, from that of the KL."""
        up = upstream.detach().double().reshape(-1, 1)
        if not reverse:
            gx = up * (self.p - ref.p)
            carried = up.abs() * (self.p_error + ref.p_error + C * EPS * (self.p + ref.p))
            return self._through_slope(gx, carried)
        kl, kl_error = self._kl(ref, reverse)
        ratio = self.plogp - ref.plogp
        errors = self.logp_error + ref.logp_error + kl_error
        sizes = self.plogp.abs() + ref.plogp.abs() + kl.abs()
        carried = self.p_error * (ratio - kl).abs() + self.p * (errors + C * EPS * sizes)
        return self._through_slope(up * self.p * (ratio - kl), up.abs() * carried)

    def _through_slope(self, gx: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        gz = gx * self.slope
        # With the product of both errors: where gx and slope are 0 it is all there is.
        error = error * (self.slope + self.slope_error) + gx.abs() * self.slope_error
        return gz, error + self._ulps * half_ulp(gz.abs() + error, self.dtype)


class HeadBounds(SoftmaxBounds):
    """Those of a head's logits, and of the products of its backward pass.

    Args:
        hidden: [..., H] as given to the operation; its dtype is the one of the logits.
        weight: [V, H].
        bias: [V], or None.
        options: of SoftmaxBounds.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        **options: Any,
    ) -> None:
        self.hidden = hidden.detach().double().reshape(-1, hidden.shape[-1])
        self.weight = weight.detach().double()
        logits = self.hidden @ self.weight.T
        error = product_bound(self.hidden, self.weight.T)
        error = error + half_ulp(logits.abs() + error, hidden.dtype)
        if bias is not None:
            logits = logits + bias.detach().double()
            error = error + EPS * logits.abs() + half_ulp(logits.abs() + error, hidden.dtype)
        super().__init__(logits, error, hidden.dtype, **options)

    def products(
        self,
        gradient: tuple[Tensor, Tensor],
        *,
        tokens: int | None = None,
        words: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds of the gradients of (hidden [N, H], weight, bias) from the logits'.

        Args:
            gradient: (gradient, bound) of the logits.
            tokens: of a chunk; None: one chunk.
            words: of a block of the vocabulary; None: one block.
        """
        g, error = gradient
        bounds = []
        for a, a_error, b, size in (
            (g, error, self.weight, words),
            (g.T, error.T, self.hidden, tokens),
            (g.T, error.T, torch.ones_like(g[:, :1]), None),
        ):
            bounds.append(product_bound(a, b, a_error=a_error) + self._parts(a, b, size))
        return bounds[0], bounds[1], bounds[2].squeeze(-1)

    def _parts(self, a: Tensor, b: Tensor, size: int | None) -> Tensor | float:
        """Error of a @ b as an fp32 sum of products of `size` terms that are rounded to 16 bits.

        Independent roundings, uniform within half an ulp: five standard deviations of their sum.
        """
        if size is None or self.dtype == torch.float32:
            return 0.0
        kept = a.any(0)
        pairs = zip(a[:, kept].split(size, 1), b[kept].split(size), strict=True)
        roundings = [half_ulp(x @ y, self.dtype) for x, y in pairs]
        if not roundings:
            return 0.0
        sizes = torch.stack(roundings)
        return torch.minimum(sizes.sum(0), 5 / 3**0.5 * sizes.square().sum(0).sqrt())


def propagated(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], errors: Sequence[Tensor]
) -> list[Tensor]:
    """Bounds of a function's results from those of its inputs' elements, by moving each by its own.

    Args:
        function: of exact inputs; several results. It must suit `torch.func.vmap`.
        inputs: float64.
        errors: bounds of the same shapes; elements without one are left where they are.

    Returns:
        Per result the sum over elements of the larger change of the two directions.
    """
    base = function(*inputs)
    bounds = [torch.zeros_like(t) for t in base]
    for i, (value, error) in enumerate(zip(inputs, errors, strict=True)):
        # One copy of the input for each of its elements, which is moved in that one alone.
        steps = torch.diag(error.flatten())[error.flatten() != 0]
        if not len(steps):
            continue
        steps = steps.view(-1, *value.shape)
        several = (*(None,) * i, 0, *(None,) * (len(inputs) - i - 1))
        run = torch.func.vmap(function, in_dims=several)
        sides = [run(*inputs[:i], value + s, *inputs[i + 1 :]) for s in (steps, -steps)]
        for bound, b, up, down in zip(bounds, base, *sides, strict=True):
            bound += torch.maximum((up - b).abs(), (down - b).abs()).sum(0)
    return bounds


def logprobs_bounds(
    head: HeadBounds, labels: Tensor, upstream: Sequence[Tensor], **parts: int | None
) -> tuple[Tensor, ...]:
    """Of (log-probabilities, entropies, gradients of hidden, weight and bias).

    Args:
        head: the operands.
        labels: negative where ignored.
        upstream: of the log-probabilities and of the entropies.
        parts: `tokens` and `words` of `HeadBounds.products`.
    """
    kept = labels >= 0
    entropy = head.entropy(labels.shape)
    gradient = head.token_gradient(labels, *upstream)
    return (
        torch.where(kept, head.logprobs(labels), 0),
        torch.where(kept, entropy, 0),
        *head.products(gradient, **parts),
    )


def policy_bounds(
    head: HeadBounds,
    tokens: Sequence[Tensor],
    constants: dict[str, Tensor],
    *,
    ref_error: Tensor | None = None,
    upstream: float = 1.0,
    tokens_of_chunk: int | None = None,
    words_of_block: int | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Of (loss, metrics, gradients of hidden, weight and bias) of `linear_policy_loss`.

    Args:
        head: the operands.
        tokens: (labels, old log-probabilities, advantages, mask), as given to the operation.
        constants: other inputs per token.
        ref_error: bound of the error that constants["ref_logprobs"] carries.
        upstream: gradient of the loss.
        tokens_of_chunk: `tokens` of `HeadBounds.products`.
        words_of_block: `words` of it.
        options: of `reference.policy_loss`.
    """
    labels, old, advantages, mask = tokens
    labels = labels.masked_fill(mask == 0, -1)
    index = labels.reshape(-1, 1).clamp(min=0).long()
    logprobs = head.logp.gather(-1, index).view(labels.shape)
    entropy = -(head.p * head.plogp).sum(-1).view(labels.shape)
    names = list(constants)

    def function(*inputs: Tensor) -> list[Tensor]:
        def loss_of(lp: Tensor, h: Tensor, old: Tensor, a: Tensor, *rest: Tensor) -> tuple:
            loss, metrics = reference.policy_loss(
                lp, old, a, mask, entropy=h, **dict(zip(names, rest, strict=True)), **options
            )
            return loss * upstream, (loss, metrics)

        found, (loss, metrics) = torch.func.grad(loss_of, (0, 1), has_aux=True)(*inputs)
        return [loss, metrics, *found]

    given = [old, advantages, *constants.values()]
    inputs = [logprobs, entropy, *(t.detach().double() for t in given)]
    errors = [C * EPS * t.abs() for t in inputs]
    errors[0] += head.logprobs(labels)
    errors[1] += head.entropy(labels.shape)
    if ref_error is not None:
        errors[4 + names.index("ref_logprobs")] += ref_error
    # What lies under the mask, or has no part in the loss, is not looked at.
    errors = [torch.where(mask != 0, e, 0) if e.shape == mask.shape else e for e in errors]
    loss, metrics, g, h = function(*inputs)
    *bounds, g_error, h_error = propagated(function, inputs, errors)
    g_error, h_error = g_error + C * EPS * g.abs(), h_error + C * EPS * h.abs()
    sizes = (loss.abs(), metrics.abs())
    gradient = head.token_gradient(labels, g, h, g_error, h_error)
    bounds = [b + C * EPS * size for b, size in zip(bounds, sizes, strict=True)]
    parts = {"tokens": tokens_of_chunk, "words": words_of_block}
    return (*bounds, *head.products(gradient, **parts))


def assert_all_within(
    actual: Sequence[Tensor], exact: Sequence[Tensor], bounds: Sequence[Tensor]
) -> None:
    """`assert_within_bound` of several results, none of which may be zero as a whole."""
    for a, e, bound in zip(actual, exact, bounds, strict=True):
        assert float(e.detach().abs().max()) > 0
        assert_within_bound(a, e, bound.view(e.shape))
