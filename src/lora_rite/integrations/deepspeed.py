"""LoRARite under DeepSpeed's ZeRO, which flattens the factors and shares out the pieces."""

import importlib
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import LoRARiteTypeError, LoRARiteValueError, warn
from ..optim.adamw import adamw_step
from ..optim.optimizer import LoRARite, state_bytes
from ..plan.factors import partner_of
from ..plan.names import plain_names

#: Where a group's checkpoint keeps what DeepSpeed cannot share out: all of LoRARite's state but the first moments.
KEPT_WHOLE = "lora_rite"
#: How DeepSpeed's tools call the moments of Adam, and look for them. The first one of factors is LoRARite's.
FIRST, SECOND = "exp_avg", "exp_avg_sq"


class Piece(NamedTuple):
    """What this process has of a parameter: ``numel`` elements, from ``start`` on in the parameter (flattened) and from
    ``offset`` on in the flat tensor of its group; ``of`` is the number of that flat tensor."""

    start: int
    offset: int
    numel: int
    of: int


class ZeroLoRARite(torch.optim.Optimizer):
    """LoRARite for a model that DeepSpeed trains by ZeRO, stage 1, 2 or 3::

        optimizer = ZeroLoRARite(create_lora_rite(model, lr=5e-4))
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    :class:`lora_rite.LoRARiteFactory` does that by itself, where Accelerate, and so a Trainer, is set to DeepSpeed.

    The model, its gradients and their reduction are DeepSpeed's, as are the float32 factors, of which each process has
    a piece. In a step the gradients are put together by one all-reduce, every process makes the whole step on float32
    copies of the factors, and writes its piece back. So each process holds the factors and LoRARite's state as a whole
    (under DDP it does too): a thousandth of a model. Other trainable parameters stay shared out: AdamW is elementwise.

    Checkpoints are DeepSpeed's. The first moments are shared out in them as Adam's are, so that they can be made
    universal (``ds_to_universal.py``), to go on with another number of processes.

    Args:
        optimizer: of :func:`lora_rite.create_lora_rite` or :class:`LoRARite`, before its first step. It goes on as
            ``.optimizer``, with float32 copies of the factors as its parameters.

    Raises:
        LoRARiteTypeError: ``optimizer`` is none.
        LoRARiteValueError: it has made a step; from ``step()``, DeepSpeed's configuration does not fit, or what was
            loaded is not LoRARite's.
    """

    def __init__(self, optimizer: LoRARite):
        if not isinstance(optimizer, LoRARite):
            raise LoRARiteTypeError(f"optimizer is a {type(optimizer).__name__}, not a LoRARite")
        if optimizer.state:
            raise LoRARiteValueError("this LoRARite has a state: wrap it before its first step, then load checkpoints")
        lora, others = ([g for g in optimizer.param_groups if g["kind"] == kind] for kind in ("lora", "adamw"))
        self.optimizer, self._others = optimizer, [{k: v for k, v in g.items() if k != "params"} for g in others]
        factors = [p for group in lora for p in group["params"]]
        self._lrs = [float(group["lr"]) for group in lora]
        if any(self._lrs) and not self._lrs[0]:  # DeepSpeed's lr is the first one, of which the others are multiples
            raise LoRARiteValueError(
                "the lr of the first group of pairs is 0 and that of others is not: freeze its factors instead"
            )
        self._other_parameters = [p for group in others for p in group["params"]]
        self._built = False
        shared_out = [{"params": [p for p in factors if p.requires_grad], "lr": self._lrs[0]}]
        shared_out += [{"params": group["params"], "lr": float(group["lr"])} for group in others]
        super().__init__([{**group, "number": i} for i, group in enumerate(shared_out)], {"lr": self._lrs[0]})
        self._built = True
        #: Of each factor, the model's parameter and the float32 copy that is stepped.
        self._copies = [(p, nn.Parameter(p.detach().float().clone(), p.requires_grad)) for p in factors]
        #: Those that DeepSpeed shares out. PEFT may freeze an adapter meanwhile, so it is settled here.
        self._trained: list[tuple[Any, nn.Parameter]] = [(p, copy) for p, copy in self._copies if p.requires_grad]
        copies = iter(copy for _, copy in self._copies)
        for group in lora:
            group["params"] = [next(copies) for _ in group["params"]]
            group["initial_lr"] = float(group["lr"])  # what callbacks compare, as the scheduler is the outer one's
        optimizer.param_groups[:] = lora
        self._written: Tensor | None = None  # this process's piece of the factors as the last step left it
        self._restored = False  # by load_state_dict, which DeepSpeed does not call for a universal checkpoint

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises LoRARiteTypeError: groups are added to the LoRARite, before it is wrapped."""
        if getattr(self, "_built", False):
            raise LoRARiteTypeError("add the group to the LoRARite, before ZeroLoRARite wraps it")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step, of the groups that DeepSpeed presents: with stages 1 and 2, it calls once for each group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for position, group in enumerate(self.param_groups):
            if len(self.param_groups) > len(self._others) and group["number"] != position:
                # From a universal checkpoint, stage 3 gives all groups what the first one had.
                group.update(number=position, lr=group.pop(KEPT_WHOLE)["lrs"][position])
            for flat in group["params"]:
                if group["number"] == 0:
                    self._step_factors(group, flat)
                else:
                    self._step_others(group, flat, self._others[group["number"] - 1])
        return loss

    def report(self) -> dict[str, Any]:
        """As :meth:`LoRARite.report`; ``state_bytes`` are those of this process."""
        figures = self.optimizer.report()
        others = {"other_parameters": len(self._other_parameters)}
        return figures | others | {"state_bytes": figures["state_bytes"] + state_bytes(self)}

    # ------------------------------------------------------------------------------------------------- factors

    def _step_factors(self, group: dict[str, Any], flat: Tensor) -> None:
        pieces = self._pieces(flat)
        self._move_copies()
        loaded = group.pop(KEPT_WHOLE, None)
        changed = torch.ones(()) if self._written is None else (flat != self._written).any()
        *gradients, changed = self._put_together(pieces, flat.grad, changed)
        norms = torch.stack([*torch._foreach_norm(gradients, torch.inf), changed.squeeze()]).tolist()
        if norms.pop() or loaded is not None:
            self._gather_factors(pieces, flat)
        if loaded is not None:
            self._load(loaded, pieces, self.state.pop(flat, {}))
        missing = self._without_gradient(norms)
        for (_, copy), gradient in zip(self._trained, gradients, strict=True):
            copy.grad = None if id(copy) in missing else gradient.view(copy.shape)
        for own, lr in zip(self.optimizer.param_groups, self._lrs, strict=True):
            own["lr"] = float(group["lr"]) * (lr / self._lrs[0] if self._lrs[0] else 1)
        self.optimizer.step()
        for (_, copy), piece in zip(self._trained, pieces, strict=True):
            copy.grad = None
            _write(flat, piece, copy)
        self._written = flat.detach().clone()

    def _without_gradient(self, norms: list[float]) -> set[int]:
        """The ids of copies whose pairs have had no gradient: DeepSpeed makes it zero, for both factors of a pair."""
        zero = {id(copy) for (_, copy), norm in zip(self._trained, norms, strict=True) if norm == 0}
        copies = [copy for _, copy in self._copies]
        pairs = zip(copies[::2], copies[1::2], strict=True)
        return {id(p) for pair in pairs for p in pair if all(id(q) in zero for q in pair if q.requires_grad)}

    def _gather_factors(self, pieces: list[Piece | None], flat: Tensor) -> None:
        """Puts the float32 factors together, and takes the frozen ones from the model."""
        for (_, copy), value in zip(self._trained, self._put_together(pieces, flat), strict=False):
            copy.copy_(value.view(copy.shape))
        frozen = [(p, copy) for p, copy in self._copies if not copy.requires_grad]
        with gathered(p for p, _ in frozen):
            for p, copy in frozen:
                copy.copy_(p)

    def _load(self, loaded: dict[str, Any], pieces: list[Piece | None], state: dict[str, Any]) -> None:
        """Gives LoRARite the state of a checkpoint, whose first moments are in pieces."""
        if not (self._restored or loaded["located"]):
            raise LoRARiteValueError(
                "this universal checkpoint is of a run with round_robin_gradients, where DeepSpeed's converter mixes "
                "up the parameters: go on with as many processes as saved it, or save without round_robin_gradients"
            )
        self._restored = False
        whole = {**loaded["optimizer"], "state": {i: dict(own) for i, own in loaded["optimizer"]["state"].items()}}
        if whole["state"]:
            moments = dict(
                zip((id(c) for _, c in self._trained), self._put_together(pieces, state[FIRST]), strict=False)
            )
            for i, (_, copy) in enumerate(self._copies):
                if i in whole["state"]:
                    whole["state"][i]["first_moment"] = moments[id(copy)].view(copy.shape)
        self.optimizer.load_state_dict(whole)

    def _put_together(self, pieces: list[Piece | None], flat: Any, flag: Tensor | None = None) -> tuple[Tensor, ...]:
        """The trained factors, or what is shared out as they are, flattened; and the sum of the processes' flags."""
        sizes = [copy.numel() for _, copy in self._trained]
        values = torch.zeros(sum(sizes) + 1, device=self._device())
        if flag is not None:
            values[-1] = flag
        views = values.split([*sizes, 1])
        for view, piece in zip(views, pieces, strict=False):
            if piece:
                own = flat[piece.offset : piece.offset + piece.numel]
                view[piece.start : piece.start + piece.numel].copy_(own)
        self._total(values)
        return views

    # -------------------------------------------------------------------------------------------------- others

    def _step_others(self, group: dict[str, Any], flat: Tensor, options: dict[str, Any]) -> None:
        broken = torch.isfinite(flat.grad).all().logical_not().to(self._device(), torch.float32)  # type: ignore[arg-type]
        self._total(broken)
        if broken:
            warn("non-finite gradient of parameters that are no factors: AdamW's step skipped")
            return
        adamw_step({**options, "lr": group["lr"], "params": [flat]}, self.state, 0, None)

    # --------------------------------------------------------------------------------------------- checkpoints

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """For DeepSpeed's checkpoints: of the factors, this process's piece of the first moments and all other state,
        and AdamW's pieces."""
        packed = super().state_dict()
        own = packed["param_groups"][0]
        if KEPT_WHOLE in own:  # loaded, and no step made since
            return packed
        inner, located = self.optimizer.state_dict(), True
        if inner["state"]:
            flat = self.param_groups[0]["params"][0]
            first, pieces = torch.zeros_like(flat), self._pieces(flat)
            moments = {id(c): inner["state"].get(i, {}).get("first_moment") for i, (_, c) in enumerate(self._copies)}
            for (_, copy), piece in zip(self._trained, pieces, strict=True):
                _write(first, piece, moments[id(copy)])
            located = all(_is_located(p, piece) for (p, _), piece in zip(self._trained, pieces, strict=True))
            steps = max(float(state["step"].max()) for state in inner["state"].values())
            packed["state"][0] = {"step": torch.tensor(steps), FIRST: first, SECOND: torch.zeros_like(flat)}
        without = {i: {k: v for k, v in s.items() if k != "first_moment"} for i, s in inner["state"].items()}
        own[KEPT_WHOLE] = {
            "optimizer": {**inner, "state": without},
            "lrs": [group["lr"] for group in self.param_groups],
            "located": located,
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave to this process; the first moments are put together in the next step.

        Raises:
            LoRARiteValueError: it is of another optimizer; from the next step, of other factors.
        """
        if KEPT_WHOLE not in state_dict["param_groups"][0]:
            raise LoRARiteValueError(
                "not a state of ZeroLoRARite. A run of another optimizer, or without ZeRO, cannot go on with it; load "
                "the weights alone (load_checkpoint(…, load_optimizer_states=False))"
            )
        super().load_state_dict(state_dict)
        self._restored = True

    # ------------------------------------------------------------------------------------------- DeepSpeed's layout

    def _pieces(self, flat: Tensor) -> list[Piece | None]:
        """Of each trained factor, what of it is in ``flat``; None where that is another process's."""
        trained = [p for p, _ in self._trained]
        if not all(hasattr(p, "_z3_optimizer") or hasattr(p, "_dp_group") for p in trained):
            raise LoRARiteValueError(
                "ZeroLoRARite is for DeepSpeed's ZeRO, stages 1 to 3, which has not taken over these parameters: "
                "elsewhere (stage 0, DDP, FSDP2), use the LoRARite as it is"
            )
        if not hasattr(trained[0], "_z3_optimizer"):
            return _cut_together(trained, flat)
        pieces = [_cut_alone(p) for p in trained]
        if len({piece.of for piece in pieces if piece}) > 1:
            raise LoRARiteValueError(
                "zero_optimization.sub_group_size cuts the factors into several groups, which would be stepped one "
                f"after the other: raise it above {flat.numel()}, or leave it out"
            )
        return pieces

    def _total(self, t: Tensor) -> None:
        """Sums over the processes among which the factors are shared out, in place."""
        p = self._trained[0][0]
        dist.all_reduce(t, group=p.ds_process_group if hasattr(p, "ds_process_group") else p._dp_group)

    @staticmethod
    def _device() -> torch.device:
        """Where collectives and steps take place, also where DeepSpeed keeps its pieces on the CPU."""
        return torch.device(_deepspeed().get_accelerator().current_device_name())

    def _move_copies(self) -> None:
        for _, copy in self._copies:
            if copy.device != (device := self._device()):
                copy.data = copy.data.to(device)


def _cut_alone(p: Any) -> Piece | None:
    """Of stage 3, which cuts each parameter for itself."""
    of, offset, size = p._z3_optimizer.grad_position[p._z3_optimizer.get_param_id(p)]
    start = size * dist.get_rank(group=p.ds_process_group)
    numel = min(size, p.ds_numel - start)  # the last pieces are padded
    return Piece(start, offset, numel, of) if numel > 0 else None


def _cut_together(params: list[Any], flat: Tensor) -> list[Piece | None]:
    """Of stages 1 and 2, which lay the parameters one after the other and cut the whole. Where each lies is read off
    its memory: DeepSpeed's own account (``_hp_mapping``) is wrong with ``round_robin_gradients``."""
    if len({p.untyped_storage().data_ptr() for p in params}) > 1:
        raise LoRARiteValueError("the factors are not in one flat tensor, as DeepSpeed's ZeRO has them: not supported")
    first = min(p.storage_offset() for p in params)
    begin = dist.get_rank(group=params[0]._dp_group) * flat.numel()
    pieces: list[Piece | None] = []
    for p in params:
        place = p.storage_offset() - first
        low, high = max(place, begin), min(place + p.numel(), begin + flat.numel())
        pieces.append(Piece(low - place, low - begin, high - low, 0) if low < high else None)
    return pieces


def _is_located(p: Any, piece: Piece | None) -> bool:
    """Whether DeepSpeed's tools, which go by its own account, find the piece where it is."""
    if hasattr(p, "_z3_optimizer"):
        return True
    told = p._hp_mapping
    if told is None or piece is None:
        return told is piece
    return (told.lp_fragment_address.start, told.hp_fragment_address.start, told.lp_fragment_address.numel) == piece[:3]


def _write(flat: Tensor, piece: Piece | None, whole: Tensor | None) -> None:
    """Copies this process's piece of a parameter, where there is one, to its place in ``flat``."""
    if piece and whole is not None:
        own = whole.reshape(-1)[piece.start : piece.start + piece.numel]
        flat[piece.offset : piece.offset + piece.numel].copy_(own)


def whole_factors(model: nn.Module) -> AbstractContextManager[Any]:
    """Within, the factors and all other trainable parameters are whole, where ZeRO's stage 3 has cut them already."""
    named = dict(model.named_parameters())
    plain = plain_names(list(named))
    return gathered(p for p, name in zip(named.values(), plain, strict=True) if p.requires_grad or partner_of(name))


def gathered(params: Iterable[Any]) -> AbstractContextManager[Any]:
    """Within, those of the parameters that ZeRO's stage 3 has cut are whole."""
    if not (cut := [p for p in params if hasattr(p, "ds_id")]):
        return nullcontext()
    return _deepspeed().zero.GatheredParameters(cut)


def _deepspeed() -> Any:
    return importlib.import_module("deepspeed")


def zero_by_accelerate() -> float | None:
    """None unless Accelerate, and so a Trainer, is set to ZeRO (stages 1 to 3); else the norm to which DeepSpeed is to
    clip raw gradients, 0 where it does not. With ``offload_optimizer``, Accelerate is told to keep the optimizer: it
    would exchange it for DeepSpeedCPUAdam, without a word."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return None
    plugin = getattr(state.AcceleratorState(), "deepspeed_plugin", None)
    if plugin is None or not plugin.deepspeed_config.get("zero_optimization", {}).get("stage"):
        return None
    plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
    default = _deepspeed().runtime.constants.GRADIENT_CLIPPING_DEFAULT  # 0 in old versions, 1 in new ones
    clip = plugin.deepspeed_config.get("gradient_clipping", default)
    return 0.0 if clip == "auto" else float(clip)  # (a Trainer has put max_grad_norm in the place of "auto")
