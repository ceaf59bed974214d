"""What both policies are: frozen weights, a LoRA, which is all that trains, and a device to work on."""

from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from common import ConfigError, check_finite, few, loading, torch_seed


@contextmanager
def on_device(model, device):
    """Inside, a model is on the device; afterwards it is back where it was."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


def old_log_probs(kept, rows, log_probs):
    """Those that `remember` kept of rows, {row: tensor}, or the new ones, where no update came in between

    All rows of a batch belong to the same update, so the first speaks for all.
    """
    if rows[0] in kept:
        return torch.stack([kept[row] for row in rows])  # (b, ...)
    return log_probs.detach()


class Policy:
    """What Generator and Refiner share; what GRPO asks of them besides is listed in grpo.py.

    Each has a `name`, `cfg`, `model` and `device`, the `lora_options` of peft's LoraConfig, a `lora_file`,
    the `prefix` of the names in it, and `read(folder)`, which puts it into the model.
    """

    lora = {}  # {name: parameter}; none before `add_lora` or `load`

    def at_work(self):
        """Inside, the model is on the device; under offload it comes from the CPU and goes back there."""
        return on_device(self.model, self.device)

    def add_lora(self, seed=0):
        """A new LoRA: down random, up zero, so that nothing changes yet"""
        config = LoraConfig(
            r=self.cfg.lora_rank, lora_alpha=self.cfg.lora_alpha, **self.lora_options
        )
        with torch.random.fork_rng(devices=[]), loading(f"{self.name}.lora_targets"):
            torch.manual_seed(torch_seed(f"{self.name} lora", seed))
            self.model.add_adapter(config)
        self.adopt()

    def load(self, folder):
        """The LoRA that `save` wrote, to use or to train further

        ConfigError unless the file holds just the names of this model's LoRA, and finite tensors. The
        libraries skip names that they do not know and leave what is missing as it was initialised.
        """
        file = Path(folder) / self.lora_file
        with loading(file):
            self.read(str(folder))
            found = load_file(file)
        names = get_peft_model_state_dict(self.model)
        wrong = set(found) ^ {f"{self.prefix}.{name}" for name in names}
        if wrong:
            raise ConfigError(
                f"{file}: not the LoRA of this model: {few(sorted(wrong))}; expected one that was saved "
                "for it"
            )
        check_finite(file, found)
        self.adopt()

    def adopt(self):
        self.lora = {n: p for n, p in self.model.named_parameters() if "lora_" in n}
        for p in self.lora.values():
            p.data = p.data.float()  # AdamW's steps of 1e-4 would vanish in bf16
            p.requires_grad_(True)

    def parameters(self):
        return list(self.lora.values())

    def state(self):
        """{name: tensor} of all that training changes, by reference"""
        return {f"lora.{name}": p.detach() for name, p in self.lora.items()}

    @contextmanager
    def reference(self):
        """Inside, the LoRA is off: the reference policy, with no second copy of the weights"""
        if self.lora:
            self.model.disable_adapters()
        try:
            yield
        finally:
            if self.lora:
                self.model.enable_adapters()
