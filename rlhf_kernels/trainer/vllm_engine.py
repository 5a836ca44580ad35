"""An engine that completes prompts with vLLM, in this process and on its device."""

import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .config import require
from .data import Batch, pad
from .endings import end_token_ids
from .generation import Generation
from .learner import Learner


class VLLMEngine:
    """Completes prompts with vLLM, after giving it the policy's current weights.

    vLLM's log-probabilities are close but not equal to the trainer's; `correction` weights tokens
    by the ratio. Every process holds all weights, so FSDP and LoRA are not supported.

    Args:
        learner: holds the policy.
        tokenizer: has the end and padding tokens.
        folder: folder in which the policy is saved, for vLLM to load its architecture.
        max_length: maximum length of prompt and completion together.
        memory: share of the device's memory that vLLM may use.
    """

    def __init__(
        self,
        learner: Learner,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        *,
        max_length: int,
        memory: float,
    ) -> None:
        found = importlib.util.find_spec("vllm") is not None
        require(found, "engine", "the package vllm to be installed (pip install vllm)", "none")
        policy = learner.networks.policy
        whole = not learner.sharded and not hasattr(policy, "disable_adapter")
        require(whole, "engine", "'transformers' with FSDP or LoRA", "vllm")
        # The engine's core has to run in this process, to give access to its model.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # vllm is an optional package.
        import vllm

        if learner.accelerator.is_main_process:
            policy.save_pretrained(str(folder))
        learner.accelerator.wait_for_everyone()
        self.learner, self.tokenizer, self.vllm = learner, tokenizer, vllm
        self.llm = vllm.LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            generation_config="vllm",
            # The loss uses log-probabilities after the temperature.
            logprobs_mode="processed_logprobs",
            max_model_len=max_length,
            gpu_memory_utilization=memory,
            distributed_executor_backend="external_launcher" if learner.processes > 1 else None,
        )

    def _load_weights(self) -> None:
        worker = self.llm.llm_engine.model_executor.driver_worker
        weights = self.learner.networks.policy.state_dict()
        worker.model_runner.model.load_weights(weights.items())
        self.llm.reset_prefix_cache()

    def __call__(
        self, ids: Tensor, mask: Tensor, uniforms: Tensor, *, temperature: float
    ) -> Generation:
        self._load_weights()
        ends = list(end_token_ids(self.learner.networks.policy, self.tokenizer))
        pairs = zip(ids, mask, strict=True)
        prompts = [{"prompt_token_ids": row[kept].tolist()} for row, kept in pairs]
        options = [
            self.vllm.SamplingParams(
                temperature=temperature,
                max_tokens=uniforms.shape[1],
                stop_token_ids=ends,
                logprobs=0,
                detokenize=False,
                seed=int(first * 2**31),
            )
            for first in uniforms[:, 0].tolist()
        ]
        outputs = self.llm.generate(prompts, options, use_tqdm=False)
        found = [output.outputs[0] for output in outputs]
        rows = [list(output.token_ids) for output in found]
        scores = [
            [step[token].logprob for token, step in zip(row, output.logprobs, strict=True)]
            for row, output in zip(rows, found, strict=True)
        ]
        tokens, completed = pad(rows, self.tokenizer.pad_token_id, left=False)
        missing = (0, uniforms.shape[1] - tokens.shape[1])
        tokens = torch.nn.functional.pad(tokens, missing, value=self.tokenizer.pad_token_id)
        completed = torch.nn.functional.pad(completed, missing)
        logprobs = torch.zeros(tokens.shape)
        logprobs[completed] = torch.tensor([score for row in scores for score in row])
        tokens, completed, logprobs = (t.to(ids.device) for t in (tokens, completed, logprobs))
        whole = Batch(torch.cat([ids, tokens], 1), torch.cat([mask, completed], 1), completed)
        return Generation(whole, logprobs)
