"""Settings: dataclasses whose field names are the YAML keys and the command-line flags."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..config import preference
from .arguments import parse_config as parse_config
from .errors import UserError as UserError
from .errors import require as require


def _doc(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


def _at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        require(getattr(config, name) >= least, name, f">= {least}", getattr(config, name))


def _above(config: Any, bound: float, *names: str) -> None:
    for name in names:
        require(getattr(config, name) > bound, name, f"> {bound}", getattr(config, name))


def _share(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, name, "a number from 0 to 1", value)


#: Losses and learning rates are computed in fp32, where larger numbers are infinite.
SMALLEST, LARGEST = 2.0**-126, 3.4e38


def _choices(kind: Any) -> tuple[str, ...]:
    """The strings that a `Literal` or a `Literal | None` allows; empty for any other type."""
    literals = (part for part in (kind, *get_args(kind)) if get_origin(part) is Literal)
    return next(map(get_args, literals), ())


def _plain(config: Any) -> None:
    """Requires known choices, finite numbers, integers that fit in 64 bits and valid strings."""
    kinds = get_type_hints(type(config))
    for one in dataclasses.fields(config):
        values = getattr(config, one.name)
        if choices := _choices(kinds[one.name]):
            known = values in (*choices, one.default)
            require(known, one.name, f"one of {', '.join(choices)}", values)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, float):
                # A smaller one is 0, or loses digits, where it meets fp32.
                finite = value == 0 or SMALLEST <= abs(value) <= LARGEST
                require(finite, one.name, "a finite number (of fp32's range)", value)
            elif isinstance(value, int):
                require(abs(value) < 2**62, one.name, "a number below 2**62", value)
            elif isinstance(value, str):
                written = bool(value.strip()) and "\0" not in value
                require(written, one.name, "a text that is not empty", value)
                # Command-line bytes that are not UTF-8 arrive as lone surrogates.
                spelled = not any("\ud800" <= character <= "\udfff" for character in value)
                require(spelled, one.name, "a text of whole UTF-8 characters", value)


@dataclass
class RunConfig:
    """Settings that every stage shares: output, seed, precision, checkpoints, resuming."""

    _argument_group_name = "run and output"

    output_dir: str = _doc("folder for metrics, curves, samples and checkpoints", "runs/trainer")
    seed: int = _doc("seed of weights, data order and sampling", 0)
    device: Literal["auto", "cpu"] = _doc("auto: accelerate's choice", "auto")
    threads: int = _doc("CPU threads; 0 keeps torch's own choice", 0)
    mixed_precision: Literal["no", "bf16", "fp16"] | None = _doc(
        "autocast; unset = accelerate launch's, else no", None
    )
    save_model: bool = _doc("save models and tokenizer at the end", True)
    save_steps: int = _doc("steps between checkpoints; 0 = only when interrupted", 0)
    save_total_limit: int = _doc("checkpoints kept; 0 = all", 2)
    resume: bool = _doc("continue from the newest checkpoint of output_dir", False)
    resume_from: str | None = _doc("continue from this checkpoint: its name or path", None)
    resume_changed: bool = _doc("continue with settings or data that are not the same", False)
    dry_run: bool = _doc("print settings, sizes, memory and steps, then stop", False)
    report_to: list[str] = field(
        default_factory=list,
        metadata={"help": "trackers of accelerate: tensorboard, wandb, trackio, ..."},
    )

    def __post_init__(self) -> None:
        _plain(self)
        # The generators of Python, numpy and torch all accept this range.
        require(0 <= self.seed < 2**32, "seed", "a number from 0 to 2**32 - 1", self.seed)
        _at_least(self, 0, "threads", "save_steps", "save_total_limit")
        require(self.threads <= 1024, "threads", "at most 1024", self.threads)


@dataclass
class ModelConfig:
    """The trained model: a Hugging Face path, or a small Llama built from these sizes."""

    _argument_group_name = "model"

    model: str | None = _doc("path or hub name of a causal LM; unset builds one", None)
    hidden_size: int = _doc("built model: width", 128)
    num_layers: int = _doc("built model: layers", 2)
    num_heads: int = _doc("built model: attention heads", 4)
    dtype: str = _doc(
        "of the weights: float32, or bfloat16, which loses updates below 1/512 of a weight; "
        "mixed_precision bf16 keeps them",
        "float32",
    )
    attn_implementation: str | None = _doc("sdpa, flash_attention_2, ...; unset = best", None)
    packing: bool = _doc("no padding in training passes; always so with flash attention", False)
    gradient_checkpointing: bool = _doc("recompute activations in the backward pass", False)
    lora_rank: int = _doc("rank of new LoRA adapters (peft); 0 = none", 0)
    lora_alpha: int | None = _doc("their scale; unset = 32, or a loaded adapter's own", None)

    def __post_init__(self) -> None:
        _plain(self)
        # Adam's squares and epsilon underflow to 0 in float16: one step makes every weight NaN.
        expected = "one of float32, bfloat16 (mixed_precision fp16 keeps float32 weights)"
        require(self.dtype in ("float32", "bfloat16"), "dtype", expected, self.dtype)
        _at_least(self, 0, "lora_rank")
        _at_least(self, 1, "hidden_size", "num_layers", "num_heads")
        if self.lora_alpha is not None:
            _at_least(self, 1, "lora_alpha")
        # Rotary embeddings rotate pairs of a head's units, so the head size must be even.
        even = self.hidden_size % (2 * self.num_heads) == 0
        expected = f"a multiple of 2 * num_heads = {2 * self.num_heads}"
        require(even or self.model is not None, "hidden_size", expected, self.hidden_size)
        # Building a layer takes Python some time, however small the layer is.
        require(self.num_layers <= 1000, "num_layers", "at most 1000", self.num_layers)


@dataclass
class DataConfig:
    """The rows and their tokenizer: TRL's columns, standard or conversational."""

    _argument_group_name = "data"

    data: str | None = _doc("file, folder, pattern or hub dataset; unset = arithmetic", None)
    eval_data: str | None = _doc("rows to evaluate on; unset = eval_size of data", None)
    max_operand: int = _doc("arithmetic: largest operand", 99)
    operators: str = _doc("arithmetic: any of + and -", "+-")
    vocab_size: int = _doc("built model: size of the BPE vocabulary trained on data", 4096)
    eval_size: int = _doc("rows held out of data, or the first of eval_data", 512)
    max_prompt_tokens: int = _doc(
        "rows with a longer prompt are dropped (their number is said)", 256
    )
    max_new_tokens: int = _doc("longest completion, end token included", 8)

    def __post_init__(self) -> None:
        _plain(self)
        ops = self.operators
        require(bool(ops) and set(ops) <= set("+-"), "operators", "'+', '-' or '+-'", ops)
        _at_least(self, 1, "max_operand", "max_prompt_tokens", "max_new_tokens")
        measured = ">= 1 (every run measures itself on held-out rows; one is enough)"
        require(self.eval_size >= 1, "eval_size", measured, self.eval_size)
        # The task builds all problems at once: this bound gives two million.
        require(self.max_operand <= 1000, "max_operand", "at most 1000", self.max_operand)
        # The vocabulary contains the 256 bytes, the end token and the padding token.
        _at_least(self, 258, "vocab_size")


