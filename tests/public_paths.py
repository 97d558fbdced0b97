"""What users' code, recipes and files name: each path of here must go on to work, wherever its code moves.

As a script, what a wheel must have: ``python public_paths.py FOLDER`` looks whether ``lora_rite`` is that of FOLDER,
imports every module of it and every path, and loads an optimizer that was pickled before ``LoRARite`` moved.
"""

import importlib
import pickle
import pkgutil
import sys
from pathlib import Path

import torch

#: module:attribute, what else needs to be installed.
PATHS = {
    **dict.fromkeys(
        [
            "lora_rite:LoRARite", "lora_rite:PUBLISHED", "lora_rite:find_pairs", "lora_rite:param_groups",
            "lora_rite:create_lora_rite", "lora_rite:LoRARiteFactory", "lora_rite:layer_report", "lora_rite:audit",
            "lora_rite:LoRARiteError", "lora_rite:LoRARiteTypeError", "lora_rite:LoRARiteValueError",
            "lora_rite:NonFiniteError", "lora_rite:ZeroLoRARite", "lora_rite.errors:LoRARiteError",
            "lora_rite.optimizer:LoRARite", "lora_rite.optimizer:state_bytes",
            "lora_rite.pairs:find_pairs", "lora_rite.pairs:param_groups", "lora_rite.pairs:Shape",
            "lora_rite.hf:create_lora_rite", "lora_rite.hf:LoRARiteFactory", "lora_rite.hf:unwrap",
            "lora_rite.invariance:audit", "lora_rite.invariance:transforms", "lora_rite.simple:step",
            "lora_rite.rivals:Shampoo.for_model", "lora_rite.rivals:PoLoRA.for_model",
            "lora_rite.rivals:LoRAMuon.for_model", "lora_rite.theory.variant:Variant",
        ],
        None,
    ),
    **dict.fromkeys(["lora_rite:LoRARiteCallback", "lora_rite.callback:LoRARiteCallback"], "transformers"),
    **dict.fromkeys(
        [
            "lora_rite.cli:main", "lora_rite.finetune.choices:train_choices", "lora_rite.finetune.evaluate:evaluate",
            "lora_rite.finetune.train:train", "lora_rite.finetune.optimizers:published", "lora_rite.models:TINY",
        ],
        "jsonargparse",
    ),
    "lora_rite.lightning:LoRARiteCallback": "lightning",
    **dict.fromkeys(
        [
            "lora_rite:optax.lora_rite", "lora_rite.optax:lora_rite", "lora_rite.optax:scale_by_lora_rite",
            "lora_rite.optax:labels", "lora_rite.optax:Layout", "lora_rite.optax:LAYOUTS", "lora_rite.optax:NNX",
            "lora_rite.optax:PEFT", "lora_rite.optax:PUBLISHED", "lora_rite.optax:LoRARiteState",
        ],
        "optax",
    ),
}  # fmt: skip


def found(path):
    """What an import of this path gives, as ``from module import attribute`` does."""
    module, _, attributes = path.partition(":")
    value = importlib.import_module(module)
    for attribute in attributes.split("."):
        value = getattr(value, attribute)
    return value


def pickled_before():
    """An optimizer after two steps, and its pickle as it was when the class was in ``lora_rite.optimizer``."""
    from lora_rite import LoRARite

    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, 9)), torch.nn.Parameter(torch.randn(7, 4))]
    optimizer = LoRARite(params, lr=1e-2)
    for _ in range(2):
        step(optimizer)
    here, LoRARite.__module__ = LoRARite.__module__, "lora_rite.optimizer"
    try:
        content = pickle.dumps(optimizer)
    finally:
        LoRARite.__module__ = here
    assert b"lora_rite.optimizer" in content
    assert b"lora_rite.optim." not in content  # no path inside the package but that of the class
    return optimizer, content


def step(optimizer):
    """The parameters after one more step, with gradients that are always the same."""
    generator = torch.Generator().manual_seed(0)
    params = optimizer.param_groups[0]["params"]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    return params


def check_pickle():
    """The loaded optimizer goes on as the other one does, bitwise."""
    optimizer, content = pickled_before()
    loaded = pickle.loads(content)
    assert type(loaded) is type(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(step(loaded), step(optimizer), strict=True))


def unimportable():
    """Modules of ``lora_rite`` that cannot be imported, but those that ask for an extra."""
    import lora_rite

    errors = {}
    for module in pkgutil.walk_packages(lora_rite.__path__, "lora_rite."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except Exception as error:
                if 'pip install "lora-rite[' not in str(error):
                    errors[module.name] = error
    return errors


if __name__ == "__main__":
    import lora_rite

    assert Path(lora_rite.__file__).is_relative_to(sys.argv[1]), lora_rite.__file__
    for path, needs in PATHS.items():
        if needs is None or importlib.util.find_spec(needs):
            found(path)
    check_pickle()
    assert not (errors := unimportable()), errors
