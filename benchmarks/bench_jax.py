"""LoRA-RITE in optax beside optax.adamw and optax.contrib.muon: what a step costs, and what it learns.

    python benchmarks/bench_jax.py step --layers 4 --out benchmarks/results/jax_step.json
    python benchmarks/bench_jax.py learn --out benchmarks/results/jax_learn.json

``step``: updates of the factors alone at Gemma-2B's shapes, under jit with donated buffers. Times are medians over
rounds in which each optimizer takes one step, and ratios are taken within a round. ``learn``: the model of
examples/jax_finetune.py, 200 steps of its adapter by each optimizer at each learning rate; each one's best is then
repeated with other batches. Runs that OUT has already are not repeated. Needs lora-rite[jax] and flax.
"""

import argparse
import json
import pathlib
import platform
import statistics
import sys
import time
from functools import partial
from importlib import metadata

import jax
import jax.numpy as jnp
import optax

from lora_rite.optax import lora_rite

#: (in, out) of the linear maps of one layer of Gemma-2B.
SHAPES = [(2048, 2048), (2048, 256), (2048, 256), (2048, 2048), (2048, 16384), (2048, 16384), (16384, 2048)]
OPTIMIZERS = {
    "lora_rite": lambda: lora_rite(1e-4),
    "lora_rite, damping 0": lambda: lora_rite(1e-4, damping=0.0),
    "optax.adamw": lambda: optax.adamw(1e-4),
    "optax.contrib.muon": lambda: optax.contrib.muon(1e-4),
}
RATES = [5e-3, 1e-2, 2e-2, 4e-2, 8e-2]


def step(layers: int, rank: int, dtype: str, rounds: int) -> dict:
    kind, key = jnp.dtype(dtype), jax.random.key(0)
    params = {
        str(i): {
            "lora_a": jax.random.normal(jax.random.fold_in(key, i), (n, rank), kind),
            "lora_b": jax.random.normal(jax.random.fold_in(key, 1000 + i), (rank, m), kind),
        }
        for i, (n, m) in enumerate(SHAPES * layers)
    }
    gradients = jax.tree.map(lambda x: (1e-3 * jnp.cos(x)).astype(kind), params)
    made, rows = {}, []
    for name, make in OPTIMIZERS.items():
        tx = make()

        @partial(jax.jit, donate_argnums=(0, 1))
        def apply(params, state, gradients, tx=tx):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        own = jax.tree.map(jnp.copy, params)
        state = jax.jit(tx.init)(own)
        begin = time.perf_counter()
        compiled = apply.lower(own, state, gradients).compile()
        rows.append({
            "optimizer": name,
            "compile_seconds": time.perf_counter() - begin,
            "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        })  # fmt: skip
        made[name] = compiled, own, state
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(3 + rounds):
        for name, (compiled, own, state) in made.items():
            begin = time.perf_counter()
            own, state = jax.block_until_ready(compiled(own, state, gradients))
            seconds[name].append(time.perf_counter() - begin)
            made[name] = compiled, own, state
    for row in rows:
        times = seconds[row["optimizer"]][3:]
        row["seconds"] = statistics.median(times)
        row["quartiles"] = statistics.quantiles(times, n=4)[::2]
        adamw = seconds["optax.adamw"][3:]
        row["ratio_to_adamw"] = statistics.median(x / y for x, y in zip(times, adamw, strict=True))
    count = sum(x.size for x in jax.tree.leaves(params))
    return {"settings": {"model": "gemma-2b", "layers": layers, "rank": rank, "dtype": dtype, "rounds": rounds},
            "parameters": count, "rows": rows}  # fmt: skip


def learn(steps: int, seeds: int, out: pathlib.Path | None) -> dict:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "examples"))
    import jax_finetune as example
    from flax import nnx

    text, base = example.python(), example.pretrained()
    result = {"settings": {"steps": steps}, "held_out_loss_before": example.held_out_loss(base, text), "rows": []}
    if (
        out is not None
        and out.exists()
        and (earlier := json.loads(out.read_text("utf-8")))["settings"]["steps"] == steps
    ):
        result["rows"] = earlier["rows"]

    def run(name: str, rate: float, seed: int) -> float:
        known = {"optimizer": name, "learning_rate": rate, "seed": seed}
        for row in result["rows"]:
            if known.items() <= row.items():
                return row["held_out_loss"]
        model = nnx.clone(base)
        example.train(model, example.optimizer(name, rate, steps), nnx.LoRAParam, text, steps, seed=seed)
        loss = example.held_out_loss(model, text)
        result["rows"].append({**known, "held_out_loss": loss})
        write(result, out)
        return loss

    for name in example.LEARNING_RATES:
        best = min(RATES, key=lambda rate, name=name: run(name, rate, 0))
        for seed in range(1, 1 + seeds):
            run(name, best, seed)
    return result


def write(result: dict, out: pathlib.Path | None) -> None:
    result["versions"] = {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("lora-rite", "jax", "jaxlib", "optax")},
        "machine": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    costs, learning = verbs.add_parser("step"), verbs.add_parser("learn")
    costs.add_argument("--layers", type=int, default=18)
    costs.add_argument("--rank", type=int, default=16)
    costs.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    costs.add_argument("--rounds", type=int, default=20)
    learning.add_argument("--steps", type=int, default=200)
    learning.add_argument("--seeds", type=int, default=2, help="further runs at the best rate")
    for verb in (costs, learning):
        verb.add_argument("--out", type=pathlib.Path, help="file for the figures as JSON")
    options = vars(parser.parse_args())
    if options.pop("verb") == "step":
        out = options.pop("out")
        result = step(**options)
        write(result, out)
    else:
        result = learn(**options)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
