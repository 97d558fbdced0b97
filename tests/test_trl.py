"""TRL's trainers that take no factory, but an optimizer of the adapted model: DPO, KTO, GRPO and RLOO."""

import warnings
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import transformers  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402

from lora_rite import LoRARiteCallback, create_lora_rite  # noqa: E402
from lora_rite.integrations.peft import unwrap  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
STEPS, PAIRS = 10, 35  # 5 layers of 7 linear maps
PROMPTS = [f"def f{i}(x):" for i in range(40)]
PREFERENCES = {
    "prompt": PROMPTS,
    "chosen": [f" return x + {i}" for i in range(40)],
    "rejected": [f" pass  # {i}" for i in range(40)],
}


def _sampled(prompts, completions, **_):
    """A reward that differs between the completions of a prompt: the share of letters."""
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]


#: Trainer → (its own settings, its data, its further arguments).
TRAINERS = {
    "DPO": ({"max_length": 48}, PREFERENCES, {}),
    "KTO": (
        {"max_length": 48},
        {
            "prompt": PROMPTS * 2,
            "completion": PREFERENCES["chosen"] + PREFERENCES["rejected"],
            "label": [True] * 40 + [False] * 40,
        },
        {},
    ),
    "GRPO": ({"num_generations": 4, "max_completion_length": 12}, {"prompt": PROMPTS}, {"reward_funcs": _sampled}),
    "RLOO": ({"num_generations": 4, "max_completion_length": 12}, {"prompt": PROMPTS}, {"reward_funcs": _sampled}),
}


class Preconditioned(transformers.TrainerCallback):
    """How many pairs each step preconditioned."""

    def __init__(self):
        self.counts = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.counts.append(unwrap(optimizer).report()["pairs_preconditioned"])


@pytest.mark.parametrize("name", TRAINERS)
def test_ten_steps_precondition_every_pair(name, tmp_path, monkeypatch):
    """The factors move, finitely, and LoRARite warns of nothing."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    from common import adapted, model_and_tokenizer

    network, tokenizer = model_and_tokenizer()
    model = adapted(network)
    settings, data, further = TRAINERS[name]
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=0,
        **settings,
    )
    before = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    counter = Preconditioned()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = getattr(trl, f"{name}Trainer")(
            model,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict(data),
            processing_class=tokenizer,
            optimizers=(create_lora_rite(model, lr=5e-3), None),
            callbacks=[LoRARiteCallback(), counter],
            **further,
        )
        trainer.train()
    assert counter.counts == [PAIRS] * STEPS
    assert not [str(w.message) for w in caught if "lora_rite" in w.filename or "LoRARite" in str(w.message)]
    report = unwrap(trainer.optimizer).report()
    assert (report["pairs"], report["steps"], report["skipped"]) == (PAIRS, STEPS, 0)
    after = get_peft_model_state_dict(trainer.model)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert all(not torch.equal(before[key], after[key]) for key in before)