@dataclass
class OptimConfig:
    """Steps and AdamW."""

    _argument_group_name = "optimisation"

    total_steps: int = _doc("steps; one is a batch (online: a rollout)", 100)
    batch_size: int = _doc("rows (online: completions) per step, over all processes", 512)
    micro_batch_size: int = _doc("rows per forward pass of a process; 0 = all", 0)
    learning_rate: float = _doc("peak rate of the trained model", 3e-4)
    lr_schedule: Literal["constant", "linear", "cosine"] = _doc(
        "linear and cosine fall to zero at the end", "constant"
    )
    warmup_steps: int = _doc("steps over which the rates rise", 10)
    weight_decay: float = _doc("of AdamW", 0.0)
    max_grad_norm: float = _doc("global gradient norm, of each model", 1.0)
    skip_nonfinite: int = _doc("updates in a row that may be NaN or infinite; passed over", 0)

    def __post_init__(self) -> None:
        _plain(self)
        _at_least(self, 1, "total_steps", "batch_size")
        _at_least(self, 0, "micro_batch_size", "warmup_steps", "learning_rate", "weight_decay")
        _at_least(self, 0, "skip_nonfinite")
        _above(self, 0, "max_grad_norm")


@dataclass
class RewardConfig:
    """Pairwise reward model: -log sigmoid(r_w - r_l - margin) + center_coef (r_w + r_l)^2."""

    _argument_group_name = "algorithm"

    margin: float = _doc("margin of every pair; a column 'margin' of the data wins", 0.0)
    center_coef: float = _doc("weight of the centring term", 0.0)

    def __post_init__(self) -> None:
        _plain(self)
        _at_least(self, 0, "center_coef")


