# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
This module contains the implementation of the LoRA-RITE optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..peft_model import PeftModel
from ..tuners.lora.layer import LoraLayer, ParamWrapper
from ..tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant


# `lr` is that of this rank; at rank r it counts sqrt(REFERENCE_RANK / r) times, so that one value suits all ranks.
REFERENCE_RANK = 16
# Singular values of a factor up to this share of its largest one are rounding errors, and count as zero.
NULL = 1e-6
# The share of the mean row size that is added to each row size, so that rows of rounding errors are not blown up.
ROW_FLOOR = 1e-2


class LoraRiteOptimizer(Optimizer):
    """
    Implements LoRA-RITE, which preconditions each LoRA factor in the orthonormal basis of the other one. The step on
    the product `B @ A` then does not depend on how the product is factorised ("transformation invariance").

    Let X be a tall factor (`A.T` or `B`), g its gradient and Y = Q T the other factor, with orthonormal columns of Q.
    The unmagnified gradient `g @ pinv(T)` has the size of the gradient of the product. Its second moment V is an
    `r x r` matrix and its first moment M as large as X; both are carried from the old basis of Y to the new one in
    each step. There are two additions to the paper:

    - Damping. `B` starts at zero, and `pinv(T)` of a factor that is hardly larger than zero is huge, so that the
      published step rewrites A from the first batches. Directions of the product that are shorter than `damping` steps
      are therefore followed less. Of each pair one factor's inverse is damped: that of the one that started at zero.
    - Row equilibration. Rows of the preconditioned gradient are divided by their running root mean square, which leaves
      the norm of all of them together as it is.

    All arithmetic is in float32 or above, with `r x r` matrices in float64. The state is half of AdamW's for float32
    factors. Factors must be whole: not for FSDP, DeepSpeed ZeRO or tensor parallelism.

    Args:
        params (`Iterable[dict]`): Groups as [`create_lorarite_optimizer`] makes them. Those with a `scaling` hold
            factors in the order A, B, A, B, ...; those with `scaling=None` hold other parameters, which AdamW updates.
        lr (`float`): Learning rate of the pairs (default: 2e-4).
        betas (`tuple[float, float]`): Decays of the first and of the second moment (default: (0.9, 0.999)).
        eps (`float`): Added to the square roots of the eigenvalues of V (default: 1e-6).
        weight_decay (`float`): Decoupled weight decay (default: 0.0).
        relative_eps (`float`): `eps` in units of the largest of these roots (default: 1e-3).
        damping (`float`): See above; 0 is the published step (default: 20.0).
        row_beta (`float`): Decay of the mean square of a row (default: 0.99).
        clip_unmagnified_grad (`float`):
            Largest norm of the unmagnified gradients of all pairs together; 0 is off (default: 1.0). Do not clip the
            gradients themselves (`max_grad_norm`): their size depends on the factorisation.

    Reference:
        - LoRA-RITE: https://huggingface.co/papers/2410.20625
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        relative_eps: float = 1e-3,
        damping: float = 20.0,
        row_beta: float = 0.99,
        clip_unmagnified_grad: float = 1.0,
    ):
        not_negative = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "relative_eps": relative_eps,
            "damping": damping,
            "clip_unmagnified_grad": clip_unmagnified_grad,
        }
        for name, value in not_negative.items():
            if value < 0.0:
                raise ValueError(f"Invalid {name}: {value} - should be >= 0.0")
        for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1]), ("row_beta", row_beta)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"Invalid {name}: {value} - should be in [0.0, 1.0)")
        super().__init__(params, {**not_negative, "betas": betas, "row_beta": row_beta, "scaling": None})

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """
        Performs a single optimization step.

        Arguments:
            closure (`Callable`, *optional*): A closure that reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        measured = []
        for group in self.param_groups:
            if group["scaling"] is None:
                self._adamw(group)
                continue
            for a, b in zip(group["params"][::2], group["params"][1::2]):
                if a.grad is not None and b.grad is not None:
                    measured.append((group, a, b, *self._measure(group, a, b)))
        if not measured:
            return loss

        # The pairs are clipped together, in units of the gradient of W = W0 + scaling * B @ A.
        squares = [
            (gradient / group["scaling"]).square().sum().to(measured[0][1].device)
            for group, _, _, gradients, _ in measured
            for gradient in gradients
        ]
        norm = torch.stack(squares).sum().sqrt()
        for group, a, b, (gradient_a, gradient_b), (basis_a, basis_b) in measured:
            clip = group["clip_unmagnified_grad"]
            scale = (clip / norm.clamp(min=clip)).to(a.device) if clip > 0.0 else 1.0
            new_a = self._moved(group, a, a.T, scale * gradient_a, basis_b)
            new_b = self._moved(group, b, b, scale * gradient_b, basis_a)
            self.state[b]["carry"] = _carry(a.T, new_a, basis_a)
            self.state[a]["carry"] = _carry(b, new_b, basis_b)
            a.copy_(new_a.T)
            b.copy_(new_b)
        return loss

    def _measure(self, group: dict[str, Any], a: nn.Parameter, b: nn.Parameter):
        """The unmagnified gradients of A and of B, and the bases of A and of B."""
        if not self.state[a]:
            a_is_damped = not a.any() and bool(b.any())
            self.state[a].update(_new_state(a.T, a_is_damped))
            self.state[b].update(_new_state(b, not a_is_damped))
        basis_a, basis_b = _basis(a.T), _basis(b)
        delta = group["damping"] * _product_lr(group, rank=a.shape[0])
        if delta > 0.0 and self.state[a]["damped"]:
            basis_a = _damped(basis_a, basis_b, delta * a.shape[1] ** 0.5)
        elif delta > 0.0:
            basis_b = _damped(basis_b, basis_a, delta * b.shape[0] ** 0.5)
        gradient_a = _work(a.grad.T) @ basis_b.unmagnifier.to(_work_dtype(a))
        gradient_b = _work(b.grad) @ basis_a.unmagnifier.to(_work_dtype(b))
        return (gradient_a, gradient_b), (basis_a, basis_b)

    def _moved(self, group: dict[str, Any], p: nn.Parameter, tall: Tensor, gradient: Tensor, basis: _Basis) -> Tensor:
        """The tall factor after the step, from its unmagnified gradient and the basis of the other one."""
        state = self.state[p]
        state["step"] += 1
        step, eps = state["step"], group["eps"] * group["scaling"]
        beta1, beta2, row_beta = (
            beta * (1 - beta ** (step - 1)) / (1 - beta**step) for beta in (*group["betas"], group["row_beta"])
        )
        # `transport` leads from the other factor's old basis to its new one.
        transport = basis.inverse.T @ state["carry"].double()
        second_moment = beta2 * transport @ state["second_moment"].double() @ transport.T
        second_moment += (1 - beta2) * (gradient.T @ gradient).double() / len(gradient)
        values, vectors = torch.linalg.eigh(second_moment)
        root = values.clamp(min=0.0).sqrt()
        root = root + eps + group["relative_eps"] * root[-1]
        preconditioned = gradient @ ((vectors / root) @ vectors.T).to(gradient.dtype)

        rows = row_beta * state["row_moment"] + (1 - row_beta) * preconditioned.square().mean(1)
        even = preconditioned / (rows.sqrt() + ROW_FLOOR * rows.mean().sqrt() + 1e-12)[:, None]
        even = even * (preconditioned.norm() / even.norm().clamp(min=1e-30))

        first_moment = beta1 * state["first_moment"] @ transport.T.to(even.dtype) + (1 - beta1) * even
        state["second_moment"] = second_moment.to(even.dtype)
        state["row_moment"], state["first_moment"] = rows, first_moment
        update = first_moment @ basis.unmagnifier.T.to(even.dtype)
        shrunk = (1 - group["lr"] * group["weight_decay"]) * _work(tall)
        return (shrunk - _product_lr(group, rank=len(transport)) * update).to(tall.dtype)

    def _adamw(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            state["exp_avg"].lerp_(p.grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            denominator = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1 ** state["step"]))


