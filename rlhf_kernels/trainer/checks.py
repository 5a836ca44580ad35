"""Checks settings before anything is read or written; they need neither data nor models."""

import dataclasses
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..config.preference import SORTED
from .adapters import find_adapter
from .algorithms import ALGORITHMS, loss_config
from .config import (
    DataConfig,
    DPOConfig,
    KTOConfig,
    ModelConfig,
    OnlineConfig,
    OptimConfig,
    PPOConfig,
    RunConfig,
)
from .data import Row
from .errors import UserError, blamed_on, one_line, require
from .reward_functions import is_function


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _needs(package: str, name: str, value: object) -> None:
    expected = f"the package {package} to be installed (pip install {package})"
    require(_installed(package), name, expected, value)


def processes() -> int:
    """The number of processes that the launcher started, read before they are connected."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _given(config: Any, names: Sequence[str], **defaults: Any) -> dict[str, Any]:
    """Those of some settings that have another value than their default."""
    usual = {f.name: f.default for f in dataclasses.fields(config)} | defaults
    values = {name: getattr(config, name) for name in names}
    return {name: value for name, value in values.items() if value != usual[name]}


def _say_unused(found: Mapping[str, Any], why: str) -> None:
    """Says which settings are not read, as a file of settings may hold those of several runs."""
    for name, value in found.items():
        warnings.warn(f"{name}: {value!r} is not used {why}", stacklevel=2)


def check_settings(
    name: str,
    run: RunConfig,
    model: ModelConfig,
    data: DataConfig,
    optim: OptimConfig,
    own: Sequence[Any],
) -> None:
    """Requires settings that agree with each other, the machine and the installed packages.

    Raises:
        UserError: names the setting.
    """
    count, size = processes(), optim.batch_size
    require(size % count == 0, "batch_size", f"a multiple of {count} processes", size)
    _check_trackers(run.report_to)
    # accelerate launch sets this variable.
    precision = run.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp16":
        there = run.device != "cpu" and torch.accelerator.is_available()
        require(there, "mixed_precision", "'no' or 'bf16' without a GPU", precision)
    _check_attention(model.attn_implementation)
    _check_size(model)
    if model.model is not None:
        sizes = _given(model, ("hidden_size", "num_layers", "num_heads"))
        _say_unused(sizes, f"with model {model.model}")
    if data.data is not None:
        _say_unused(_given(data, ("max_operand", "operators")), f"with data {data.data}")
    if model.lora_rank:
        _needs("peft", "lora_rank", model.lora_rank)
    for config in own:
        if isinstance(config, DPOConfig):
            sort = [x for x in config.loss_type if x in SORTED]
            whole = count == 1 and optim.micro_batch_size in (0, size)
            expected = "no loss that sorts the pairs of a batch where the batch is split"
            require(whole or not sort, "loss_type", expected, next(iter(sort), None))
        if isinstance(config, KTOConfig) and config.loss_type == "kto":
            expected = ">= 2 with loss_type kto, whose baseline mismatches the rows of a batch"
            require(size >= 2, "batch_size", expected, size)
        if isinstance(config, OnlineConfig):
            if config.engine == "vllm" and not run.dry_run:
                _needs("vllm", "engine", config.engine)
            taught, teacher = ALGORITHMS[name].teacher, config.teacher_model
            expected = "a path or hub name" if taught else f"no value with {name}"
            require((teacher is not None) == taught, "teacher_model", expected, teacher)
            used = config.kl_coef > 0
            require(used or not taught, "kl_coef", f"> 0 with {name}", config.kl_coef)
            alone = count == 1 or not config.sft_steps
            expected = "0 with several processes; use the sft stage"
            require(alone, "sft_steps", expected, config.sft_steps)
            check_online(name, config, optim, count)


def check_online(name: str, config: OnlineConfig, optim: OptimConfig, count: int) -> None:
    """Requires that the settings of an online stage fit each other and `count` processes."""
    size, group, rounds = optim.batch_size, config.num_generations, config.dynamic_sampling
    mini, target = config.mini_batch_size or size, config.penalty_target
    algorithm = ALGORITHMS[name]
    several = group > 1 or not algorithm.grouped
    expected = f">= 2 with {name}, which compares the completions of a prompt"
    require(several, "num_generations", expected, group)
    require(size % mini == 0, "mini_batch_size", f"a divisor of batch_size={size}", mini)
    require(size % group == 0, "num_generations", f"a divisor of batch_size={size}", group)
    require(mini % count == 0, "mini_batch_size", f"a multiple of {count} processes", mini)
    require(rounds == 1 or group > 1, "dynamic_sampling", "1 where num_generations is 1", rounds)
    once = config.epochs * size == mini
    expected = "0 with one update per rollout, whose KL is 0"
    require(not (once and target), "penalty_target", expected, target)
    try:
        loss = loss_config(algorithm, config)
    except (TypeError, ValueError) as error:
        # The message is of the form "PolicyLossConfig: clip_low must be ...".
        raise UserError(str(error).removeprefix("PolicyLossConfig: ")) from error
    penal = loss.objective == "penalty" or not target
    require(penal, "penalty_target", "0 without objective penalty", target)
    for used, why, names in (
        (loss.objective == "penalty", "without objective penalty", ("penalty_coef",)),
        (config.correction != "none", "without correction", ("correction_mode", "correction_max")),
        (config.kl_coef > 0, "where kl_coef is 0", ("kl_estimator",)),
        (config.kl_target > 0, "where kl_target is 0", ("kl_horizon",)),
        (
            loss.objective not in ("reinforce", "penalty"),
            f"with objective {loss.objective}, which does not clip",
            ("clip_low", "clip_high"),
        ),
    ):
        unread = {} if used else _given(config, names, **algorithm.defaults)
        for setting, value in unread.items():
            require(False, setting, f"no value {why}", value)


def _check_trackers(names: Sequence[str]) -> None:
    there = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name != "all":
            known = tuple(LOGGER_TYPE_TO_CLASS)
            require(name in known, "report_to", f"one of {', '.join(known)}", name)
            expected = f"the tracker's package to be installed (pip install {name})"
            require(name in there, "report_to", expected, name)


def _check_size(model: ModelConfig) -> None:
    """Requires that a built model fits in memory, because allocation alone would not fail."""
    if model.model is not None:
        return
    # Attention has four square matrices, the MLP three of twice that size.
    size = 10 * model.num_layers * model.hidden_size**2 * getattr(torch, model.dtype).itemsize
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    expected = f"weights within this machine's {there / 2**30:,.0f} GiB"
    found = f"{model.hidden_size} with {model.num_layers} layers: {size / 2**30:,.0f} GiB"
    require(size <= there, "hidden_size", expected, found)


def _check_attention(name: str | None) -> None:
    # A name with a slash is a kernel on the hub.
    if name is None or "/" in name:
        return
    # Paged attention needs the cache of transformers' own server.
    keys = ALL_ATTENTION_FUNCTIONS.valid_keys()
    known = sorted({"eager", *(key for key in keys if not key.startswith("paged|"))})
    require(name in known, "attn_implementation", f"one of {', '.join(known)}", name)
    if name == "flash_attention_2":
        _needs("flash_attn", "attn_implementation", name)


def check_output(folder: Path) -> None:
    """Requires that the folder can be created and written to; creates nothing."""
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        require(False, "output_dir", f"a folder that there can be ({error.strerror})", str(folder))
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    require(there.is_dir(), "output_dir", "a folder", f"the file {there}")
    expected = "a folder that can be written to"
    require(os.access(there, os.W_OK | os.X_OK), "output_dir", expected, str(there))


def check_base(folder: Path, model: ModelConfig) -> None:
    """Requires that a saved adapter will not take the place of its own base model.

    Args:
        folder: output folder of the run.
        model: its settings.
    """
    if model.model is None:
        return
    found = find_adapter(model.model, setting="model") if _is_adapter(model.model) else None
    base = found.base if found else model.model if model.lora_rank else None
    for name in ("policy", "reward"):
        place = folder / name
        own = base is not None and os.path.exists(base) and place.exists()
        taken = own and place.samefile(str(base))
        expected = f"another folder: the adapter would replace its own base model {base}"
        require(not taken, "output_dir", expected, str(folder))


def _is_adapter(path: str) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def check_model(name: str, path: str) -> None:
    """Requires that a path or hub name has the configuration and weight files of a model."""
    folder = Path(path)
    require(not folder.is_file(), name, "a folder or hub name of a model", f"the file {path}")
    if not folder.is_dir():
        _check_hub(name, path)
        return
    files = sorted(p.name for p in folder.iterdir())
    if "adapter_config.json" not in files:
        shown = ", ".join(files[:4]) or "nothing"
        found = f"{shown} in the folder {path}"
        if "config.json" not in files:
            raise UserError(f"{name}: expected config.json of a saved model, found {found}")
        weights = any(f.endswith((".safetensors", ".bin")) for f in files)
        if not weights:
            raise UserError(f"{name}: expected weights (model.safetensors), found {found}")
        _check_json(name, folder / "config.json")


def _check_json(name: str, file: Path) -> None:
    with blamed_on(name, f"{file} cannot be read"):
        content = json.loads(file.read_text(encoding="utf-8"))
        kind = content.get("model_type") if isinstance(content, dict) else None
        require(isinstance(kind, str), name, f"a model_type in {file}", kind)


def _check_hub(name: str, path: str) -> None:
    """Asks the hub once if nothing is cached; a loader would retry for half a minute."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith((".", "~", "/")):
        raise UserError(f"{name}: expected a folder of a model, found none at {path!r}")
    with blamed_on(name, "expected a folder or hub name of a model"):
        cached = any(
            isinstance(try_to_load_from_cache(path, file), str)
            for file in ("config.json", "adapter_config.json")
        )
    if cached:
        return
    try:
        HfApi().model_info(path, timeout=20)
    except Exception as error:
        text = f"no folder {path!r} here, and the hub does not give it: {one_line(error)}"
        raise UserError(f"{name}: {text}") from error


