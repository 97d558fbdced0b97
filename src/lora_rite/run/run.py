"""One run: begun or resumed, saved, stopped by signals, failed or finished in order."""

import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InterruptedRunError, LoRARiteError, NonFiniteError, warn
from .checkpoints import BEST, TRAINING, clear, newest_verified, read_manifest, rotate, seal, step_of
from .digest import digest_state, trained, whole
from .failpoints import failpoint
from .files import write_folder, write_json, writing
from .processes import count, everywhere, gather, highest, is_main, on_main, together
from .settings import FAILED, PARTS, PLACES, RESULT, RESUME, SETTINGS, changes, read_settings, refuse_changes
from .shards import assign, sharded_checkpoints
from .versions import environment


class Run:
    """The folder of one run, whose lock is held: begins or resumes it, saves, stops and fails in order.

    Args:
        out: the folder.
        settings, inputs: what the run is made of: options, and digests of base weights and tokens.
        versions: see :func:`environment`.
        allow_changed: names of settings, inputs or versions that may differ from the interrupted run.
    """

    def __init__(
        self,
        out: Path,
        settings: dict[str, Any],
        inputs: dict[str, Any],
        versions: dict[str, Any],
        allow_changed: list[str] | None,
    ):
        self.out, self.folder = out, out / "checkpoints"
        self.allow_changed = allow_changed
        self.record: dict[str, Any] = {
            "id": uuid.uuid4().hex, "settings": settings, "inputs": inputs, "environment": environment(versions),
            "changes": [],
        }  # fmt: skip
        self.checkpoint: Path | None = None
        self.last_saved: int | None = None
        self.best: dict[str, Any] | None = None  # the trained parameters at the lowest held-out loss, on the CPU

    def begin(self, resume: bool) -> None:
        """Writes ``settings.json``; where the run is resumed, checks it and chooses the checkpoint to go on from."""
        on_main(lambda: self._begin(resume))
        self.record, self.checkpoint, self.last_saved = gather((self.record, self.checkpoint, self.last_saved))[0]

    def _begin(self, resume: bool) -> None:
        stored = read_settings(self.out) if resume else None
        if stored is None:
            write_json(self.out / SETTINGS, self.record)
            return
        differ = {part: changes(stored[part], self.record[part]) for part in PARTS}
        changed = {k: v for found in differ.values() for k, v in found.items() if k not in PLACES}
        refuse_changes(self.out, changed, self.allow_changed)
        self.record.update(id=stored["id"], changes=stored["changes"])
        self.checkpoint, problems = newest_verified(self.folder, stored["id"])
        clear(self.folder, problems)
        if self.checkpoint is None:
            (self.out / "layers.jsonl").unlink(missing_ok=True)  # of steps that are computed again
            warn(f"{self.out} had saved no checkpoint yet: the run starts from the beginning")
        else:
            self.last_saved = step_of(self.checkpoint)
        if changed:
            self.record["changes"].append({"after_step": self.last_saved or 0, "changed": changed})
        if any(differ.values()):
            write_json(self.out / SETTINGS, self.record)
        if changed:
            warn(
                f"changed since the run was interrupted: {', '.join(changed)}; it is no longer bitwise the run that it "
                "would have been"
            )

    def train(self, trainer: Any, steps: int, has_stopped: Callable[[Any], bool] = lambda state: False) -> None:
        """Trains from the checkpoint on, or from the beginning. Signals end it after a step and a checkpoint.

        Args:
            trainer: transformers' Trainer, of :func:`crash_safe`.
            steps: to train to.
            has_stopped: whether the run has stopped before them, of the Trainer's state in a checkpoint.

        Raises:
            InterruptedRunError, NonFiniteError, WriteError, LoRARiteError: see the exit codes in docs/reliability.md.
        """
        trainer.run = self
        try:
            if self.checkpoint is not None and (
                step_of(self.checkpoint) >= steps or has_stopped(_trainer_state(self.checkpoint))
            ):
                self._load(trainer, steps)
                return
            with _stop_after_step(trainer) as received:
                trainer.add_callback(self._checks(trainer))
                trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            if count() > 1:
                _agreed_state(trainer)
            if number := highest(received[0] if received else 0):  # in one process it may have come after the last step
                step = trainer.state.global_step
                message = f"stopped by {signal.Signals(number).name} after step {step}, which is saved; {RESUME}"
                raise everywhere(InterruptedRunError(message, number))
        except NonFiniteError as error:
            self.fail(str(error), trainer.state.global_step)
        except RuntimeError as error:
            if "CUDA error" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise LoRARiteError(f"the GPU's context is lost ({reason}); {self._where_to_go_on()}") from error

    def fail(self, reason: str, step: int) -> None:
        """Records that the run has failed, exports nothing, and raises NonFiniteError."""
        message = f"{reason.rstrip('.')}. No adapter was written; {self._where_to_go_on()}"
        record = {"status": "failed", "error": reason, "step": step, "last_checkpoint": self.last_saved}
        if is_main():
            write_json(self.out / FAILED, {**record, **self.record})
        raise everywhere(NonFiniteError(message))

    def _where_to_go_on(self) -> str:
        if self.last_saved is None:
            return "there is no checkpoint (--save_every 0?)"
        return f"the last good checkpoint is that of step {self.last_saved}: {RESUME}"

    def _load(self, trainer: Any, steps: int) -> None:
        """The state after the last step, of a run that was killed after it had saved that."""
        folder = str(self.checkpoint)
        trainer.state = _trainer_state(Path(folder))
        if not trainer.is_fsdp_enabled:  # as Trainer.train does: else it is loaded after it is shared out
            trainer._load_from_checkpoint(folder)
        trainer._prepare_for_training(steps, trainer.get_train_dataloader(), folder)
        self._go_on(trainer)

    def _go_on(self, trainer: Any) -> None:
        """Checks that adapter and optimizer in memory are those that were saved (nothing was silently left out in
        loading), and has an optimizer with two modes train where it did."""
        from safetensors.torch import load_file

        from ..optim.modes import two_modes

        if self.checkpoint is None:
            return
        with together():
            if digest_state(trainer.model, trainer.optimizer) != read_manifest(self.checkpoint)["state"]:
                message = f"{self.checkpoint} does not give back the adapter and the optimizer that were saved"
                raise CheckpointError(message)
        if (saved := self.checkpoint / TRAINING).is_file():
            two_modes(trainer.optimizer).train()
            values = load_file(saved)
            for name, p in trained(trainer.model):
                assign(p, values[name])
        if (saved := self.checkpoint / BEST).is_file():
            self.best = load_file(saved)

    def _checks(self, trainer: Any) -> Any:
        from transformers import TrainerCallback

        from ..integrations.peft import unwrap
        from ..optim.optimizer import LoRARite

        run = self

        class Checks(TrainerCallback):
            """Compares what was loaded with what was saved, and stops at a loss that is not finite.

            LoRARite skips the step of a non-finite gradient and raises by itself at the third in a row; any other
            optimizer has NaN in its state by now."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                run._go_on(trainer)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                loss = (logs or {}).get("loss", 0.0)
                if abs(loss) < float("inf") or isinstance(unwrap(kwargs.get("optimizer")), LoRARite):
                    return
                raise NonFiniteError(f"the loss is {loss} at step {state.global_step}: lower --lr")

        return Checks()

    def save(self, trainer: Any, write: Callable[[], None]) -> None:
        """Has the Trainer write its checkpoint, seals it, and rotates the older ones.

        Raises:
            NonFiniteError: the adapter is not finite; nothing is written.
            WriteError: it cannot be written; what was written of it is removed.
        """
        from ..optim.modes import evaluating, two_modes

        step = trainer.state.global_step
        for name, p in trained(trainer.model):
            if not whole(p).isfinite().all():
                raise NonFiniteError(f"{name} contains NaN or Inf at step {step}: lower --lr")
        checkpoint = self.folder / f"checkpoint-{step}"
        saving = lambda: writing(checkpoint, f"the checkpoint of step {step}", self._where_to_go_on)
        modes = two_modes(trainer.optimizer) is not None
        training = {n: whole(p).detach().contiguous() for n, p in trained(trainer.model)} if modes else None
        with evaluating(trainer.optimizer):
            state = _agreed_state(trainer)  # all wait here for all: a process whose disk is full must not be awaited
            with together(), saving():
                failpoint("checkpoint begins")
                write()
        with together(), saving():
            if is_main():
                self._seal(checkpoint, state, training)
        self.last_saved = step
        on_main(lambda: rotate(self.folder, self.record["id"]))

    def _seal(self, checkpoint: Path, state: str, training: dict[str, Any] | None) -> None:
        """Adds to a checkpoint of the Trainer's what it has not, and seals it."""
        from safetensors.torch import save_file

        if training is not None:
            save_file(training, checkpoint / TRAINING)
        if self.best is not None:
            save_file(self.best, checkpoint / BEST)
        failpoint("checkpoint written")
        seal(checkpoint, self.record["id"], state)

    def restore_best(self, model: Any) -> None:
        """Gives the trained parameters the values at the lowest held-out loss, where the run has kept them."""
        if self.best is not None:
            for name, p in trained(model):
                assign(p, self.best[name])

    def finish(self, export: Callable[[Path], None], result: dict[str, Any]) -> None:
        """Writes the adapter, then the result: a run with ``result.json`` is finished."""

        def write() -> None:
            with writing(self.out / ".adapter.tmp", "the result", self._where_to_go_on):
                write_folder(self.out / "adapter", export)
                write_json(self.out / RESULT, result)
            (self.out / FAILED).unlink(missing_ok=True)

        on_main(write)