class _Basis(NamedTuple):
    """Of a tall factor Y (rows, r) = Q T, all (r, r) in float64: T, its pseudo-inverse, and that or the damped one."""

    coordinates: Tensor
    inverse: Tensor
    unmagnifier: Tensor


def _basis(tall: Tensor) -> _Basis:
    tall = tall.double()
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    live = values > NULL**2 * values[-1]
    sigma = torch.where(live, values, 1.0).sqrt()
    inverse = vectors * (live / sigma)
    return _Basis((sigma * live)[:, None] * vectors.T, inverse, inverse)


def _damped(of_y: _Basis, of_x: _Basis, delta: float) -> _Basis:
    """With the inverse of T_Y times s^2 / (s^2 + delta^2) along the singular directions of the product, of size s."""
    u, s, vh = torch.linalg.svd(of_y.coordinates @ of_x.coordinates.T)
    kept = torch.where(s > 1e-15 * s[0], s / (s.square() + delta**2), 0.0)
    return of_y._replace(unmagnifier=of_x.coordinates.T @ (vh.T * kept) @ u.T)


def _carry(old: Tensor, new: Tensor, basis: _Basis) -> Tensor:
    """What the new factor's inverse makes the way from the old basis of this factor to its new one: new.T @ old basis."""
    return (new.double().T @ old.double() @ basis.inverse).to(_work_dtype(new))


