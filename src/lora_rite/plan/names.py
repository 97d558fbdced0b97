"""Names of parameters without what wrappers put into them: one model has the same names wrapped or not."""

import re
from collections import Counter
from collections.abc import Sequence

#: Segments that nothing but a wrapper puts into a name: torch.compile, checkpoint_wrapper (activation checkpointing),
#: FSDP1, torchrec, Lightning Fabric.
WRAPPERS = (
    "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_dmp_wrapped_module", "_forward_module",
)  # fmt: skip
#: Segments of wrappers that a model may have for itself: DistributedDataParallel, DataParallel, DeepSpeed and
#: AveragedModel; PeftModel.
LIKELY_WRAPPERS = ("module", "base_model.model")

_SURE, _LIKELY = (
    re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(map(re.escape, segments))})\.") for segments in (WRAPPERS, LIKELY_WRAPPERS)
)


def plain_names(names: Sequence[str]) -> list[str]:
    """The names without the segments of wrappers, in the same order. Names that would become equal keep as much of them
    as tells them apart (a model with a layer of its own called ``module``). The names of adapters stay: another
    adapter's parameters are others."""
    plain = _distinct([_SURE.sub("", name) for name in names], names)
    while plain and (front := _LIKELY.match(plain[0])) and all(name.startswith(front.group()) for name in plain):
        plain = [name[front.end() :] for name in plain]
    return _distinct([_without_likely(name) for name in plain], plain)


def _without_likely(name: str) -> str:
    while (shorter := _LIKELY.sub("", name)) != name:
        name = shorter
    return name


def _distinct(new: Sequence[str], old: Sequence[str]) -> list[str]:
    """``new``, and in place of those that several old ones have become the old ones."""
    count = Counter(n for n, _ in set(zip(new, old, strict=True)))
    return [n if count[n] == 1 else o for n, o in zip(new, old, strict=True)]
