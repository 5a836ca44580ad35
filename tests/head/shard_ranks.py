"""Ranks for tests of a sharded vocabulary: real processes over gloo that run what they are sent."""

import contextlib
import io
import multiprocessing
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.kernels.quick_interpreter import quicken

import rlhf_kernels as rk
from rlhf_kernels.core import data_checks, env
from rlhf_kernels.head import chunks
from rlhf_kernels.kernels import triton
from rlhf_kernels.testing import assert_bitwise_equal

TIMEOUT = 120


def _dumped(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _loaded(data: bytes) -> Any:
    # weights_only=False admits configurations and exceptions. Only these processes wrote the data.
    return torch.load(io.BytesIO(data), weights_only=False)


def _shard(t: Tensor, dim: int | None, sizes: list[int], rank: int) -> Tensor:
    """This rank's part of t along dim, as a leaf; a copy of all of it where dim is None."""
    if not isinstance(t, Tensor):
        return t
    part = t if dim is None else t.split(sizes, dim)[rank]
    return part.detach().clone().requires_grad_(t.requires_grad)


def call(
    group: Any,
    rank: int,
    *,
    op: str,
    backend: str,
    arguments: dict[str, Any],
    dims: dict[str, int],
    sizes: list[int],
    upstream: list[Tensor],
    options: dict[str, Any],
    compiled: bool = False,
    through: float | None = None,
    only_rank: dict[int, dict[str, Any]] | None = None,
    blind: bool = False,
    checked: bool = False,
    budget: int | None = None,
    penalty: bool = False,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Calls an operation on this rank's shard; returns its results and the gradients by argument.

    Args:
        group: the process group.
        rank: place in it.
        op: name of the operation.
        backend: backend to force.
        arguments: tensors of the whole vocabulary by name.
        dims: dimension of the vocabulary in those that have one.
        sizes: columns of each rank.
        upstream: gradients of the leading results; results after these take none.
        options: other arguments.
        compiled: call it under torch.compile.
        through: multiply sharded arguments by this first, so that they are no leaves.
        only_rank: arguments that replace those of one rank.
        blind: data may not be looked at, as on a GPU.
        checked: as under RLHF_KERNELS_CHECK=1.
        budget: bytes of logits in flight.
        penalty: return the gradients of the sum, over the ranks, of the squared gradients.
    """
    arguments = {k: _shard(t, dims.get(k), sizes, rank) for k, t in arguments.items()}
    arguments |= (only_rank or {}).get(rank, {})
    leaves = {k: t for k, t in arguments.items() if isinstance(t, Tensor) and t.requires_grad}
    if through is not None:
        arguments |= {k: t * through for k, t in leaves.items() if k in dims}
    function = getattr(rk, op)
    if compiled:
        # Not inductor: what it compiles is not in question here.
        function = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    can_read_on_host = (lambda _: False) if blind else data_checks.can_read_on_host
    emulated = contextlib.nullcontext()
    if backend == "cuda" and all(t.device.type == "cpu" for t in leaves.values()):
        from tests.kernels import emulated_cuda

        emulated = emulated_cuda.installed()
    with (
        emulated,
        rk.use_backend(backend),
        mock.patch.object(data_checks, "can_read_on_host", can_read_on_host),
        mock.patch.object(env, "CHECK", checked),
        mock.patch.object(chunks, "CPU_CHUNK_BYTES", budget or chunks.CPU_CHUNK_BYTES),
    ):
        results = [*function(**arguments, **options, group=group)]
        results = [getattr(r, "tensor", r) if op == "linear_policy_loss" and i else r
                   for i, r in enumerate(results)]  # fmt: skip
        gradients = {}
        if upstream and leaves:
            results_used = results[: len(upstream)]
            # A gradient that overwrote what it was made from, or a compiled one, comes but once.
            once = compiled or "inplace_backward" in options
            found, *again = (
                torch.autograd.grad(
                    results_used, list(leaves.values()), upstream, retain_graph=not once
                )
                for _ in range(1 if once else 2)
            )
            gradients = dict(zip(leaves, found, strict=True))
            if penalty:
                squares = _squares(results_used, list(leaves.values()), upstream)
                found = torch.autograd.grad(squares, list(leaves.values()))
                kept = [r.detach() for r in results if r is not None]
                return kept, dict(zip(leaves, found, strict=True))
            for second in again:
                for a, e in zip(second, found, strict=True):
                    assert_bitwise_equal(a, e)
    return [r.detach() for r in results if r is not None], gradients


def _squares(results: list[Tensor], leaves: list[Tensor], upstream: list[Tensor]) -> Tensor:
    """Sum of the squares of the gradients, which can be differentiated."""
    found = torch.autograd.grad(results, leaves, upstream, create_graph=True)
    return sum(g.square().sum() for g in found)


def _serve(rank: int, ranks: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    # A new process has Triton's interpreter as it comes.
    if triton.interpreted():
        quicken()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
    )
    groups = {n: torch.distributed.new_group(list(range(n))) for n in range(1, ranks)}
    groups[ranks] = torch.distributed.group.WORLD
    while (message := pipe.recv_bytes()) != b"":
        size, request = _loaded(message)
        try:
            answer = True, call(groups[size], rank, **request) if rank < size else None
        except Exception as error:
            answer = False, error
        pipe.send_bytes(_dumped(answer))
    torch.distributed.destroy_process_group()


class Ranks:
    """`count` processes that wait for calls."""

    def __init__(self, count: int, store: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def answers(self, size: int, **request: Any) -> list[tuple[bool, Any]]:
        """(whether it succeeded, result or exception) of ranks 0 to size - 1."""
        message = _dumped((size, request))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT):
                raise TimeoutError(f"rank {rank} does not answer")
            answers.append(_loaded(pipe.recv_bytes()))
        return answers[:size]

    def __call__(self, sizes: list[int], **request: Any) -> list[tuple]:
        """What `call` gives on each of len(sizes) ranks; raises what a rank raised."""
        answers = self.answers(len(sizes), sizes=sizes, **request)
        for good, result in answers:
            if not good:
                raise result
        return [result for _, result in answers]

    def close(self) -> None:
        """Ends the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send_bytes(b"")
            process.join(5)
            if process.is_alive():
                process.kill()
