"""The hyperparameters are the same for torch and for JAX."""

import inspect
import re
import subprocess
import sys

import pytest
import torch

import lora_rite
from lora_rite import LoRARite, LoRARiteValueError
from lora_rite.options import KNOWN_LATER, LR, OPTIONS, OTHER_NAMES, PUBLISHED, RANGES, check

#: What one of the signatures has alone, and why.
OF_TORCH = {
    "params": "a transformation of optax gets the parameters in init and update",
    "lr": "called learning_rate in JAX, where it has no default, as nowhere in optax",
    "capturable": "a step of JAX never waits for the device",
    "engine": "XLA compiles the step of JAX",
    "algebra_dtype": "jax_enable_x64 decides in JAX",
    "first_moment_dtype": "the state of JAX keeps the factors of the last update too, so that it is not small",
    "adamw_lr": "optax.partition gives other parameters to optax.adamw",
    "adamw_betas": "likewise",
    "adamw_eps": "likewise",
    "adamw_weight_decay": "likewise",
}
OF_JAX = {
    "learning_rate": "lr of torch",
    "layouts": "a tree of parameters does not say which axis is the rank",
}
#: What scale_by_lora_rite does without, which has no learning rate and does not move parameters.
NOT_SCALED = {"weight_decay", "damping", "balance_param", "maximize", "scaling"}
OUT_OF_RANGE = {
    "a finite number ≥ 0": (-1, float("nan"), float("inf"), "1e-3", True, None),
    "a finite number > 0": (0, -1e-8, float("nan"), float("inf"), "1e-8", True),
    "a number in [0, 1)": (1.0, -0.1, float("nan"), "0.9", True),
    "a number in [0, 1) and one in [0, 1]": (
        (1.0, 0.9), (0.9, 1.1), (0.9,), (0.9, 0.99, 0.999), (float("nan"), 0.9), 0.9, (0.9, True), "ab", None,
    ),
    "True or False": (1, 0, None, "true"),
    "None or a finite number > 0": (0, -1.0, float("nan"), float("inf"), "1", True),
    'None or "float32"': ("float64", "bfloat16", torch.float32, True, ["float32"]),
    'None or "bfloat16"': ("float16", "bf16", torch.bfloat16, True, 16, ["bfloat16"]),
}  # fmt: skip


def signature(function):
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def of_jax():
    pytest.importorskip("optax")
    return lora_rite.optax


def test_the_signature_of_torch():
    given = signature(LoRARite)
    assert set(OF_TORCH) | set(OPTIONS) == set(given)
    assert {name: given[name] for name in OPTIONS} == {name: option.default for name, option in OPTIONS.items()}


def test_one_default_of_lr():
    """In the library, its helpers and the command line, and wherever the texts name it."""
    pytest.importorskip("peft")
    from lora_rite.finetune.checks import DEFAULT_LR
    from lora_rite.finetune.train import train

    assert signature(LoRARite)["lr"] == signature(lora_rite.create_lora_rite)["lr"] == DEFAULT_LR["lora-rite"] == LR
    text = f"{LR:.0e}".replace("e-0", "e-")
    assert f"by default {text} for lora-rite and 2e-4 for adamw" in " ".join(train.__doc__.split())
    assert f"{text} is the default of LoRARite" in " ".join(of_jax().lora_rite.__doc__.split())


def test_the_signatures_of_jax():
    shared = {name: option.default for name, option in OPTIONS.items() if name not in OF_TORCH}
    whole, scale = signature(of_jax().lora_rite), signature(of_jax().scale_by_lora_rite)
    assert {name: default for name, default in whole.items() if name not in OF_JAX} == shared
    assert set(OF_JAX) < set(whole)
    del scale["layouts"]
    assert scale == {name: default for name, default in shared.items() if name not in NOT_SCALED}


def test_both_docstrings_say_the_same():
    plain = lambda function: " ".join(function.__doc__.split())
    for name, option in OPTIONS.items():
        assert f" {name}: {option.text}" in plain(LoRARite)
        if name == "lr" or name not in OF_TORCH:
            own = "learning_rate" if name == "lr" else name
            assert f" {own}: {option.text}" in plain(of_jax().lora_rite)


def test_the_published_settings_are_in_range():
    check(PUBLISHED)
    check({name: option.default for name, option in OPTIONS.items()})
    assert set(PUBLISHED) < set(OPTIONS)
    assert set(OTHER_NAMES.values()) < set(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_values_out_of_range_are_refused_alike(name):
    """By ``check``, and by torch and JAX in the same words."""
    option, pair = OPTIONS[name], [torch.nn.Parameter(torch.ones(2, 5)), torch.nn.Parameter(torch.ones(4, 2))]
    for value in OUT_OF_RANGE[option.range]:
        message = re.escape(f"{name} must be {option.range}, got {value!r}")
        with pytest.raises(LoRARiteValueError, match=message):
            check({name: value})
        with pytest.raises(LoRARiteValueError, match=message):
            LoRARite(pair, **{name: value})
        if name not in OF_TORCH:
            with pytest.raises(LoRARiteValueError, match=message):
                of_jax().lora_rite(1e-3, **{name: value})


def test_what_is_known_later_is_in_all_ranges_of_numbers():
    assert all(RANGES[range](KNOWN_LATER) for range in RANGES if range.startswith("a ") and "and one" not in range)
    assert RANGES["a number in [0, 1) and one in [0, 1]"]([KNOWN_LATER] * 2)
    assert not RANGES["True or False"](KNOWN_LATER)


def test_what_is_no_option_is_not_looked_at():
    check({"lr_scale": -1, "kind": "lora", "params": [], "skipped": None})


def test_neither_torch_nor_jax_is_loaded():
    code = "import sys, lora_rite.options\nassert not {'torch', 'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
