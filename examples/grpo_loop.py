"""GRPO in a plain PyTorch loop: one file to copy and to change.

    python examples/grpo_loop.py                 # a small model made here; a minute, no download
    python examples/grpo_loop.py --model PATH --learning_rate 1e-6    # a causal LM of yours

Replace `prompts` and `reward` by your own. The task here: "3+4=" wants "7" and then the end token.
"""

import argparse
import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

import rlhf_kernels as rk


def prompts(count: int) -> list[tuple[str, str]]:
    """Prompts, each with the answer that the reward compares with."""
    pairs = [(random.randint(0, 4), random.randint(0, 5)) for _ in range(count)]
    return [(f"{a}+{b}=", str(a + b)) for a, b in pairs]


def reward(completion: str, answer: str) -> float:
    """Half for a right beginning, half for stopping there."""
    return 0.5 * completion.startswith(answer) + 0.5 * (completion == answer)


def small_model():
    """A Llama of 0.1 million weights, with a token for each character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+="])}
    characters = Tokenizer(models.WordLevel(vocabulary))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(vocabulary)}
    model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1))
    # A model of this size is faster with one thread than with several.
    torch.set_num_threads(1)
    return model, FastTokenizer(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")


def sample(model, tokenizer, texts: list[str], max_new_tokens: int):
    """Token ids [B, T], the attention mask [B, T], and the mask of sampled labels [B, T - 1]."""
    given = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    given = given.to(model.device)
    start = given.input_ids.shape[1]
    # The whole distribution: the loss takes the log-probabilities of it.
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    settings |= {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    ids = model.generate(given.input_ids, attention_mask=given.attention_mask, **settings)
    # The first end token belongs to the completion. What follows it is padding.
    ended = ids[:, start:] == tokenizer.eos_token_id
    sampled = ended.cumsum(1) - ended.int() == 0
    attention = torch.cat([given.attention_mask, sampled.int()], 1)
    return ids, attention, torch.cat([torch.zeros_like(ids[:, 1:start]).bool(), sampled], 1)


def main(argv: list[str] | None = None) -> list[float]:
    """Trains, and returns the mean reward of each step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="path of a causal LM; unset: a small one is made")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--updates", type=int, default=2, help="updates of each rollout")
    parser.add_argument("--max_new_tokens", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    options = parser.parse_args(argv)
    random.seed(0)
    torch.manual_seed(0)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    else:
        model, tokenizer = small_model()
    # Evaluation mode switches dropout off, so that both passes over a token agree.
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    head = rk.Head.from_model(model)  # raises where the logits are more than a linear head
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, options.steps)
    curve = []
    for step in range(options.steps):
        rows = [row for row in prompts(options.prompts) for _ in range(options.group)]
        texts = [text for text, _ in rows]
        ids, attention, mask = sample(model, tokenizer, texts, options.max_new_tokens)
        labels, tokens = ids[:, 1:], zip(ids[:, 1:], mask, strict=True)
        completions = [tokenizer.decode(row[k], skip_special_tokens=True) for row, k in tokens]
        answered = zip(completions, rows, strict=True)
        rewards = torch.tensor([reward(text, answer) for text, (_, answer) in answered])
        advantages = rk.group_advantages(rewards.to(ids.device), options.group)
        positions = attention.cumsum(1) - attention
        inputs = {"attention_mask": attention, "position_ids": positions}
        old = None  # itself is the policy that sampled: the first ratio is exactly 1
        for _ in range(options.updates):
            hidden = model.base_model(ids, **inputs).last_hidden_state[:, :-1]
            arguments = {"labels": labels, "mask": mask, **head.arguments()}
            policy = {"advantages": advantages, "config": rk.PolicyLossConfig.dapo()}
            loss, _ = rk.linear_policy_loss(hidden, old_logprobs=old, **policy, **arguments)
            if old is None and options.updates > 1:
                with torch.no_grad():
                    old = rk.linear_token_logprobs(hidden, **arguments).logprobs
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        curve.append(rewards.mean().item())
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:4}  reward {curve[-1]:.3f}  {texts[0]}{completions[0]}", flush=True)
    return curve


if __name__ == "__main__":
    main()