@dataclass
class DPOConfig:
    """Direct preference optimisation."""

    _argument_group_name = "algorithm"

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "losses of a pair, added: " + ", ".join(preference.NAMES)},
    )
    loss_weights: list[float] = field(
        default_factory=list, metadata={"help": "one weight per loss_type; empty = ones"}
    )
    beta: float = _doc("strength of the implicit KL", 0.1)
    label_smoothing: float = _doc(
        f"probability of a wrong label: {', '.join(preference.SMOOTHED)}", 0.0
    )
    ld_alpha: float | None = _doc(
        "weight of the tokens by which an answer is longer than its pair's other", None
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        _doc("of policy and reference, for losses of the difference of rewards", "reverse_kl")
    )
    f_alpha_divergence_coef: float = _doc("of alpha_divergence", 0.5)
    discopop_tau: float = _doc("temperature of discopop", 0.05)
    simpo_gamma: float = _doc("target margin of simpo, alphapo", 0.5)
    alpha: float = _doc("of alphapo; 0 = simpo", 0.25)

    def __post_init__(self) -> None:
        _plain(self)
        names = self.loss_type
        require(bool(names), "loss_type", "at least one", names)
        for name in names:
            known = f"one of {', '.join(preference.NAMES)}"
            require(name in preference.NAMES, "loss_type", known, name)
        same = len(self.loss_weights) in (0, len(names))
        require(same, "loss_weights", f"{len(names)} numbers", self.loss_weights)
        _above(self, 0, "beta", "discopop_tau")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, "label_smoothing", "a probability below 0.5", smoothing)
        settings = {
            "label_smoothing": "label_smoothing",
            "f_divergence": "f_divergence_type",
            "f_alpha": "f_alpha_divergence_coef",
            "discopop_tau": "discopop_tau",
            "gamma": "simpo_gamma",
            "alpha": "alpha",
        }
        options = {option: getattr(self, name) for option, name in settings.items()}
        if wrong := preference.contradiction(names, options):
            option, expected = wrong
            require(False, settings[option], expected, options[option])
        if self.ld_alpha is not None:
            _share(self, "ld_alpha")
            expected = "no value with loss_type sft, which is of whole answers"
            require("sft" not in names, "ld_alpha", expected, self.ld_alpha)

    @property
    def has_reference(self) -> bool:
        """Whether a loss needs log-probabilities of the reference policy."""
        return not set(self.loss_type) <= set(preference.REFERENCE_FREE)


@dataclass
class KTOConfig:
    """Kahneman-Tversky optimisation."""

    _argument_group_name = "algorithm"

    loss_type: Literal["kto", "apo_zero_unpaired"] = _doc(
        "kto, or apo_zero_unpaired: without the KL baseline", "kto"
    )
    beta: float = _doc("strength of the implicit KL", 0.1)
    desirable_weight: float = _doc("weight of desirable completions", 1.0)
    undesirable_weight: float = _doc("weight of undesirable completions", 1.0)

    def __post_init__(self) -> None:
        _plain(self)
        _above(self, 0, "beta")
        _at_least(self, 0, "desirable_weight", "undesirable_weight")
        some = self.desirable_weight or self.undesirable_weight
        require(bool(some), "undesirable_weight", "> 0 with desirable_weight 0", 0.0)