def _product_lr(group: dict[str, Any], rank: int) -> float:
    """The learning rate of B @ A, from that of W = W0 + scaling * B @ A."""
    return group["lr"] * (REFERENCE_RANK / rank) ** 0.5 / group["scaling"]


def _work_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _work(tensor: Tensor) -> Tensor:
    return tensor.to(_work_dtype(tensor))


def _new_state(tall: Tensor, damped: bool) -> dict[str, Any]:
    rows, rank = tall.shape
    zeros = {"dtype": _work_dtype(tall), "device": tall.device}
    return {
        "step": 0,
        "damped": damped,
        "first_moment": torch.zeros(rows, rank, **zeros),
        "second_moment": torch.zeros(rank, rank, **zeros),
        "row_moment": torch.zeros(rows, **zeros),
        "carry": torch.zeros(rank, rank, **zeros),
    }


def _collect_pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter, float]]:
    """A, B and scaling of each LoRA layer whose trainable weights are just two matrices, or these and DoRA's magnitude."""
    pairs = []
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper):
            continue  # A ParamWrapper's matrices hold a pair for each expert.
        of_layer = [
            (name, factors_a[name], factors_b[name])
            for factors_a, factors_b in (
                (layer.lora_A, layer.lora_B),
                (layer.lora_embedding_A, layer.lora_embedding_B),
            )
            for name in factors_a
            if name in factors_b
        ]
        for name, a, b in of_layer:
            a, b = getattr(a, "weight", a), getattr(b, "weight", b)
            plain = isinstance(layer.lora_variant.get(name), (type(None), DoraLinearVariant, DoraEmbeddingVariant))
            if plain and a.ndim == b.ndim == 2 and a.requires_grad and b.requires_grad:
                pairs.append((a, b, layer.scaling[name]))
    return pairs


def create_lorarite_optimizer(
    model: PeftModel,
    *,
    lr: float,
    adamw_lr: float | None = None,
    adamw_weight_decay: float = 0.0,
    **kwargs,
) -> Optimizer:
    """
    Creates a LoRA-RITE optimizer, whose step does not depend on how `B @ A` is factorised.

    LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization:
    https://huggingface.co/papers/2410.20625

    Pairs are the LoRA weights of linear and embedding layers, with DoRA and rsLoRA too. Set `max_grad_norm=0` in the
    trainer: the optimizer clips by itself, and clipping the gradients of `A` and `B` would make the step depend on the
    factorisation again.

    Args:
        model (`PeftModel`): The model with LoRA layers.
        lr (`float`):
            The learning rate of the pairs: that of `W = W0 + scaling * B @ A`, so that one value suits every
            `lora_alpha` and, nearly, every rank. Start from the value that suits AdamW, and try up to five times that.
        adamw_lr (`float`, *optional*):
            The learning rate of all other trainable parameters (DoRA's magnitudes, biases, `modules_to_save`,
            convolutions, experts, ...), which AdamW updates. Needed where there are any.
        adamw_weight_decay (`float`): Weight decay of these (default: 0.0).
        kwargs (`dict`): Additional keyword arguments of [`~peft.optimizers.lorarite.LoraRiteOptimizer`].

    Returns:
        `torch.optim.Optimizer`: The optimizer for all trainable parameters of the model.
    """
    pairs = _collect_pairs(model)
    if not pairs:
        raise ValueError(
            "create_lorarite_optimizer did not find any trainable pairs of LoRA matrices on the model. It only applies "
            "to LoRA on linear and embedding layers."
        )
    by_scaling: dict[float, list[nn.Parameter]] = {}
    for a, b, scaling in pairs:
        by_scaling.setdefault(scaling, []).extend((a, b))
    groups: list[dict[str, Any]] = [{"params": params, "scaling": scaling} for scaling, params in by_scaling.items()]

    factors = {id(p) for params in by_scaling.values() for p in params}
    others = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in factors}
    if others and adamw_lr is None:
        raise ValueError(
            f"{len(others)} trainable parameters are not part of a pair of LoRA matrices, e.g. {next(iter(others))!r}. "
            "Pass `adamw_lr` to update them by AdamW, or freeze them."
        )
    if others:
        adamw = {"lr": adamw_lr, "weight_decay": adamw_weight_decay, "eps": 1e-8}
        groups.append({"params": list(others.values()), "scaling": None, **adamw})
    return LoraRiteOptimizer(groups, lr=lr, **kwargs)
