"""Adapters (peft): creating, loading, continuing, merging and saving them."""

import contextlib
import copy
import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

from .config import ModelConfig, require
from .errors import UserError, blamed_on
from .finite import check_weights
from .loading import names
from .modes import noted

if TYPE_CHECKING:
    import peft

    #: A model of transformers, or peft's wrapper of one, which passes on its attributes.
    Network = PreTrainedModel | peft.PeftModel

#: peft's names of the trained adapter and of the reference policy's frozen one.
TRAINED, FROZEN = "default", "reference"

# Adapter types that change layers in place, so the base model's forward pass applies them.
_KINDS = ("LORA", "IA3", "LOHA", "LOKR", "OFT", "VERA", "HRA", "LN_TUNING")
# Options that replace parts of the base model or of its structure.
_UNSUPPORTED = ("trainable_token_indices", "layer_replication")

# Ways to start LoRA that subtract something random, or of some data, from the base model's weights.
_RANDOM_BASES = ("pissa_niter", "corda", "lora_ga")
# Ways that leave the base model's weights as they are.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter on disk."""

    path: str
    config: "peft.PeftConfig"

    @property
    def base(self) -> str:
        base: str | None = self.config.base_model_name_or_path
        assert base is not None  # `find_adapter` refuses an adapter without.
        return base


def find_adapter(path: str, *, setting: str) -> Adapter | None:
    """The adapter in a folder or on the hub; None if the path holds a whole model.

    Raises:
        UserError: the trainer does not support its type, or it names no base model.
    """
    if find_adapter_config_file(path) is None:
        return None
    installed = importlib.util.find_spec("peft") is not None
    require(installed, setting, f"the package peft for the adapter in {path}", "none")
    # peft is an optional package.
    import peft

    with blamed_on(setting, f"the adapter in {path} cannot be read"):
        config = peft.PeftConfig.from_pretrained(path)
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if getattr(config, "alora_invocation_tokens", None) or getattr(config, "arrow_config", None):
        kind = "activated LORA"
    kind += "".join(f" with {option}" for option in _UNSUPPORTED if getattr(config, option, None))
    expected = f"an adapter that is one of {', '.join(_KINDS)}"
    if kind not in _KINDS:
        raise UserError(f"{setting}: expected {expected}, found {kind} in {path}")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_RANDOM_BASES):
        fix = "save it with path_initial_model_for_weight_conversion, which makes it a plain one"
        found = f"init_lora_weights {start!r}, which changed the base model beyond recovery"
        raise UserError(f"{setting}: the adapter in {path} has {found}; {fix}")
    base = config.base_model_name_or_path
    if not base:
        raise UserError(f"{setting}: the adapter in {path} names no base model")
    folder = Path(path)
    stored = (peft.utils.SAFETENSORS_WEIGHTS_NAME, peft.utils.WEIGHTS_NAME)
    if folder.is_dir() and not any((folder / name).is_file() for name in stored):
        # peft would look for it on the hub.
        raise UserError(f"{setting}: the adapter in {path} lacks its weights ({stored[0]})")
    if Path(base).exists() and Path(path).exists() and Path(base).samefile(path):
        raise UserError(f"{setting}: the adapter in {path} names its own folder as base model")
    if (Path(base) / "adapter_config.json").is_file():
        found = f"the adapter in {path} is one of {base}, which is an adapter too"
        raise UserError(f"{setting}: {found}; merge that one into its base model first")
    return Adapter(path, config)


@contextlib.contextmanager
def named_base(adapter: Adapter | None, *, setting: str) -> Iterator[None]:
    """Adds the name of the adapter to errors that loading its base model raises."""
    try:
        yield
    except UserError as error:
        if adapter is None:
            raise
        text = str(error).removeprefix(f"{setting}: ")
        fix = f"put it back, or correct base_model_name_or_path in {adapter.path}"
        told = f"the adapter in {adapter.path} is one of {adapter.base}: {text}"
        raise UserError(f"{setting}: {told} ({fix})") from error


def new_adapter(
    model: PreTrainedModel, config: ModelConfig, *, task: str, heads: Sequence[str] = ()
) -> "peft.PeftModel":
    """Adds new LoRA weights to all linear layers but the `heads`, which are trained whole."""
    # peft is an optional package.
    import peft

    _check_rank(model, config.lora_rank, heads)
    excluded = [n for n, _ in model.named_modules() if _within(n, heads) or _bypassed(model, n)]
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 32,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type=task,
        modules_to_save=list(heads) or None,
        exclude_modules=excluded or None,
    )
    with blamed_on("lora_rank", f"{type(model).__name__} takes no adapters"):
        return _kept(peft.get_peft_model(model, settings, adapter_name=TRAINED), model)