@dataclass
class OnlineConfig:
    """Rollouts, their rewards and the policy loss. Unset = the algorithm's own value."""

    _argument_group_name = "algorithm"

    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "'module:function', or paths of reward models; empty = task's"},
    )
    reward_weights: list[float] = field(
        default_factory=list, metadata={"help": "one weight per reward function; empty = ones"}
    )
    num_generations: int = _doc("completions of each prompt", 1)
    engine: Literal["transformers", "vllm"] = _doc("what completes prompts", "transformers")
    vllm_memory: float = _doc("share of the device's memory that vLLM may take", 0.3)
    generation_batch_size: int = _doc("prompts decoded at once by a process; 0 = all", 0)
    temperature: float = _doc("sampling temperature, also of the loss", 1.0)
    mini_batch_size: int = _doc("completions per optimizer step; 0 = batch_size", 0)
    epochs: int = _doc("passes over each rollout", 1)
    objective: str | None = _doc("clip, penalty, reinforce, cispo or sapo", None)
    clip_low: float | None = _doc("the ratio's clip below 1", None)
    clip_high: float | None = _doc("the ratio's clip above 1", None)
    dual_clip: float | None = _doc("bound of the loss where A < 0", None)
    aggregation: str | None = _doc("token-mean, seq-mean-token-mean, constant, ...", None)
    entropy_coef: float = _doc("entropy bonus", 0.0)
    penalty_coef: float = _doc("objective penalty: first weight of KL(old || new)", 1.0)
    penalty_target: float = _doc("KL per token it adapts to: halved or doubled; 0 = fixed", 0.0)
    teacher_model: str | None = _doc("distill: path or hub name of the teacher", None)
    kl_coef: float = _doc("weight of the KL to the reference; 0 = no reference", 0.0)
    kl_estimator: Literal["k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+"] = _doc(
        "of the KL to the reference; those with + in the loss only", "k1"
    )
    kl_target: float = _doc("KL per completion the coefficient adapts to; 0 = fixed", 0.0)
    kl_horizon: float = _doc("horizon of the adaptive coefficient, in completions", 10000.0)
    gamma: float = _doc("discount of returns to go", 1.0)
    correction: Literal["none", "token", "sequence"] = _doc(
        "importance weights for the mismatch of sampler and trainer", "none"
    )
    correction_mode: Literal["truncate", "mask"] = _doc(
        "what happens to weights above correction_max", "truncate"
    )
    correction_max: float = _doc("largest weight of the correction", 2.0)
    reward_normalize: bool = _doc("divide by running deviation after the running mean", False)
    reward_clip: float = _doc("clip of the (normalised) reward; 0 = off", 0.0)
    dynamic_sampling: int = _doc("rounds of sampling in search of groups that differ", 1)
    overlong_buffer: int = _doc("last tokens in which a completion is penalised; 0 = off", 0)
    ptx_coef: float = _doc("weight of the supervised loss on ptx_data", 0.0)
    ptx_data: str | None = _doc("rows of the supervised loss; unset = data", None)
    num_samples: int = _doc("completions shown in the sample table", 8)
    sft_steps: int = _doc("most supervised steps before the first rollout; 0 = none", 0)
    sft_stop_loss: float = _doc("end of them: running token loss below it; 0 = never", 0.0)
    sft_batch_size: int = _doc("rows per supervised step", 256)
    sft_learning_rate: float = _doc("their learning rate", 2e-3)

    def __post_init__(self) -> None:
        _plain(self)
        _at_least(self, 1, "epochs", "num_generations", "dynamic_sampling", "sft_batch_size")
        _at_least(
            self, 0, "mini_batch_size", "generation_batch_size", "reward_clip", "overlong_buffer",
            "ptx_coef", "kl_coef", "kl_target", "penalty_target", "num_samples", "sft_steps",
            "sft_stop_loss", "sft_learning_rate", "entropy_coef", "penalty_coef",
        )  # fmt: skip
        _above(self, 0, "temperature", "kl_horizon", "correction_max")
        # The kernels have the same bounds.
        usual = 2.0**-60 <= self.temperature <= 2.0**60
        require(usual, "temperature", "a number from 2**-60 to 2**60", self.temperature)
        _share(self, "gamma", "vllm_memory")
        used = self.kl_coef > 0
        require(used or not self.kl_target, "kl_target", "0 where kl_coef is 0", self.kl_target)
        used = self.ptx_coef > 0
        require(used or self.ptx_data is None, "ptx_data", "ptx_coef > 0 with it", self.ptx_coef)
        counts = (len(self.reward_weights), len(self.reward_funcs))
        same = 0 in counts or counts[0] == counts[1]
        require(same, "reward_weights", f"{counts[1]} numbers", self.reward_weights)


@dataclass
class PPOConfig(OnlineConfig):
    """PPO's critic and its advantages."""

    critic_model: str | None = _doc("path of a reward model to start from; unset = policy", None)
    critic_learning_rate: float = _doc("peak rate of the critic", 1e-3)
    critic_warmup_steps: int = _doc("first rollouts that train the critic alone", 0)
    lam: float = _doc("lambda of generalised advantage estimation", 0.95)
    whiten_advantages: bool = _doc("zero mean, unit variance over the rollout", True)
    value_clip: float = _doc("clip range of the value update; 0 = off", 0.2)
    value_coef: float = _doc("weight of the value loss", 1.0)
    joint_grad_clip: bool = _doc("one gradient norm over policy and critic", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(
            self, 0, "critic_learning_rate", "critic_warmup_steps", "value_clip", "value_coef"
        )
        _share(self, "lam")
