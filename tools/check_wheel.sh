#!/usr/bin/env bash
# Installs a wheel into a new environment that has torch and what torch needs, and fine-tunes with it there.
#   bash tools/check_wheel.sh dist/lora_rite-….whl
set -euo pipefail
wheel=$(realpath "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "$wheel"
cd "$folder" # not in the checkout: the installed package is what is imported
env/bin/python - <<'PY'
import importlib.util
from importlib.metadata import requires

import torch

import lora_rite

assert "site-packages" in lora_rite.__file__, lora_rite.__file__
for package in ("transformers", "peft", "accelerate", "numpy"):
    assert importlib.util.find_spec(package) is None, f"{package} came with lora-rite"
assert [r for r in requires("lora-rite") if "extra ==" not in r] == ["torch>=2.10"]
torch.manual_seed(0)
a, b = torch.nn.Parameter(torch.randn(4, 16)), torch.nn.Parameter(torch.zeros(8, 4))
target, optimizer = torch.randn(8, 16), lora_rite.LoRARite([("lora_A.weight", a), ("lora_B.weight", b)], lr=3e-2)
losses = []
for _ in range(100):
    optimizer.zero_grad()
    losses.append((b @ a - target).square().mean())
    losses[-1].backward()
    optimizer.step()
assert losses[-1] < 0.8 * losses[0], (losses[0], losses[-1])
assert optimizer.report()["pairs_preconditioned"] == 1
print(f"lora-rite {lora_rite.__version__} works with torch {torch.__version__} alone")
PY
for call in "--version" "pairs"; do
  env/bin/lora-rite $call > out.txt 2>&1 || grep -q 'pip install "lora-rite\[finetune\]"' out.txt || { cat out.txt; exit 1; }
done