#: How far adapters of the processes may be from the first one's, by their norm: chips that differ round differently.
_DRIFT = 1e-2


def _agreed_state(trainer: Any) -> str:
    """The digest of adapter and optimizer in the first process, when all have the same.

    Raises:
        LoRARiteError: the adapters have drifted apart.
    """
    states = gather(digest_state(trainer.model, trainer.optimizer))
    if len(set(states)) > 1:
        adapters = gather([whole(p).detach().cpu() for _, p in trained(trainer.model)])
        norms = [sum(float((p - q).norm() ** 2) for p, q in zip(a, adapters[0], strict=True)) for a in adapters]
        if max(norms) > _DRIFT**2 * sum(float(p.norm() ** 2) for p in adapters[0]):
            what = f"after step {trainer.state.global_step} the processes have adapters that differ"
            raise everywhere(LoRARiteError(f"{what}: the optimizer draws random numbers; train with one process"))
    return states[0]


def _trainer_state(checkpoint: Path) -> Any:
    from transformers import TrainerState

    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def crash_safe(trainer_class: type) -> type:
    """A class of transformers' Trainer whose checkpoints are sealed by its ``run``, also under FSDP2."""

    class CrashSafeTrainer(sharded_checkpoints(trainer_class)):  # type: ignore[misc]
        run: Run
        on_prepared: Callable[[], None] | None = None  # called before the first step, with the model shared out

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.run.save(self, lambda: super(CrashSafeTrainer, self)._save_checkpoint(*args, **kwargs))

        def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
            prepared = super()._prepare_for_training(*args, **kwargs)
            if self.state.global_step == 0 and self.on_prepared is not None:
                self.on_prepared()
            return prepared

    return CrashSafeTrainer


@contextmanager
def _stop_after_step(trainer: Any) -> Iterator[list[signal.Signals]]:
    """SIGINT, SIGTERM and SIGHUP make the Trainer save and stop after the present step, in all processes the same one.
    The second one acts at once.

    Yields the list of signals received, in any process. Signals that this process ignores (nohup) stay ignored."""
    from transformers import TrainerCallback

    received: list[signal.Signals] = []

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if number := highest(received[0] if received else 0):
                received[:] = [signal.Signals(number)]
                control.should_save = control.should_training_stop = True

    trainer.add_callback(Stop())
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {n: h for n in numbers if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: Any) -> None:
        received.append(signal.Signals(number))
        restore()
        message = f"lora-rite: {received[0].name}: finishing the step and saving it; once more stops at once\n"
        if is_main():
            os.write(2, message.encode())  # print() is not safe here

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        restore()
