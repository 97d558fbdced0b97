"""What a run is made of, as sha256: files, tensors, token rows, the state of an adapter and its optimizer."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_tensors(named: Iterable[tuple[str, Any]]) -> str:
    """sha256 of names, dtypes, shapes and bytes of tensors, in the order given."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(whole(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_rows(*parts: list[dict[str, list[int]]]) -> str:
    """sha256 of token rows: the text, its tokenizer, and how it was cut and split."""
    import numpy as np

    digest = hashlib.sha256()
    for part in parts:
        for row in part:
            for key in sorted(row):
                digest.update(f"{key} {len(row[key])}\n".encode())
                digest.update(np.asarray(row[key], dtype=np.int64).tobytes())
        digest.update(b"end\n")
    return digest.hexdigest()


def digest_state(model: Any, optimizer: Any) -> str:
    """sha256 of the trainable parameters and of the tensors in the optimizer's state."""
    from torch.utils._pytree import keystr, tree_flatten_with_path

    state, _ = tree_flatten_with_path(optimizer.state_dict())  # that of a wrapper (Lookahead, …) has a form of its own
    named = [*trained(model), *((keystr(path), value) for path, value in state if hasattr(value, "dtype"))]
    return digest_tensors(named)


def trained(model: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def whole(value: Any) -> Any:
    """A tensor that FSDP2 has shared out over the processes, which must all call this, in one piece; anything else as
    it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