def _bypassed(model: PreTrainedModel, name: str) -> bool:
    """Whether a state-space mixer reads the layer's weight alone, so that no adapter counts."""
    kinds = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
    return model.config.model_type in kinds and name.endswith((".out_proj", ".conv1d"))


def _check_rank(model: PreTrainedModel, rank: int, heads: Sequence[str]) -> None:
    """Requires that the rank fits at least one adapted layer; it may exceed smaller layers."""
    output = model.get_output_embeddings()
    ranks = {
        name: min(_sizes(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output
        and not (_within(name, heads) or _bypassed(model, name))
    }
    if ranks:
        name = max(ranks, key=ranks.__getitem__)
        expected = f"at most {ranks[name]}, beyond which no layer has more ({name})"
        require(rank <= ranks[name], "lora_rank", expected, rank)


def _sizes(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Input and output size; the weight of a quantised layer may have another shape."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == m or name.startswith(f"{m}.") for m in modules)


def _kept(wrapped: "peft.PeftModel", model: PreTrainedModel) -> "peft.PeftModel":
    noted(wrapped)._no_split_modules = model._no_split_modules
    return wrapped


def load_adapter(
    model: PreTrainedModel,
    adapter: Adapter,
    config: ModelConfig,
    *,
    setting: str,
    task: str,
    heads: Sequence[str] = (),
) -> "peft.PeftModel":
    """Adds a stored adapter to `model`, to train it further.

    Args:
        model: the adapter's base model.
        adapter: the stored adapter.
        config: `lora_rank` and `lora_alpha` must be unset or equal to the adapter's.
        setting: the setting that error messages name.
        task: peft's name of the model's task.
        heads: modules that are trained whole even if the adapter lacks them.

    Raises:
        UserError: the adapter does not fit the model, or has another rank.
    """
    # peft is an optional package.
    import peft

    # Of any type of adapter; each has fields of its own.
    own: Any = copy.deepcopy(adapter.config)
    for name, key in (("lora_rank", "r"), ("lora_alpha", "lora_alpha")):
        asked, has = getattr(config, name), getattr(own, key, None)
        same = not asked or asked == has
        expected = f"unset or {has} as in the adapter of {adapter.path}, which is trained further"
        require(same, name, expected, asked)
    sequence = task == "SEQ_CLS"
    own.task_type, own.auto_mapping = task, None
    if heads:
        own.modules_to_save = sorted({*(own.modules_to_save or ()), *heads} - {"lm_head"})
    with blamed_on(setting, f"the adapter in {adapter.path} does not fit {adapter.base}"):
        stored = peft.utils.load_peft_weights(adapter.path, device="cpu")
        if heads:
            own.inference_mode = False
            policy: peft.PeftModel = peft.get_peft_model(model, own, adapter_name=TRAINED)
            # peft requires all modules that are trained whole; those not stored keep their values.
            fresh = peft.get_peft_model_state_dict(policy, adapter_name=TRAINED)
            fresh |= {k: v for k, v in stored.items() if k in fresh}
            peft.set_peft_model_state_dict(policy, fresh, adapter_name=TRAINED)
        else:
            policy = peft.PeftModel.from_pretrained(
                model, adapter.path, adapter_name=TRAINED, is_trainable=True, config=own
            )
    loaded = peft.get_peft_model_state_dict(policy, adapter_name=TRAINED)
    prefix = "base_model.model."
    lacking = [k for k in loaded.keys() - stored.keys() if not _headed(k, heads, prefix)]
    # A reward model has no LM head, so it needs no adapter weights of one.
    useless = ("lm_head", "embed_out") if sequence else ()
    extra = [k for k in stored.keys() - loaded.keys() if not _headed(k, useless, prefix)]
    for found, what in ((lacking, "lacks"), (extra, "has beyond the model's")):
        if found:
            text = f"{setting}: the adapter in {adapter.path} {what} weights {names(found)}"
            raise UserError(text)
    check_weights(setting, policy)
    noted(policy).continued = True
    return _kept(policy, model)


def _headed(key: str, heads: Sequence[str], prefix: str) -> bool:
    return _within(key.removeprefix(prefix), heads)


def check_output(policy: "peft.PeftModel", *, setting: str) -> None:
    """Requires that the weight alone defines the output of the LM head.

    Raises:
        UserError: the adapter adds a product or rows of its own to the LM head.
    """
    base: Any = policy.get_base_model()
    head = base.get_output_embeddings()
    whole = isinstance(head, nn.Linear) or hasattr(head, "modules_to_save")
    if not whole or hasattr(head, "base_layer"):
        expected = "an adapter that leaves the LM head alone or has it among modules_to_save"
        raise UserError(f"{setting}: expected {expected}, found {type(head).__name__} on it")


def merged(model: nn.Module) -> PreTrainedModel:
    """A copy of the base model with the adapter merged into its weights, or of a plain model."""
    twin: Any = copy.deepcopy(model)
    base: PreTrainedModel = twin
    if hasattr(twin, "merge_and_unload"):
        with blamed_on("model", "its adapter cannot be merged into its base model"):
            base = twin.merge_and_unload()
    return base


def is_adapted(network: nn.Module) -> TypeGuard["peft.PeftModel"]:
    """Whether it is a model with an adapter of peft's."""
    return hasattr(network, "peft_config")


def is_new(policy: nn.Module) -> bool:
    """Whether the adapter changes nothing yet: a new LoRA adapter, with B matrices of zeros."""
    if getattr(policy, "continued", False):
        return False
    return not any(p.any() for n, p in policy.named_parameters() if ".lora_B." in n)


def can_freeze_twin(policy: "peft.PeftModel") -> bool:
    """Whether the adapter has no weights of the base model, so a frozen copy can coexist."""
    config: Any = policy.peft_config[TRAINED]
    # peft has target_parameters from 0.17 on.
    parameters = getattr(config, "target_parameters", None)
    if config.peft_type != "LORA" or config.bias != "none" or parameters:
        return False
    # With others (PiSSA, OLoRA, LoftQ) every new adapter subtracts its start from the base model.
    return bool(config.init_lora_weights in _PLAIN_STARTS)


def freeze_twin(policy: "peft.PeftModel") -> None:
    """Adds a frozen copy of the adapter for the reference policy."""
    config: Any = copy.deepcopy(policy.peft_config[TRAINED])
    config.inference_mode = True
    # The policy's own dropout has been turned off.
    config.lora_dropout = 0.0
    policy.add_adapter(FROZEN, config)
    policy.set_adapter(TRAINED)
    trained = dict(policy.named_parameters())
    for name, twin in trained.items():
        if f".{FROZEN}." in f"{name}.":
            source = trained[f"{name}.".replace(f".{FROZEN}.", f".{TRAINED}.")[:-1]]
            twin.data = source.detach().clone()
            twin.requires_grad_(False)


@contextlib.contextmanager
def acting(policy: nn.Module, adapter: str | None) -> Iterator[None]:
    """Forward passes inside use the given adapter, or none; `requires_grad` does not change.

    peft's own switches reset `requires_grad`, which fails for sharded weights while gathered.
    """
    layers: list[Any] = [m for m in policy.modules() if hasattr(m, "_disable_adapters")]
    before = [(m._disable_adapters, m._active_adapter) for m in layers]
    try:
        for layer in layers:
            if adapter is None:
                layer._disable_adapters = True
            else:
                several = isinstance(layer._active_adapter, list)
                layer._active_adapter = [adapter] if several else adapter
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def save_network(network: nn.Module, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Saves a network for transformers or peft, and for later stages.

    An adapter of a model that was built here is merged, because its base model is not saved.

    Args:
        network: has the architecture and the configuration.
        folder: is created.
        weights: the unsharded weights of the network by its own names.
    """
    if not is_adapted(network):
        plain: Any = network
        plain.save_pretrained(folder, state_dict=dict(weights))
    elif network.peft_config[TRAINED].base_model_name_or_path:
        network.save_pretrained(str(folder), state_dict=dict(weights), selected_adapters=[TRAINED])
    else:
        _whole(network, weights).save_pretrained(folder)


def _whole(network: "peft.PeftModel", weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A merged model made from gathered weights."""
    # peft is an optional package.
    import peft

    base: Any = network.get_base_model()
    fresh: Any = type(base)(copy.deepcopy(base.config)).to(base.dtype)
    settings: Any = copy.deepcopy(network.peft_config[TRAINED])
    wrapped = peft.get_peft_model(fresh, settings, adapter_name=TRAINED)
    own = {k: v for k, v in weights.items() if f".{FROZEN}." not in f"{k}."}
    wrapped.load_state_dict(own)
    whole: Any = wrapped.merge_and_unload()
    assert isinstance(whole, PreTrainedModel)  # As `base` is.
    return whole
