"""Classic PPO on CartPole: the same kernels serve reinforcement learning at large.

    pip install gymnasium
    python examples/cartpole_ppo.py

Eight environments, rollouts of 128 steps, GAE that stops where an episode ends. Stops when the last
50 episodes have an average return of 450 (500 is the most); about two minutes on one CPU core.
"""

import argparse
import time
from collections import deque

import gymnasium
import numpy
import torch
from torch import Tensor, nn

import rlhf_kernels as rk

ENVIRONMENTS, HORIZON, EPOCHS, MINI_BATCHES = 8, 128, 4, 4


def network(outputs: int, scale: float) -> nn.Sequential:
    layers = [nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, 2**0.5 if layer is not layers[-1] else scale)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Rollout:
    """HORIZON steps of every environment, as [environment, step]."""

    def __init__(self) -> None:
        # The value of the last state stands for the rest of an episode that is cut off. After a
        # failure the rest is worth 0.
        mode = gymnasium.vector.AutoresetMode.SAME_STEP
        self.environments = gymnasium.make_vec(
            "CartPole-v1", ENVIRONMENTS, "sync", vector_kwargs={"autoreset_mode": mode}
        )
        self.state: numpy.ndarray | None = None
        self.lengths = numpy.zeros(ENVIRONMENTS)
        self.returns: deque[float] = deque(maxlen=50)

    def collect(self, policy: nn.Module, critic: nn.Module, seed: int) -> dict[str, Tensor]:
        if self.state is None:
            self.state, _ = self.environments.reset(seed=seed)
        rows: list[tuple[Tensor, ...]] = []
        for _ in range(HORIZON):
            state = torch.as_tensor(self.state, dtype=torch.float32)
            action = torch.distributions.Categorical(logits=policy(state)).sample()
            self.state, reward, ended, cut, info = self.environments.step(action.numpy())
            reward, done = torch.as_tensor(reward, dtype=torch.float32), ended | cut
            self.lengths += 1
            if cut.any():
                last = numpy.stack([info["final_obs"][i] for i in numpy.flatnonzero(cut)])
                reward[torch.as_tensor(cut)] += 0.99 * critic(torch.as_tensor(last))[:, 0]
            self.returns.extend(self.lengths[done])
            self.lengths[done] = 0
            rows.append((state, action, reward, torch.as_tensor(done)))
        names = ("states", "actions", "rewards", "dones")
        columns = zip(*rows, strict=True)
        found = {n: torch.stack(c, 1) for n, c in zip(names, columns, strict=True)}
        following = torch.as_tensor(self.state, dtype=torch.float32)
        return found | {"bootstrap": critic(following)[:, 0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=450.0)
    parser.add_argument("--max_rollouts", type=int, default=400)
    args = parser.parse_args()
    # Layers of this size are no work for a second thread.
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    policy, critic = network(2, 0.01), network(1, 1.0)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, eps=1e-5)
    rollout, started, mean = Rollout(), time.perf_counter(), 0.0
    for step in range(args.max_rollouts):
        with torch.no_grad():
            data = rollout.collect(policy, critic, args.seed)
            old_values = critic(data["states"])[..., 0]
            old = rk.token_logprobs(policy(data["states"]), data["actions"]).logprobs
        advantages, returns = rk.gae(
            data["rewards"], old_values, dones=data["dones"], bootstrap_values=data["bootstrap"],
            gamma=0.99, lam=0.95,
        )  # fmt: skip
        flat = {
            "states": data["states"].flatten(0, 1), "actions": data["actions"].flatten(),
            "old": old.flatten(), "old_values": old_values.flatten(),
            "advantages": advantages.flatten(), "returns": returns.flatten(),
        }  # fmt: skip
        for _ in range(EPOCHS):
            for part in torch.randperm(len(flat["old"])).chunk(MINI_BATCHES):
                # One row of tokens: each is a step of some episode.
                x = {name: value[part][None] for name, value in flat.items()}
                keep = torch.ones_like(x["actions"], dtype=torch.bool)
                new = rk.token_logprobs(policy(x["states"]), x["actions"], entropy=True)
                policy_part = rk.policy_loss(
                    new.logprobs, x["old"], rk.whiten(x["advantages"]), mask=keep,
                    entropy=new.entropy, config=rk.PolicyLossConfig.ppo(entropy_coef=0.01),
                )  # fmt: skip
                values = critic(x["states"])[..., 0]
                value_part = rk.value_loss(values, x["old_values"], x["returns"], mask=keep)
                optimizer.zero_grad()
                (policy_part.loss + value_part.loss).backward()
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
        mean = sum(rollout.returns) / max(1, len(rollout.returns))
        reached = mean >= args.target and len(rollout.returns) == 50
        if reached or step % 20 == 0:
            kl = policy_part.metrics["k3_old"]
            seconds = time.perf_counter() - started
            print(
                f"rollout {step:3d}  return {mean:5.1f}  kl {kl:.4f}  {seconds:4.0f} s", flush=True
            )
        if reached:
            return
    raise SystemExit(f"average return {mean:.1f} after {args.max_rollouts} rollouts")


if __name__ == "__main__":
    main()