def check_models(model: ModelConfig, own: Sequence[Any]) -> None:
    """Calls `check_model` once for every model that the settings name."""
    named = [("model", model.model)]
    for config in own:
        if isinstance(config, OnlineConfig):
            named += [("reward_funcs", p) for p in config.reward_funcs if not is_function(p)]
            named.append(("teacher_model", config.teacher_model))
        if isinstance(config, PPOConfig):
            named.append(("critic_model", config.critic_model))
    for name, path in dict.fromkeys(named):
        if path is not None:
            check_model(name, path)
    path = model.model
    # Whether a name on the hub is an adapter's is not known yet.
    no_adapter = path is None or (Path(path).is_dir() and not _is_adapter(path))
    unused = model.lora_alpha is not None and not model.lora_rank and no_adapter
    expected = "lora_rank > 0 with it, or a model that is an adapter"
    require(not unused, "lora_alpha", expected, model.lora_alpha)


def check_rows(
    rows: Sequence[Row], data: DataConfig, optim: OptimConfig, own: Sequence[Any]
) -> None:
    """Requires enough training rows for a batch, with completions if a loss imitates them."""
    needed, name = optim.batch_size, "batch_size"
    for config in own:
        if isinstance(config, OnlineConfig):
            needed = optim.batch_size // config.num_generations
            name += " / num_generations" * (config.num_generations > 1)
            buffer, longest = config.overlong_buffer, data.max_new_tokens
            expected = f"at most max_new_tokens={longest}"
            require(buffer <= longest, "overlong_buffer", expected, buffer)
            imitated = {"sft_steps": config.sft_steps, "ptx_coef": config.ptx_coef}
            imitated["ptx_coef"] *= config.ptx_data is None
            for setting, value in imitated.items():
                bare = next((row for row in rows if row.completion is None), None)
                what = f"0 for {data.data}, whose rows have no completions"
                require(not value or bare is None, setting, what, value)
    require(needed <= len(rows), name, f"at most the {len(rows)} training rows", needed)
