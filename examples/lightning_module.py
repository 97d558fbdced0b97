"""Lightning: the optimizer in configure_optimizers, the callback of lora_rite.lightning, no gradient_clip_val.

python examples/lightning_module.py [--out runs/lightning] [--resume runs/lightning/step=10.ckpt]
"""

from itertools import count
from pathlib import Path

import torch
from common import adapted, draw, model_and_tokenizer, tell, windows
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer, callbacks
from transformers import get_cosine_schedule_with_warmup

from lora_rite import LoRARite, create_lora_rite
from lora_rite.lightning import LoRARiteCallback


class Finetune(LightningModule):
    strict_loading = False  # checkpoints have the adapter alone

    def __init__(self, model, rows, lr: float, steps: int):
        super().__init__()
        self.model, self.rows, self.lr, self.steps = model, rows, lr, steps

    def train_dataloader(self):  # from global_step on: a resumed Trainer reads a loader from its beginning
        return (draw(self.rows, step) for step in count(self.global_step))

    def training_step(self, batch, _):
        self.log("loss", loss := self.model(input_ids=batch, labels=batch).loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = create_lora_rite(self.model, lr=self.lr)
        schedule = get_cosine_schedule_with_warmup(optimizer, self.steps // 10, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def state_dict(self, **kwargs):
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["rng"] = torch.get_rng_state()  # for dropout: Lightning keeps none

    def on_load_checkpoint(self, checkpoint):
        torch.set_rng_state(checkpoint["rng"])


def main(out: Path, steps: int = 20, save_every: int = 10, lr: float = 2e-2, resume: Path | None = None) -> LoRARite:
    network, tokenizer = model_and_tokenizer()
    module = Finetune(adapted(network).train(), windows(tokenizer), lr, steps)
    save = callbacks.ModelCheckpoint(out, "{step}", every_n_train_steps=save_every, save_top_k=-1)
    trainer = Trainer(max_steps=steps, callbacks=[save, LoRARiteCallback()], logger=False, log_every_n_steps=5)
    trainer.fit(module, ckpt_path=resume, weights_only=True)
    module.model.save_pretrained(out / "adapter")
    return tell(trainer.optimizers[0], out / "adapter")


if __name__ == "__main__":
    auto_cli(main, as_positional=False, set_defaults={"out": "runs/lightning"})
