"""Run by test_verl.py in a process of its own: verl's driver with our plug-in.

verl imports the plug-in while it is imported itself, as in a Ray worker. Its `compute_advantage`
lies in a module that imports servers and loaders; what is missing of these is a stub.
"""

# ruff: noqa: E402 - verl must find the stubs.
import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

SERVERS = ("cachetools", "fastapi", "msgspec", "peft", "torchdata", "uvicorn")


class Stub(ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Stubs(MetaPathFinder, Loader):
    """Last in sys.meta_path: asked for what nothing else has found."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in SERVERS else None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(Stubs())

import verl
from verl.trainer.ppo import core_algos
from verl.workers.utils import losses

from tests.parity.comparison import FP32, close
from tests.parity.verl_cases import outcome

from rlhf_kernels.integrations import verl as integration

ray_trainer = importlib.import_module("verl.trainer.ppo.ray_trainer")
assert core_algos.compute_gae_advantage_return.__code__.co_name == "dispatch"
assert losses.compute_value_loss.__code__.co_name == "compute_value_loss"
assert "rk_vanilla" in core_algos.POLICY_LOSS_REGISTRY

rewards, _, mask, _, index = outcome()
tensors = {
    "token_level_rewards": rewards,
    "values": rewards.flip(0) + 0.5,
    "response_mask": mask.long(),
}


def estimate(estimator):
    data = verl.DataProto.from_dict(
        tensors={k: v.clone() for k, v in tensors.items()}, non_tensors={"uid": index}
    )
    config = core_algos.AlgoConfig()
    return ray_trainer.compute_advantage(data, estimator, lam=0.95, config=config).batch


NAMES = ("gae", "grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
ours = [estimate(name) for name in NAMES]
served = integration.unpatch().served
assert sorted(served.values()) == [1] * len(NAMES), served
for a, name in zip(ours, NAMES, strict=True):
    b = estimate(name)
    for key in ("advantages", "returns"):
        assert b[key][mask].abs().max() > 0.1
        # verl's statistics of a group are fp32.
        close(a[key][mask], b[key][mask], FP32 if name == "gae" else 1e-5)
