"""LoRA-RITE in JAX: a small flax model that knows English learns Python.

    python examples/jax_finetune.py                                     # LoRA-RITE, about a minute on a CPU
    python examples/jax_finetune.py --optimizer adamw --learning_rate 2e-2

A transformer of 0.2 million parameters over bytes is trained on the texts of Python's manual, and then a LoRA adapter
on all of its linear maps learns the source of Python's library. Both come with Python, so nothing is downloaded.
Needs lora-rite[jax] and flax.
"""

import argparse
import importlib
import json
import pathlib
import sys
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lora_rite.optax import lora_rite

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS, RANK, BATCH = 128, 64, 96, 4, 2, 8, 32
BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
LEARNING_RATES = {"lora_rite": 4e-2, "adamw": 2e-2, "muon": 2e-2}


def english() -> np.ndarray:
    """The manual, as bytes below 128."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return _bytes("\n".join(topics[key] for key in sorted(topics)))


def python() -> np.ndarray:
    """The modules of the standard library."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    return _bytes("\n".join(path.read_text("utf-8") for path in sorted(folder.glob("*.py"))))


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("ascii", "ignore"), np.uint8)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        linear = lambda n, m: nnx.LoRALinear(n, m, lora_rank=RANK, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.qkv, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(self.norms[0](x)).reshape(*x.shape[:2], HEADS, -1), 3, -1)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.tokens.attend(self.norm(x))


def loss_of(model: Model, batch: jax.Array) -> jax.Array:
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def train(
    model: Model,
    tx: optax.GradientTransformation,
    wrt: nnx.filterlib.Filter,
    text: np.ndarray,
    steps: int,
    seed: int = 0,
) -> None:
    """Trains the variables ``wrt`` on random windows of the first nine tenths of the text."""
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer, batch: jax.Array) -> None:
        gradients = nnx.grad(loss_of, argnums=nnx.DiffState(0, wrt))(model, batch)
        optimizer.update(model, gradients)

    rng = np.random.default_rng(seed)
    windows = np.lib.stride_tricks.sliding_window_view(text[: len(text) * 9 // 10], CONTEXT + 1)
    for _ in range(steps):
        step(model, optimizer, windows[rng.integers(len(windows), size=BATCH)])


def held_out_loss(model: Model, text: np.ndarray) -> float:
    """Nats a byte, over 256 windows of the last tenth."""
    rest = text[len(text) * 9 // 10 :]
    batch = rest[: len(rest) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    return float(nnx.jit(loss_of)(model, batch[:: len(batch) // 256][:256]))


def optimizer(name: str, learning_rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    return {"lora_rite": lora_rite, "adamw": optax.adamw, "muon": optax.contrib.muon}[name](schedule)


def pretrained(steps: int = 600) -> Model:
    model = Model(nnx.Rngs(0))
    train(model, optimizer("adamw", 3e-3, steps), BASE, english(), steps)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=LEARNING_RATES, default="lora_rite")
    parser.add_argument("--learning_rate", type=float, help="default: the best of a sweep (benchmarks/bench_jax.py)")
    parser.add_argument("--steps", type=int, default=200, help="of the adapter")
    parser.add_argument("--pretraining_steps", type=int, default=600, help="of the model before it")
    options = parser.parse_args()
    rate = LEARNING_RATES[options.optimizer] if options.learning_rate is None else options.learning_rate
    print(f"{options.pretraining_steps} steps on the manual, then {options.steps} of the adapter …", file=sys.stderr)
    model, text = pretrained(options.pretraining_steps), python()
    before = held_out_loss(model, text)
    train(model, optimizer(options.optimizer, rate, options.steps), nnx.LoRAParam, text, options.steps)
    print(json.dumps({
        "optimizer": options.optimizer, "learning_rate": rate, "steps": options.steps,
        "held_out_loss_before": before, "held_out_loss": held_out_loss(model, text),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
