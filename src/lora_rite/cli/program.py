"""The command line: ``lora-rite demo | train | eval | generate | chat | merge | push | compare | report | pairs | …``.

Heavy imports are inside the verbs.
"""

import errno
import inspect
import itertools
import json
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from .. import __version__
from ..errors import InterruptedRunError, LoRARiteError, LoRARiteValueError, WriteError
from ..run.output import flush, tolerant_output
from . import after

#: Verbs whose required arguments have no option's name.
POSITIONAL = ("compare", "report", "merge", "generate", "chat", "push")
#: The exit code where whoever read the output has gone: that of SIGPIPE.
READER_GONE = 141


def demo(out: Path = Path("demo"), seeds: int = 2, progress: bool = True) -> None:
    """Fine-tunes the embedded model with AdamW and with LoRA-RITE, each at its best learning rate, and compares.

    Offline, about four minutes on two cores. Writes result.json and curves.png into OUT.

    Args:
        out: folder for the results; an earlier demo in it is replaced.
        seeds: number of runs of each optimizer, with seeds 0, 1, ….
        progress: show progress bars.
    """
    from ..study.demo import demo as run

    run(out, seeds=seeds, progress=progress)


def pairs(
    model: str = "tiny",
    adapter: Path | None = None,
    target_modules: str | list[str] = "all-linear",
    rank: int = 16,
    trust_remote_code: bool = False,
) -> None:
    """Shows which factors LoRARite pairs in a model with an adapter, and what it leaves to AdamW, and why.

    Args:
        model: hub id, local folder or GGUF file of a language model; "tiny" is the one inside this package.
        adapter: folder of a PEFT adapter; without it, a new LoRA adapter is attached.
        target_modules: layers that get a new adapter: all-linear, a list of names, or a regular expression.
        rank: rank of a new adapter.
        trust_remote_code: allow the model's own code to run.
    """
    from ..finetune.train import attach_adapter, load_model
    from ..plan.pairs import find_pairs

    network, _ = load_model(model, trust_remote_code=trust_remote_code)
    print(find_pairs(attach_adapter(network, adapter=adapter, rank=rank, target_modules=target_modules)))


