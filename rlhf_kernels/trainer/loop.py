"""The training loop: steps, checkpoints, interrupts and the final report."""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from . import adapters, checkpoint, folder, report, resume
from .cells import transcript
from .config import require
from .errors import UserError, blamed_on
from .finite import NonFinite
from .interrupts import Interrupted, Interrupts
from .offline import OfflineTrainer
from .online import OnlineTrainer
from .probe import digests
from .stage import Stage

_SHOWN = ("loss", "accuracy", "margin", "reward", "kl", "entropy")


_Stop = TypeVar("_Stop", bound=BaseException)


class Loop:
    """Runs a stage's trainer from the first or a resumed step to the report.

    Args:
        stage: settings, data, accelerator and output folder.
        trainer: makes the steps.
        signals: Ctrl-C and SIGTERM.
    """

    def __init__(
        self, stage: Stage, trainer: OfflineTrainer | OnlineTrainer, signals: Interrupts
    ) -> None:
        self.stage, self.trainer, self.signals = stage, trainer, signals
        self.run_config, self.out, self.accelerator = stage.run, stage.out, stage.accelerator
        #: Part of every checkpoint: the evaluation before training, and a reference without path.
        self.extra: dict[str, Any] = {}
        #: Hashes of the trained weights before the first step; None in a run that continues.
        self.start: dict[str, int] | None = None
        #: Whether the output folder has models and report, so that nothing can be lost.
        self.written = False
        self.same = {
            "settings": stage.settings | {"processes": self.accelerator.num_processes},
            "data": resume.identities(stage.task, trainer),
            "models": resume.model_identities(stage.settings),
            "code": resume.code_identities(stage.settings),
        }

    def begin(self) -> None:
        """Starts a run at its first step."""
        self.start = self._digests()
        self.extra = {"before": self.trainer.evaluate()}
        reference = self.trainer.reference
        own = self.stage.settings.get("teacher_model") is None
        if own and self.stage.settings.get("sft_steps") and reference is not None:
            # The supervised phase made these weights, so no file holds them.
            self.extra["reference"] = reference.state_dict()

    def _digests(self) -> dict[str, int]:
        learner = self.trainer.learner
        # Of shards no process has the whole.
        return {} if learner.sharded else digests(learner.networks)

    def continue_from(self, path: Path, states: dict[str, Any]) -> None:
        """Continues from a checkpoint, which must have the same settings and data."""
        changed = self.run_config.resume_changed
        new_data = resume.check_same(
            path, states.get("run"), self.same, changed=changed, say=self.stage.say
        )
        resume.put(path, states, self.trainer, new_data=new_data)
        done, total = self.trainer.steps_done, self.stage.optim.total_steps
        require(total >= done, "total_steps", f"at least the {done} steps of {path}", total)
        if new_data:
            self.stage.say("the order of the rows begins anew")
        self.extra = {key: states[key] for key in ("before", "reference") if key in states}
        folder.on_main(self.accelerator, lambda: resume.set_later_aside(self.out, path, done))

    def run(self) -> dict[str, Any]:
        """Takes the remaining steps, evaluates and reports; returns the summary."""
        rows = self.fit()
        with self._kept():
            summary = self.finish(rows, self.trainer.evaluate())
        with blamed_on("report_to", "not all was logged"):
            for tracker in self.accelerator.trackers:
                tracker.finish()
        return summary

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Saves a checkpoint where the code inside, after a whole step, cannot end.

        With several processes the others may be elsewhere and could not take part in writing it,
        unless all raised the error.
        """
        before = self._own_states()
        try:
            yield
        except (Interrupted, KeyboardInterrupt, Exception) as error:
            if self.written and not isinstance(error, Interrupted):
                raise
            newest = checkpoint.newest(self.out)
            saved = newest is not None and checkpoint.step_of(newest) == self.trainer.steps_done
            mended = isinstance(error, UserError) and not isinstance(error, NonFinite)
            needless = getattr(error, "broken", False) or (mended and saved)
            if self._together(error) and not needless:
                with self.signals.waiting():
                    try:
                        self.save(before)
                    except UserError:
                        # What kept the report from the disk may keep this from it too.
                        if isinstance(error, Interrupted):
                            raise
            self._tell(error)
            raise

    def fit(self) -> list[dict[str, float]]:
        """Steps until the end or an interrupt, which saves; returns the metrics of all steps."""
        trainer, total = self.trainer, self.stage.optim.total_steps
        main, name = self.accelerator.is_main_process, self.stage.name
        path = self.out / "metrics.jsonl"
        log = folder.on_main(
            self.accelerator, lambda: report.MetricsLog(path, steps_done=trainer.steps_done)
        )

        def write(row: dict[str, float]) -> None:
            assert log is not None  # Only the main process calls it.
            log.write(row)

        if self.run_config.report_to:
            # Trackers accept only simple values.
            plain = {k: str(v) for k, v in self.stage.settings.items()}
            names = ", ".join(self.run_config.report_to)
            with trainer.learner.together(), blamed_on("report_to", f"{names} cannot start"):
                self.accelerator.init_trackers("rlhf_kernels", config=plain)
        bar = tqdm(total=total, initial=trainer.steps_done, desc=name, disable=not main)
        with self.signals.waiting(), bar:
            while trainer.steps_done < total:
                row = self._step()
                row["peak_memory_gib"] = report.peak_memory_gib()
                # Not kept: a checkpoint behind a row that the disk did not take would lack it.
                folder.on_main(self.accelerator, functools.partial(write, row))
                with self._kept():
                    with blamed_on("report_to", f"step {int(row['step'])} is not logged"):
                        self.accelerator.log(row, step=int(row["step"]))
                    values = ", ".join(f"{k} {row[k]:.3f}" for k in _SHOWN if k in row)
                    bar.set_postfix_str(values, refresh=False)
                    bar.update()
                self._save_where_due(log)
        return log.rows if log is not None else []

    def _step(self) -> dict[str, float]:
        before, learner = self._own_states(), self.trainer.learner
        updates, skipped = learner.updates, learner.skipped
        try:
            return self.trainer.step()
        except NonFinite as error:
            # A step of several updates may have made finite ones. They stay, and --resume takes the
            # step again from its beginning.
            learner.skipped = skipped
            if not error.broken:
                self.save(before)
            self._tell(error)
            raise
        except (KeyboardInterrupt, Exception) as error:
            # Such as a reward function's. Without an update the weights are the last step's.
            same = learner.updates == updates and self.trainer.steps_done
            if same and self._together(error):
                learner.skipped = skipped
                with contextlib.suppress(UserError):
                    self.save(before)
                self._tell(error)
            raise

    def _together(self, error: BaseException) -> bool:
        """Whether every process is where the error was raised, so that they can save."""
        return self.accelerator.num_processes == 1 or getattr(error, "shared", False)

    def _save_where_due(self, log: report.MetricsLog | None) -> None:
        done, every = self.trainer.steps_done, self.run_config.save_steps
        # A signal to any process stops all processes.
        seen = torch.tensor(self.signals.seen, device=self.accelerator.device)
        stop = bool(self.trainer.learner.total(seen))
        if stop or (every and done % every == 0):
            if log is not None:
                log.sync()
            self.save()
        if stop:
            raise self._tell(Interrupted())

    def _tell(self, error: _Stop) -> _Stop:
        """Tells the user where --resume would continue."""
        if isinstance(error, Interrupted):
            error.told = True
        if not self.accelerator.is_main_process:
            # Only the main process writes to the output folder.
            return error
        newest, where = checkpoint.newest(self.out), "no checkpoint was saved"
        if newest is not None:
            where = f"--resume continues from step {checkpoint.step_of(newest)}"
        if isinstance(error, Interrupted):
            self.stage.say(f"interrupted; {where}")
        elif isinstance(error, UserError):
            error.args = (f"{str(error).removesuffix(folder.RESUMES)}; {where}",)
        else:
            # Its type decides what is told of it.
            tqdm.write(where, file=sys.stderr)
        return error

    def _own_states(self) -> dict[str, Any]:
        """The state that a step changes, besides weights and optimizer."""
        return {
            "trainer": self.trainer.state_dict(),
            "generators": checkpoint.generator_states(),
        }

    def save(self, own: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint; every process has to call it.

        `own` is an earlier result of `_own_states`; None means the current state.
        """
        states = {
            "learner": self.trainer.learner.state_dict(),
            "run": self.same,
            **(own or self._own_states()),
            **self.extra,
        }
        done, keep = states["trainer"]["steps_done"], self.run_config.save_total_limit
        name = self.stage.name
        folder.on_main(
            self.accelerator, lambda: checkpoint.save(self.out, done, name, states, keep=keep)
        )

    # --- the end -----------------------------------------------------------------------------

    def finish(self, rows: Sequence[dict[str, float]], after: dict[str, Any]) -> dict[str, Any]:
        """Saves models, curves and the summary, which it returns; then prints the results."""
        stage, before = self.stage, self.extra["before"]
        shown = zip(stage.task.held_out, before["texts"], after["texts"], strict=False)
        samples = [
            {"prompt": row.prompt, "answer": row.answer, "before": b, "after": a}
            for row, b, a in list(shown)[: stage.settings.get("num_samples")]
        ]
        for column, values in after.get("logged", {}).items():
            for i, sample in enumerate(samples):
                sample[column] = values[i] if i < len(values) else None
        seconds, old, new = self._seconds(rows), before["scores"], after["scores"]
        summary = {
            "stage": stage.name,
            "task": stage.task.name,
            "held_out_before": old,
            "held_out_after": new,
            "samples": samples,
            "seconds_per_step": seconds,
            "total_seconds": time.perf_counter() - stage.started,
            "config": stage.settings,
        }
        weights = self.trainer.learner.weights() if stage.run.save_model else {}
        folder.on_main(self.accelerator, lambda: self._write(rows, summary, weights))
        self.written = True
        if samples:
            texts = [[report.in_short(str(transcript(v))) for v in s.values()] for s in samples]
            stage.say("\n" + report.table(list(samples[0]), texts))
        cells = [(key, f"{old[key]:.4f}", f"{new[key]:.4f}") for key in new]
        stage.say("\n" + report.table(("held-out rows", "before", "after"), cells))
        if "generate" in seconds:
            step = seconds["step"]
            stage.say(
                f"\na step took {step:.2f} s: {seconds['generate'] / step:.0%} generation and "
                f"rewards, {seconds['kernels'] / step:.0%} our kernels, the rest forward, backward "
                "and optimizer"
            )
        if self.start and rows and self.start == self._digests():
            stage.say(
                f"no weight has changed in {len(rows)} steps: look at learning_rate, warmup_steps, "
                "max_grad_norm and what the loss is made of"
            )
        total, text = summary["total_seconds"], f"curves, samples and metrics in {self.out}/"
        stage.say(f"\n{total:.0f} s in all; {text}{self._next()}")
        return summary

    def _next(self) -> str:
        """How the next stage takes the model."""
        if not self.stage.run.save_model:
            return ""
        name, flag = (
            ("reward", "reward_funcs") if self.stage.name == "reward" else ("policy", "model")
        )
        return f"; next: rlhf-kernels train STAGE --{flag} {self.out / name}"

    def _seconds(self, rows: Sequence[dict[str, float]]) -> dict[str, float]:
        """The mean seconds of each part of a step."""
        keys = [k for k in dict.fromkeys(k for row in rows for k in row) if k.startswith("time/")]
        return {
            k.removeprefix("time/"): sum(row.get(k, 0.0) for row in rows) / len(rows) for k in keys
        }

    def _write(
        self,
        rows: Sequence[dict[str, float]],
        summary: dict[str, Any],
        weights: dict[str, torch.Tensor],
    ) -> None:
        with folder.writing(self.out / "curves.png"):
            report.plot_curves(rows, self.out / "curves.png")
        if self.stage.run.save_model:
            for name, network in self.trainer.learner.networks.named_children():
                own = {k: v for k, v in weights.items() if k.startswith(f"{name}.")}
                own = {k.removeprefix(f"{name}."): v for k, v in own.items()}

                def write(draft: Path, network: Any = network, own: Any = own) -> None:
                    adapters.save_network(network, draft, own)
                    self.stage.task.tokenizer.save_pretrained(draft)

                with folder.writing(self.out / name):
                    folder.replace_folder(self.out / name, write)
        # A column of the data may hold what JSON has no form for.
        plain = report.finite(summary) | {"config": summary["config"]}
        text = json.dumps(plain, indent=2, default=str) + "\n"
        with folder.writing(self.out / "summary.json"):
            folder.write_whole(self.out / "summary.json", text.encode())
