"""Imports OpenRLHF without packages that only its imports need, such as flash-attn and deepspeed.

`load()` imports its modules with stubs for missing packages, and then removes the stubs, so that
other packages do not find them. The functions for padding, which flash-attn would provide, are
implemented here by indexing.
"""

import contextlib
import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor


def unpad_input(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, None]:
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().squeeze(-1)
    offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[indices], indices, offsets, int(lengths.max()), None


def pad_input(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    rows = x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, indices, x)
    return rows.view(batch, length, *x.shape[1:])


def rearrange(x: Tensor, pattern: str) -> Tensor:
    if pattern != "b s ... -> (b s) ...":
        raise NotImplementedError(pattern)
    return x.flatten(0, 1)


class _Name:
    """A stub for names that are imported but not used."""


def _stubs() -> dict[str, dict]:
    padding = {
        "unpad_input": unpad_input,
        "pad_input": pad_input,
        "rearrange": rearrange,
        "index_first_axis": lambda x, indices: x[indices],
    }
    lora = {"LoraConfig": _Name, "TaskType": _Name, "get_peft_model": _Name}
    return {
        "flash_attn": {},
        "flash_attn.bert_padding": padding,
        "flash_attn.utils": {},
        "flash_attn.utils.distributed": {"all_gather": _Name},
        "deepspeed": {},
        "peft": lora,
        "peft.tuners": {},
        "peft.tuners.lora": {"LoraLayer": _Name},
        "pylatexenc": {"latex2text": _Name},
        "ray": {},
    }


@contextlib.contextmanager
def _importable():
    before = set(sys.modules)
    missing = {}
    for name, content in _stubs().items():
        package = name.split(".")[0]
        if package in missing or importlib.util.find_spec(package) is None:
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None, is_package=True)
            module.__path__ = []
            vars(module).update(content)
            missing.setdefault(package, []).append((name, module))
    # Actors of Ray import much more, so their module is a stub too.
    launcher = ModuleType("openrlhf.trainer.ray.launcher")
    launcher.RayActorGroup = _Name
    modules = dict(pair for pairs in missing.values() for pair in pairs)
    modules["openrlhf.trainer.ray.launcher"] = launcher
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules.keys() - before:
            sys.modules.pop(name, None)


def load() -> SimpleNamespace | None:
    """OpenRLHF's actor, loss, utils and experience_maker; None if it is not installed."""
    if importlib.util.find_spec("openrlhf") is None:
        return None
    # transformers caches which optional packages exist: let it look now, without the stubs.
    importlib.import_module("transformers.integrations.deepspeed")
    available = importlib.import_module("transformers.utils.import_utils")
    for name, function in vars(available).items():
        if name.startswith("is_") and name.endswith("_available"):
            with contextlib.suppress(Exception):
                function()
    with _importable():
        return SimpleNamespace(
            actor=importlib.import_module("openrlhf.models.actor"),
            loss=importlib.import_module("openrlhf.models.loss"),
            utils=importlib.import_module("openrlhf.models.utils"),
            maker=importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker"),
        )
