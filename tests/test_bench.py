"""The benchmark measures what it says; nothing here is timed."""

import json

import pytest
import torch

from lora_rite import LoRARite
from lora_rite.bench import Adapter, _Watch, bench_step

pytest.importorskip("jsonargparse")

from lora_rite.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def test_extra_memory_is_the_peak_of_what_lives_at_once():
    x = torch.zeros(1000)  # 4,000 bytes
    with _Watch() as watch:
        y = x + 1
        z = y * 2
        del y
        w = z - 1
        v = w[:10]
        assert watch.now == 8000
        del z, w
        assert watch.now == 4000  # the view holds the storage
        del v
        x.add_(1)
    assert watch.now == 0
    assert watch.peak == 8000
    with _Watch() as watch:
        float(x.sum())
    assert watch.synchronisations == 1


def test_figures_of_a_small_case(tmp_path, capsys):
    out = tmp_path / "results" / "step.json"
    assert main(["bench", "--layers", "1", "--rank", "2", "--rounds", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    rows = {row["optimizer"]: row for row in result["rows"]}
    assert rows["AdamW (fused)"]["ratio"] == 1
    elements = result["parameters"]
    assert elements == 2 * sum(n + m for n, m in [(2048, 2048), (2048, 256)] * 2 + [(2048, 16384)] * 3)
    assert rows["AdamW (foreach)"]["state_bytes"] == 8 * elements + 4 * 14  # two moments, and a counter a tensor
    assert rows["LoRARite"]["synchronisations"] <= 1
    assert rows["LoRARite"]["extra_bytes"] > 0
    for name in rows:
        assert name in printed


def test_the_adapter_has_the_names_of_peft():
    optimizer = LoRARite(Adapter([(6, 5), (4, 3)], 2, torch.float32, "cpu").named_parameters())
    assert optimizer.report()["pairs"] == 2


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least 1"):
        bench_step(rank=0)
