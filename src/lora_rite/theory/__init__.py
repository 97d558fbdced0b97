"""``lora-rite theory``: the paper's theorems, the costs, and our own additions, put to the test.

An experiment is a module with ``EXPECTED`` (a paragraph), ``run(**settings)`` (figures as JSON can hold them),
``found(result)`` (a paragraph made of them) and ``plot(result, figure)``.
"""

import inspect
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..inputs import blame


def theory(experiment: str, out: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Runs an experiment, prints what was expected and what came out, and writes EXPERIMENT.json and EXPERIMENT.png
    into ``out``."""
    from argparse import ArgumentError

    import matplotlib
    from jsonargparse import ArgumentParser

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ..finetune.wording import in_words
    from ..run.files import prepare_folder, write_json
    from ..run.processes import check_alone
    from ..run.versions import versions

    check_alone("lora-rite theory")
    module: Any = import_module(f".{experiment}", __name__)
    known = inspect.signature(module.run).parameters
    if unknown := [key for key in settings if key not in known]:
        raise LoRARiteValueError(f"--settings: {experiment} has no {unknown[0]!r}; it has {', '.join(known)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(module.run, as_group=False)
    try:
        parsed = parser.parse_object(settings)
    except ArgumentError as error:
        raise LoRARiteValueError(f"--settings of {experiment}: {in_words(str(error))}") from None
    if out is not None:
        prepare_folder("--out", out)
    with blame(f"--settings of {experiment}") if settings else nullcontext():
        result = {"experiment": experiment, **module.run(**{key: parsed[key] for key in settings})}
    result.update(expected=" ".join(module.EXPECTED.split()), found=module.found(result))
    print(f"Expected: {result['expected']}\n\nFound: {result['found']}")
    if out is not None:
        write_json(out / f"{experiment}.json", {**result, "versions": versions()})
        figure = plt.figure(figsize=(11, 4.5), layout="constrained")
        module.plot(result, figure)
        figure.savefig(out / f"{experiment}.png", dpi=110)
        plt.close(figure)
        print(f"\nFigures: {out / experiment}.json, picture: {out / experiment}.png")
    return result
