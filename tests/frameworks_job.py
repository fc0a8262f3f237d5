"""What the ranks of tests/test_frameworks.py run under torchrun: each framework, with its one line more."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import terncomm

SAMPLES, BATCH = 64, 4


class Data(TensorDataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(SAMPLES, 32, generator=generator)
        super().__init__(inputs, inputs[:, :4].argmax(dim=1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))


def told(state, model):
    """What the hook has done, and whether all ranks hold the same weights."""
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    rows = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, weights)
    return {**state.stats(), "step": state.step, "same": all(torch.equal(row, rows[0]) for row in rows)}


def lightning(folder):
    import lightning.pytorch as pl

    from terncomm.lightning import CompressGradients

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(epochs, checkpoint=None):
        compress = CompressGradients("int8", exempt=(), jsonl=folder / "steps")
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_epochs=epochs, accumulate_grad_batches=2,
            callbacks=[compress], logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=folder,
        )  # fmt: skip
        module = Module()
        trainer.fit(module, DataLoader(Data(), batch_size=BATCH), ckpt_path=checkpoint)
        return trainer, compress, module

    def again(trainer, module):
        trainer.fit_loop.max_epochs += 1
        trainer.fit(module, DataLoader(Data(), batch_size=BATCH))

    trainer, compress, module = fit(2)
    found = told(compress.state, module)
    trainer.save_checkpoint(folder / "checkpoint")
    dist.barrier()
    trainer, resumed, module = fit(3, folder / "checkpoint")
    found["resumed"] = resumed.state.step
    again(trainer, module)
    return {**found, "again": resumed.state.step}


def fabric(folder):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    plain = network()
    model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    state = terncomm.register(model, "int8", exempt=())
    for step, (inputs, labels) in enumerate(fabric.setup_dataloaders(DataLoader(Data(), batch_size=BATCH))):
        with fabric.no_backward_sync(model, enabled=step % 2 == 0):
            fabric.backward(nn.functional.cross_entropy(model(inputs), labels))
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    return told(state, model)


def accelerate(folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(plain, optimizer, DataLoader(Data(), batch_size=BATCH))
    state = terncomm.register(model, "int8", exempt=())
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
    return told(state, model)


def trainer(folder):
    from transformers import Trainer, TrainingArguments

    from terncomm.transformers import CompressGradients

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, inputs, labels):
            return {"loss": nn.functional.cross_entropy(self.network(inputs), labels)}

    class Named(Data):
        def __getitem__(self, place):
            inputs, labels = super().__getitem__(place)
            return {"inputs": inputs, "labels": labels}

    def fit(steps, resume):
        arguments = TrainingArguments(
            output_dir=str(folder / "out"), per_device_train_batch_size=BATCH, max_steps=steps, use_cpu=True,
            gradient_accumulation_steps=2, save_steps=4, report_to=[], disable_tqdm=True, remove_unused_columns=False,
            ddp_backend="gloo", logging_steps=100,
        )  # fmt: skip
        model = Model()
        trainer = Trainer(model=model, args=arguments, train_dataset=Named())
        compress = CompressGradients(trainer, "int8", exempt=(), jsonl=folder / "steps")
        trainer.add_callback(compress)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, compress, model

    _, compress, model = fit(8, None)
    found = told(compress.state, model)
    trainer, resumed, _ = fit(10, str(folder / "out" / "checkpoint-4"))
    found["resumed"] = resumed.state.step
    trainer.args.max_steps = 12
    trainer.train(resume_from_checkpoint=False)  # from its first step, the model as it is
    return {**found, "again": resumed.state.step}


def main():
    torch.set_num_threads(1)
    folder, what = Path(sys.argv[1]), sys.argv[2]
    if not dist.is_initialized() and what in ("fabric", "lightning"):
        dist.init_process_group("gloo")
    found = {each.__name__: each for each in (lightning, fabric, accelerate, trainer)}[what](folder)
    (folder / str(dist.get_rank())).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