def bench_step(
    models: list[str] = ["gemma-2b"],  # noqa: B006
    layers: int | None = None,
    ranks: list[int] = [16],  # noqa: B006
    dtypes: list[Literal["float32", "bfloat16"]] = ["float32"],  # noqa: B006
    device: Literal["cpu", "cuda"] = "cpu",
    capturable: bool = False,
    rounds: int = 10,
    out: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Times a step of LoRARite beside its peers on the adapters of real models, without the models.

    Prints, for every model, rank and dtype: ratios to fused AdamW in one run, state, extra memory, synchronisations.

    Args:
        models: gemma-2b, gemma-7b, mt5-xxl, tiny, or any model's config.json (or folder, GGUF file or hub id).
        layers: number of layers; by default each model's.
        ranks: ranks of the adapter.
        dtypes: float32, bfloat16: of factors and gradients.
        device: where to run.
        capturable: on a CPU too, measure LoRARite(capturable=True), which is slow there; on CUDA it always is, as a
            CUDA graph.
        rounds: timed steps of each optimizer.
        out: file for the figures as JSON, with versions and hardware.
        plot: file for the picture (.png, .svg or .pdf).
    """
    _bench("bench_step", locals())


def bench_train(
    models: list[str] = ["tiny"],  # noqa: B006
    layers: int | None = None,
    rank: int = 16,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
    batch_size: int = 8,
    length: int = 128,
    rounds: int = 10,
    out: Path | None = None,
) -> None:
    """Measures the optimizer's share of a whole training step, for fused AdamW and LoRARite.

    Weights and tokens are random, and the adapter is in float32.

    Args:
        models: tiny, gemma-2b, gemma-7b, mt5-xxl, or any model's config.json (or folder, GGUF file or hub id).
        layers: number of layers; by default each model's.
        rank: rank of the adapter.
        dtype: of the model's weights.
        device: where to run.
        batch_size: sequences in a step.
        length: tokens in a sequence.
        rounds: timed training steps of each optimizer.
        out: file for the figures as JSON, with versions and hardware.
    """
    _bench("bench_train", locals())


def bench_scaling(
    pairs: list[int] = [1, 4, 16, 64, 256, 1000, 2000],  # noqa: B006
    widths: list[int] = [256, 512, 1024, 2048, 4096, 8192, 16384],  # noqa: B006
    ranks: list[int] = [4, 8, 16, 32, 64, 128, 256],  # noqa: B006
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: int = 5,
    out: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Measures how the step grows with the number of pairs, the width and the rank, and fits exponents.

    Args:
        pairs: numbers of pairs, of width 512 and rank 16.
        widths: widths (in and out) of 8 pairs of rank 16.
        ranks: ranks of 8 pairs of width 2048.
        dtype: of factors and gradients.
        device: where to run.
        rounds: timed steps of each optimizer.
        out: file for the figures as JSON, with versions and hardware.
        plot: file for the picture (.png, .svg or .pdf).
    """
    _bench("bench_scaling", locals())


def bench_host(
    pairs: list[int] = [126, 2000],  # noqa: B006
    width: int = 64,
    rank: int = 4,
    rounds: int = 20,
    out: Path | None = None,
) -> None:
    """Measures what a step costs in Python: planning, checks and bookkeeping, beside whole steps and foreach AdamW's.

    In float32 and one thread of a CPU; times are processor time.

    Args:
        pairs: numbers of pairs.
        width: their width, in and out: small ones have little arithmetic.
        rank: their rank.
        rounds: timed steps of each optimizer.
        out: file for the figures as JSON, with versions and hardware.
    """
    _bench("bench_host", locals())


def _bench(name: str, arguments: dict[str, Any]) -> None:
    from ..bench import cases as bench
    from ..bench import host as bench_host
    from ..bench import view as bench_view
    from ..finetune.train import versions
    from ..run.checkpoints import prepare_file, write_json

    out, plot = arguments.pop("out"), arguments.pop("plot", None)
    if out is not None:
        prepare_file("--out", out)
    if plot is not None:
        prepare_file("--plot", plot, (".png", ".svg", ".pdf"))
    result = getattr(bench_host if name == "bench_host" else bench, name)(**arguments)
    print(bench_view.table(result), end="")
    if out is not None:
        write_json(out, {**result, "versions": {**versions(), **bench.hardware()}})
    if plot is not None:
        bench_view.plot(result, plot)


def audit_verb(
    optimizer: str = "lora_rite:LoRARite",
    lr: float = 1e-2,
    optimizer_args: dict[str, Any] | None = None,
    takes: Literal["params", "named", "model"] | None = None,
    model: str | None = None,
    adapter: Path | None = None,
    data: Path | None = None,
    rank: int = 16,
    target_modules: str | list[str] = "all-linear",
    dtypes: list[str] | None = None,
    conditions: list[float] = [10.0, 1e2, 1e4, 1e6],  # noqa: B006
    steps: int | None = None,
    tolerance: float | None = None,
    peers: bool = False,
    seed: int = 0,
    out: Path | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Measures whether an optimizer's step depends on how W = BA is factorised: any optimizer, on your own model.

    Trains from (B, A) and from (BK, K⁻¹A), for scalings, a rotation and random K, and compares what training has
    written into W. The exit code is 0 where that agrees and 3 where it does not, or where rounding hides it.

    Args:
        optimizer: import path of a class or function, like torch.optim:AdamW or my_package.optimizers:make.
        lr: its learning rate.
        optimizer_args: its further keyword arguments.
        takes: what it is called with, the list of parameters, (name, parameter) pairs, or the model; by default a class
            gets parameters (LoRARite groups), and a function the model unless its first parameter is called params.
        model: hub id, local folder or GGUF file of a causal language model, or "tiny", the one inside this package;
            without it, synthetic problems (linear maps, embeddings, convolutions).
        adapter: folder of a PEFT adapter of the model; without it, a new LoRA adapter is attached.
        data: training text for the model as in lora-rite train; without it, random tokens.
        rank: rank of a new adapter.
        target_modules: layers that get a new adapter: all-linear, a list of names, or a regular expression.
        dtypes: dtypes to audit in (float64, float32, bfloat16, float16); by default float64 and float32 for the
            synthetic problems, and a model's own.
        conditions: condition numbers of the random K.
        steps: optimizer steps of each run; by default 50 on the synthetic problems and 10 on a model, whose training by
            itself amplifies rounding over more.
        tolerance: largest relative difference of the changes of W that passes; by default 1e-4 in float64, 1e-2 in
            float32, 0.3 in bfloat16, 0.1 in float16.
        peers: show other optimizers beside it (AdamW, LoRA+, Riemannian, Muon, LoRA-Muon, PoLoRA, Shampoo, Lamb, the
            published step).
        seed: of the problems, the transformations and the adapter.
        out: folder for audit.json and audit.png.
        trust_remote_code: allow the model's own code to run.
    """
    arguments = locals()
    from ..study.audit import audit_command

    return audit_command(**arguments)


def theory_verb(
    experiment: Literal["width", "transfer", "regret", "factors", "cost", "damping", "few_tokens", "noise", "ablation"],
    out: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Puts the paper's theorems, the costs and our own additions to the test: figures, a picture and a paragraph each.

    width: Theorem 1, the change of the output through A and through B over the width. transfer: the best lr over width
    and rank. regret: Theorems 3 and 4. factors: how much A and B learn, on the embedded model. cost: operations, time
    and memory over width and rank. damping: where the published step blows up; few_tokens: the same where it occurs.
    noise: 20,000 steps of noise. ablation: every part of the step taken out or exchanged. Each takes one to ten minutes
    on one core.

    Args:
        experiment: which one to run.
        out: folder for EXPERIMENT.json and EXPERIMENT.png.
        settings: keyword arguments of the experiment's run function, to make it smaller or larger.
    """
    from ..theory import theory

    theory(experiment, out, **(settings or {}))


def train(**kwargs: Any) -> None:
    from ..finetune.train import summary
    from ..finetune.train import train as run

    print(summary(run(**kwargs)))


def evaluate(**kwargs: Any) -> None:
    from ..finetune.evaluate import evaluate as run
    from ..finetune.evaluate import table

    if (result := run(**kwargs)) and not kwargs["dry_run"]:
        print(table(result), end="")


def _underscores(option: re.Match[str]) -> str:
    """--data-dir is --data_dir."""
    return "--" + option[0][2:].replace("-", "_")


def _item_type(annotation: Any) -> Any:
    """What the lists hold that an option takes; None where it takes none."""
    if get_origin(annotation) is list:
        return get_args(annotation)[0]
    return next((found for part in get_args(annotation) if (found := _item_type(part)) is not None), None)


def _join_lists(words: list[str], lists: dict[str, Any]) -> list[str]:
    """``--ranks 4 16`` as ``--ranks '["4", "16"]'``, which the option's type reads. One word alone stays as it is where
    the type takes a word too.

    Args:
        words: of the command line.
        lists: the options that take lists, with their types.
    """
    words = [part for word in words for part in (word.split("=", 1) if word.partition("=")[0] in lists else [word])]
    joined = []
    while words:
        joined.append(words.pop(0))
        if (kind := lists.get(joined[-1])) is None:
            continue
        number = "[-+.0-9]" if _item_type(kind) in (int, float) else ""  # then a word, as of a recipe, ends the list
        pattern = rf"(?!-[-a-z])({number}|null$|\[)"
        values = list(itertools.takewhile(re.compile(pattern).match, words))
        takes_word = get_origin(kind) is not list and str in get_args(kind)
        alone = len(values) == 1 and (takes_word or values[0] == "null")
        if values and not alone and not values[0].startswith("["):
            joined.append(json.dumps(values))
            del words[: len(values)]
    return joined


def compare(**kwargs: Any) -> None:
    from ..study.compare import compare as run

    run(**kwargs)


def report(folder: Path) -> None:
    """Writes the report of a study: report.html (one file that needs no server), report.md and figures/.

    Also of a study that is not finished.

    Args:
        folder: folder of the study, the --out of lora-rite compare.
    """
    from ..study.report import report as run

    print(run(folder))


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of ``lora-rite``. Returns the exit code: 0, 2 for wrong usage, 3 where an audit does not pass,
    128 + n for signal n, 141 where whoever read the output has gone, and 1 or the code of the error's class
    (:mod:`lora_rite.errors`) otherwise."""
    with tolerant_output():
        try:
            code = _main(argv)
        except SystemExit:  # of --help
            if isinstance(flush(sys.stdout), BrokenPipeError):
                return READER_GONE
            raise
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            code = READER_GONE
        lost = flush(sys.stdout)
        if isinstance(lost, BrokenPipeError):
            return READER_GONE
        if lost is not None and code == 0:  # else it has been said
            print(f"lora-rite: error: cannot write the output: {lost.strerror}", file=sys.stderr)
            return WriteError.exit_code
        return code


def _reader_is_gone() -> bool:
    """Whether a BrokenPipeError is of stdout or stderr: an empty line tells, what failed may be in no buffer now."""
    errors = [flush(stream, "\n") for stream in (sys.stdout, sys.stderr)]
    return any(isinstance(error, BrokenPipeError) for error in errors)


def _main(argv: Sequence[str] | None) -> int:
    try:
        from argparse import ArgumentError

        import docstring_parser
        from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser
    except ImportError:
        print('lora-rite: the command line needs its extra: pip install "lora-rite[finetune]"', file=sys.stderr)
        return 1
    from ..finetune.evaluate import evaluate as evaluate_function
    from ..finetune.train import train as train_function
    from ..finetune.untrusted import CODE, forbid_imports, names_code, read_config
    from ..study.compare import compare as compare_function

    forbid_imports()
    places: dict[str, str] = {}  # file:line of what came from a config file

    class ConfigFile(ActionConfigFile):
        """Checks a config file, which may come from a stranger, before it is read."""

        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            options = {action.dest: action for action in parser._actions}
            try:
                config = read_config(Path(values))
            except LoRARiteValueError as error:
                raise TypeError(str(error)) from None
            places.update(config.lines)
            for key in config:
                if key.partition(".")[0] not in options:
                    near = get_close_matches(key, options, 1, 0.5)
                    raise TypeError(f"{places[key]}: no option {key}{f', did you mean {near[0]}?' if near else ''}")
                on = config[key] not in (False, None)  # --print_config writes them where they are off
                if on and key in ("config", "debug", "trust_remote_code"):
                    raise TypeError(f"{places[key]}: --{key} can be given on the command line only")
                if isinstance(options.get(key), ActionYesNo) and not isinstance(config[key], bool):
                    raise TypeError(f"{places[key]}: {key} must be true or false, got {config[key]!r}")
            super().__call__(parser, cfg, values, option_string)
            for key in config:  # as jsonargparse has read them: it looks into strings too
                option = key.partition(".")[0]
                if option in CODE and names_code(cfg[option]) and cfg[option] != options[option].default:
                    what = f"--{option} with an import path"
                    raise TypeError(f"{places[key]}: {what} can be given on the command line only")

    verbs: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "demo": (demo, demo),
        "train": (train_function, train),
        "eval": (evaluate_function, evaluate),
        "generate": (after.generate, after.generate),
        "chat": (after.chat, after.chat),
        "merge": (after.merge, after.merge),
        "push": (after.push, after.push),
        "compare": (compare_function, compare),
        "report": (report, report),
        "pairs": (pairs, pairs),
        "bench step": (bench_step, bench_step),
        "bench train": (bench_train, bench_train),
        "bench scaling": (bench_scaling, bench_scaling),
        "bench host": (bench_host, bench_host),
        "audit": (audit_verb, audit_verb),
        "theory": (theory_verb, theory_verb),
    }
    parser = ArgumentParser(
        prog="lora-rite", description="Fine-tuning with LoRA-RITE.", version=__version__, exit_on_error=False
    )
    commands = {"": parser.add_subcommands(dest="verb")}
    group = ArgumentParser(description="Times LoRARite beside its peers.", exit_on_error=False)
    commands[""].add_subcommand("bench", group, help="Times LoRARite beside its peers: step, train, scaling, host.")
    commands["bench"] = group.add_subcommands(dest="part")
    lists: dict[str, Any] = {}
    for name, (signature, _) in verbs.items():
        verb = ArgumentParser(description=(signature.__doc__ or "").split("\n\n    Args:")[0], exit_on_error=False)
        verb.add_argument("--config", action=ConfigFile, help="YAML file with any of these options")
        verb.add_argument("--debug", action="store_true", help="show a traceback where something goes wrong")
        parameters = inspect.signature(signature).parameters.values()
        switches = [p for p in parameters if isinstance(p.default, bool)]
        lists.update({f"--{p.name}": p.annotation for p in parameters if _item_type(p.annotation) is not None})
        skip: set[str | int] = {p.name for p in switches}
        verb.add_function_arguments(signature, as_group=False, as_positional=name in POSITIONAL, skip=skip)
        texts = {p.arg_name: p.description for p in docstring_parser.parse(signature.__doc__ or "").params}
        for p in switches:  # --resume instead of --resume true
            verb.add_argument(f"--{p.name}", action=ActionYesNo, default=p.default, help=texts[p.name])
        parent, _, own = name.rpartition(" ")
        commands[parent].add_subcommand(own, verb, help=(signature.__doc__ or "").split("\n")[0])
    words = [re.sub(r"^--[\w-]+", _underscores, word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        arguments = parser.parse_args(_join_lists(words, lists))
    except ArgumentError as error:
        message = " ".join(str(error).split())
        key = re.search(r'key "(\w+)', message)
        given = [word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)]
        if key and key[1] in places and f"--{key[1]}" not in given:
            message = f"{places[key[1]]}: {message}"
        print(f"lora-rite: error: {message} (see lora-rite VERB --help)", file=sys.stderr)
        return 2
    verb = arguments.verb
    options = parser.instantiate(arguments)[verb].as_dict()
    if "part" in options:
        part = options["part"]
        verb, options = f"{verb} {part}", options[part]
    options.pop("config")
    debug = options.pop("debug")
    with warnings.catch_warnings():
        if not debug:
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            warnings.showwarning = lambda message, *_, **__: print(f"lora-rite: {message}", file=sys.stderr)
        try:
            return verbs[verb][1](**options) or 0
        except KeyboardInterrupt:
            print("lora-rite: interrupted", file=sys.stderr)
            return 130
        except (LoRARiteError, OSError, ImportError) as error:
            if isinstance(error, BrokenPipeError) and _reader_is_gone():
                return READER_GONE
            if debug:
                raise
            what = "" if isinstance(error, InterruptedRunError) else "error: "
            print(f"lora-rite {verb}: {what}{error}", file=sys.stderr)
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
            return WriteError.exit_code if full else getattr(error, "exit_code", 1)
    return 0
