"""What ``import lora_rite`` loads, in processes of their own."""

import subprocess
import sys

import lora_rite


def loaded_after(code):
    """Top-level modules after ``code`` in a fresh interpreter."""
    script = f"{code}\nimport sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_import_loads_nothing():
    assert not {"torch", "transformers", "peft", "jax"} & loaded_after("import lora_rite; lora_rite.__version__")


def test_the_optimizer_needs_torch_alone():
    modules = loaded_after(
        "from lora_rite import PUBLISHED, LoRARite, LoRARiteFactory, create_lora_rite, find_pairs, layer_report"
    )
    assert "torch" in modules
    assert not {"transformers", "peft", "accelerate", "jsonargparse", "rich", "matplotlib"} & modules


def test_help_of_the_command_line_is_light():
    code = "from lora_rite.cli.program import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass"
    assert not {"torch", "transformers", "peft"} & loaded_after(code)


def test_missing_extras_are_named():
    code = "import sys\nsys.modules['transformers'] = None\nfrom lora_rite import LoRARiteCallback"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'LoRARiteCallback needs transformers: pip install "lora-rite[finetune]"' in run.stderr
    code = "import sys\nsys.modules['lightning'] = None\nimport lora_rite.integrations.lightning"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'lora_rite.lightning needs Lightning: pip install "lora-rite[trainers]"' in run.stderr
    code = "import sys\nsys.modules['jsonargparse'] = None\nfrom lora_rite.cli import main\nsys.exit(main(['pairs']))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == 'lora-rite: the command line needs its extra: pip install "lora-rite[finetune]"\n'


def test_public_names():
    for name in lora_rite.__all__:
        assert getattr(lora_rite, name) is not None
        assert name in dir(lora_rite)
