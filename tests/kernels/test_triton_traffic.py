"""How often the Triton kernels read and write each element, counted by Triton's interpreter."""

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import PolicyLossConfig
from rlhf_kernels.kernels import triton

pytest.importorskip("triton", reason="the package triton is not installed (it needs Linux)")

# Only there are the loads and stores seen.
interpreted = pytest.mark.skipif(
    not triton.interpreted(), reason="needs Triton's interpreter: set TRITON_INTERPRET=1"
)


@interpreted
class TestTraffic:
    """Reads and writes per element: equal to the design, not merely below it."""

    @pytest.fixture(autouse=True)
    def _triton(self):
        with rk.use_backend("triton"):
            yield

    def traffic(self):
        from tests.kernels.triton_traffic import Traffic

        return Traffic()

    @pytest.mark.parametrize("entropy", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_token_logprobs(self, dtype, entropy):
        from rlhf_kernels.kernels.triton.logprobs import PARTS, TILE
        from rlhf_kernels.kernels.triton.logprobs_backward import TILE as BACKWARD_TILE

        rows, vocab = 4, TILE + BACKWARD_TILE + 3
        tiles, backward_tiles = 2, 4
        logits = torch.randn(rows, vocab).to(dtype).requires_grad_()
        labels = torch.tensor([0, -100, vocab - 1, TILE])
        kept = labels != -100
        once = kept[:, None].expand(rows, vocab).long()
        # The label's own logit is read apart: another kernel needs it before all is known.
        expected = once.clone()
        expected[kept, labels[kept]] += 1

        with self.traffic() as forward:
            result = rk.token_logprobs(logits, labels, entropy=entropy)
        assert torch.equal(forward.reads(logits), expected)
        assert (forward.writes(logits) == 0).all()
        outputs = [result.logprobs, *([result.entropy] if entropy else [])]
        for out in outputs:
            assert (forward.writes(out) == 1).all()
        count, size = int(kept.sum()), logits.element_size()
        partials = count * tiles * PARTS * (3 if entropy else 2) * 4
        of_labels = rows * (tiles + 1) * 8
        assert forward.bytes_read == count * (vocab + 1) * size + of_labels + partials
        # Three statistics a row are kept for the backward.
        assert forward.bytes_written == partials + rows * (len(outputs) + 3) * 4

        with self.traffic() as backward:
            (grad,) = torch.autograd.grad(outputs, logits, [torch.ones_like(o) for o in outputs])
        assert torch.equal(backward.reads(logits), expected)
        assert (backward.writes(logits) == 0).all()
        # Zeros for ignored rows are written too.
        assert (backward.writes(grad) == 1).all()
        assert (backward.reads(grad) == 0).all()
        assert backward.kernels == ["coefficients_kernel", "backward_kernel"]
        # Labels, statistics and gradients of rows; five coefficients a row and tile.
        of_rows = rows * (8 + 3 * 4 + len(outputs) * 4) + backward_tiles * (
            rows * 2 * 4 + count * (3 * 4 + 8)
        )
        assert backward.bytes_read == count * (vocab + 1) * size + of_rows
        assert backward.bytes_written == rows * vocab * size + rows * 5 * 4

    def test_several_labels(self):
        """A row once, whatever the number of labels, and each label's own logit beside it."""
        logits = torch.randn(4, 700, dtype=torch.bfloat16).requires_grad_()
        labels = torch.tensor([[0, 5, -100], [-100] * 3, [699, 3, 350], [7, 7, 1]])
        kept = (labels != -100).any(-1)
        at_labels = torch.zeros(4, 701, dtype=torch.int64)
        at_labels.scatter_add_(1, labels.where(labels >= 0, 700), torch.ones_like(labels))
        at_labels = at_labels[:, :700]
        once = kept[:, None].expand(4, 700).long()
        with self.traffic() as forward:
            result = rk.token_logprobs(logits, labels)
        assert torch.equal(forward.reads(logits), once + at_labels)
        assert (forward.writes(result.logprobs) == 1).all()
        with self.traffic() as backward:
            (grad,) = torch.autograd.grad(result.logprobs.sum(), logits)
        assert torch.equal(backward.reads(logits), once + at_labels)
        assert torch.equal(backward.writes(grad), 1 + at_labels)
        assert (backward.reads(grad) == 0).all()

    @pytest.mark.parametrize("direction", ["reverse", "forward"])
    def test_kl_divergence(self, direction):
        from rlhf_kernels.kernels.triton.kl import PARTS, TILE

        rows, vocab, tiles = 3, TILE + 5, 2
        logits = torch.randn(rows, vocab, dtype=torch.bfloat16).requires_grad_()
        ref = torch.randn(rows, vocab, dtype=torch.bfloat16)
        with self.traffic() as forward:
            result = rk.kl_divergence(logits, ref, direction=direction)
        assert (forward.reads(logits) == 1).all() and (forward.reads(ref) == 1).all()
        assert (forward.writes(result) == 1).all()
        partials = rows * tiles * PARTS * 5 * 4
        assert forward.bytes_read == 2 * rows * vocab * 2 + partials
        assert forward.bytes_written == partials + rows * (1 + 5) * 4

        # A row without upstream gradient is not read.
        upstream = torch.tensor([1.0, 0.0, -2.0])
        with self.traffic() as backward:
            (grad,) = torch.autograd.grad(result, logits, upstream)
        expected = (upstream != 0)[:, None].expand(rows, vocab).long()
        assert torch.equal(backward.reads(logits), expected)
        assert torch.equal(backward.reads(ref), expected)
        assert (backward.writes(grad) == 1).all() and (backward.reads(grad) == 0).all()
        of_rows = rows * 6 * 4 + tiles * 4 * (rows * 2 + 2 * 2)
        assert backward.bytes_read == 2 * 2 * vocab * 2 + of_rows
        assert backward.bytes_written == rows * vocab * 2 + rows * 4 * 4

    @pytest.mark.parametrize("estimator", ["k1", "k3", "k3+"])
    def test_kl_penalty(self, estimator):
        logprobs = torch.randn(3, 700).requires_grad_()
        ref = torch.randn(3, 701)[:, 1:]
        with self.traffic() as forward:
            result = rk.kl_penalty(logprobs, ref, estimator=estimator)
        assert (forward.reads(logprobs) == 1).all() and (forward.reads(ref) == 1).all()
        assert (forward.writes(result) == 1).all()
        assert (forward.bytes_read, forward.bytes_written) == (2100 * 8, 2100 * 4)
        upstream = torch.randn(3, 700)
        with self.traffic() as backward:
            (grad,) = torch.autograd.grad(result, logprobs, upstream)
        for t in (logprobs, ref, upstream):
            assert (backward.reads(t) == 1).all()
        assert (backward.writes(grad) == 1).all()
        assert (backward.bytes_read, backward.bytes_written) == (2100 * 12, 2100 * 4)

    def test_gae(self):
        from rlhf_kernels.kernels.triton.advantages import TILE
        from rlhf_kernels.kernels.triton.advantages_scan import FIELDS

        rows, cols, tiles = 2, 2 * TILE + 22, 3
        rewards, values = torch.randn(rows, cols), torch.randn(rows, cols + 1)[:, 1:]
        mask = torch.rand(rows, cols) < 0.7
        with self.traffic() as traffic:
            result = rk.gae(rewards, values, mask=mask)
        assert traffic.kernels == ["aggregate_kernel", "scan_kernel"]
        # Once by each launch; the first tile of a row is what no tile waits for.
        once = 1 + (torch.arange(cols) >= TILE).long().expand(rows, cols)
        assert torch.equal(traffic.reads(rewards), once)
        # The token and the one behind it, which is in the first-level cache by then.
        inner = (torch.arange(cols) % TILE != 0).long()
        assert torch.equal(traffic.reads(mask), once * (1 + inner))
        # Where tokens are masked, the next one that is not.
        assert (traffic.reads(values) >= once).all()
        assert traffic.reads(values).sum() <= 2 * once.sum()
        for out in result:
            assert (traffic.writes(out) == 1).all()
        fields = (FIELDS.value - 1) * 8
        behind = sum(range(tiles))
        reads = sum(int(traffic.reads(t).sum()) * t.element_size() for t in (rewards, values, mask))
        assert traffic.bytes_read == reads + rows * behind * fields
        assert traffic.bytes_written == rows * cols * 8 + rows * (tiles - 1) * fields

    def test_discounted_returns(self):
        from rlhf_kernels.kernels.triton.advantages import TILE
        from rlhf_kernels.kernels.triton.advantages_scan import FIELDS

        rows, cols = 2, 2 * TILE + 22
        rewards, mask = torch.randn(rows, cols), torch.rand(rows, cols) < 0.7
        with self.traffic() as traffic:
            out = rk.discounted_returns(rewards, mask=mask)
        assert traffic.kernels == ["aggregate_kernel", "scan_kernel"]
        once = 1 + (torch.arange(cols) >= TILE).long().expand(rows, cols)
        for t in (rewards, mask):
            assert torch.equal(traffic.reads(t), once)
        assert (traffic.writes(out) == 1).all()
        # A row has three tiles. The first two write their states; the second reads one, the third
        # both.
        state = (FIELDS.value - 1) * 8
        assert traffic.bytes_read == int(once.sum()) * (4 + 1) + rows * 3 * state
        assert traffic.bytes_written == rows * cols * 4 + rows * 2 * state

    @pytest.mark.parametrize("whiten", [False, True])
    def test_ppo_advantages(self, whiten):
        from rlhf_kernels.kernels.triton.advantages import TILE

        rows, cols = 2, 2 * TILE + 22
        logprobs, ref, values = torch.randn(3, rows, cols).unbind()
        mask = torch.rand(rows, cols) < 0.7
        with self.traffic() as traffic:
            out = rk.ppo_advantages(
                torch.randn(rows), logprobs, ref, values, mask=mask, kl_coef=0.1, whiten=whiten
            )
        scan = ["aggregate_kernel", "scan_kernel"]
        assert traffic.kernels == scan + ["combine_kernel", "apply_kernel"] * whiten
        once = 1 + (torch.arange(cols) >= TILE).long().expand(rows, cols)
        for t in (logprobs, ref):
            assert torch.equal(traffic.reads(t), once)
        assert (traffic.reads(values) >= once).all()
        # Whitening reads what the scan wrote, and the mask, and writes it anew.
        assert (traffic.writes(out.advantages) == 1 + whiten).all()
        assert (traffic.reads(out.advantages) == int(whiten)).all()
        assert (traffic.reads(mask) <= 2 * once + whiten).all()
        for t in (out.returns, out.rewards):
            assert (traffic.writes(t) == 1).all() and (traffic.reads(t) == 0).all()

    @pytest.mark.parametrize("masked", [False, True])
    def test_whiten(self, masked):
        x = torch.randn(3, 2101)[:, 1:]
        mask = torch.rand(3, 2100) < 0.5 if masked else None
        with self.traffic() as traffic:
            out = rk.whiten(x, mask=mask)
        tiles = 2
        assert (traffic.reads(x) == 2).all() and (traffic.writes(out) == 1).all()
        assert mask is None or (traffic.reads(mask) == 2).all()
        # Three moments a tile, of which two are read once more, to sum around the mean of all; then
        # two statistics.
        statistics = tiles * (2 + 3 + 2) * 8
        assert traffic.bytes_read == 6300 * (10 if masked else 8) + statistics
        assert traffic.bytes_written == 6300 * 4 + tiles * 3 * 8 + 2 * 8

    def test_group_advantages(self):
        rewards = torch.randn(40)
        with self.traffic() as traffic:
            out = rk.group_advantages(rewards, 8)
        # Mean, spread, result; and the first of each group, which the others are relative to.
        expected = 3 + (torch.arange(40) % 8 == 0).long()
        assert torch.equal(traffic.reads(rewards), expected)
        assert (traffic.writes(out) == 1).all() and (traffic.bytes_written) == 160

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_losses(self, dtype):
        """The sweep reads every token once, the mask once more where it needs sequences' counts."""
        shape = rows, cols = 2, 1100
        x, old, third, ref, entropy = torch.randn(5, *shape).to(dtype)
        x, entropy = x.requires_grad_(), entropy.requires_grad_()
        mask = torch.rand(shape) < 0.7
        policy = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.01)
        more = {"ref_logprobs": ref, "entropy": entropy, "config": policy}
        for function, options, wanted, partials in (
            (rk.policy_loss, more, (x, entropy), 16 + 3),
            (rk.value_loss, {"clip_range": 0.2}, (x,), 8 + 1),
        ):
            inputs = [t for t in options.values() if isinstance(t, torch.Tensor)] + [x, old, third]
            with self.traffic() as forward:
                loss, metrics = function(x, old, third, mask, **options)
            assert (forward.reads(mask) == 1).all()
            for t in inputs:
                # What lies under the mask is not read.
                assert torch.equal(forward.reads(t), mask.long())
                assert (forward.writes(t) == 0).all()
            slots = rows * 2
            written = rows * cols * 4 * len(wanted) + 4 * (slots * partials + 1 + 1)
            assert forward.bytes_written == written + metrics.tensor.numel() * 4
            with self.traffic() as backward:
                gradients = torch.autograd.grad(loss, wanted)
            count = rows * cols * len(wanted)
            assert backward.kernels == ["backward_kernel"]
            # The scale and the upstream gradient: once each.
            assert backward.bytes_read == count * 4 + 2 * 4
            assert backward.bytes_written == count * x.element_size()
            assert all((backward.writes(g) == 1).all() for g in gradients)
