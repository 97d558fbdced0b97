"""What ``import lora_rite`` loads, in processes of their own."""

import subprocess
import sys

import public_paths
import pytest

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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("path", public_paths.PATHS)
def test_a_path_that_users_name_leads_to_what_it_names(path):
    """Also where the module has moved: recipes, pickles and users' code of before go on to work."""
    if (needs := public_paths.PATHS[path]) is not None:
        pytest.importorskip(needs)
    value = public_paths.found(path)
    if hasattr(value, "__name__"):
        assert value.__name__ == path.rpartition(":")[2].rpartition(".")[2]


def test_every_public_name_is_among_those_paths():
    assert {f"lora_rite:{name}" for name in lora_rite.__all__} <= set(public_paths.PATHS)
    pytest.importorskip("optax")
    names = {f"lora_rite.optax:{name}" for name in lora_rite.optax.__all__}
    assert names - {"lora_rite.optax:FactorState"} <= set(public_paths.PATHS)


def test_an_optimizer_that_was_pickled_before_its_class_moved_goes_on():
    public_paths.check_pickle()
