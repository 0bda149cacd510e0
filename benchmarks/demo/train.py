"""One training run, with the time of its attention measured inside the step."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .model import Attention, AttentionFunction, Encoder
from .text import Corpus, MaskedBatch, masked_batches

BATCH_SIZE = 1
LEARNING_RATE = 3e-3
VALIDATION_BATCHES = 16


@dataclass(frozen=True)
class Settings:
    """What both runs share."""

    steps: int
    length: int
    seed: int


@dataclass
class Run:
    """What one run left behind; losses in nats per masked byte, times in seconds, one entry per step."""

    name: str
    model: Encoder
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    attention_seconds: list[float] = field(default_factory=list)
    validation_loss: float = float("nan")

    @property
    def last_loss(self) -> float:
        """Mean training loss of the last tenth of the steps (one batch alone is noisy)."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps."""
        return median(self.step_seconds)

    @property
    def attention_seconds_per_step(self) -> float:
        """Median over the steps of the time inside attention, forward and backward, all layers."""
        return median(self.attention_seconds)


class AttentionClock:
    """Adds up the wall time that a model spends inside its attention calls, forward and backward.

    Module hooks read the clock in the training step itself; nothing is run twice. Forward: from the call to its return.
    Backward: from the moment the gradient of the attention output is complete to the moment the gradients of query,
    key and value are. On the CPU, autograd runs one node after the other on the calling thread, and between these two
    moments only the backward of the attention function is ready to run. The projections before and after
    attention are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seconds = 0.0
        for module in model.modules():
            if isinstance(module, Attention):
                module.register_forward_pre_hook(self._start)
                module.register_forward_hook(self._stop)
                module.register_full_backward_pre_hook(self._start)
                module.register_full_backward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self.seconds -= perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += perf_counter()


def train(name: str, function: AttentionFunction, corpus: Corpus, settings: Settings) -> Run:
    """Train an encoder that attends with `function`; everything else follows from the settings.

    The initial weights, the batches and the masks depend on the seed alone, so two runs differ in `function` only.
    """
    torch.manual_seed(settings.seed)
    run = Run(name, Encoder(function, settings.length))
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        LEARNING_RATE,
        total_steps=settings.steps,
        pct_start=0.1,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    clock = AttentionClock(run.model)
    batches = masked_batches(
        corpus.train, length=settings.length, batch_size=BATCH_SIZE, count=settings.steps, seed=settings.seed
    )
    with tqdm(batches, desc=f"{name:>10}", total=settings.steps, unit="step", dynamic_ncols=True) as progress:
        for batch in progress:
            clock.seconds = 0.0
            start = perf_counter()
            loss = training_step(run.model, optimizer, batch)
            schedule.step()
            run.step_seconds.append(perf_counter() - start)
            run.attention_seconds.append(clock.seconds)
            run.losses.append(loss)
            progress.set_postfix(loss=f"{run.last_loss:.3f}")
    run.validation_loss = validation_loss(run.model, corpus, settings)
    return run


def training_step(model: Encoder, optimizer: torch.optim.Optimizer, batch: MaskedBatch) -> float:
    """Forward, backward and update; return the loss before the update."""
    optimizer.zero_grad()
    loss = masked_loss(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    return loss.item()


def masked_loss(model: Encoder, batch: MaskedBatch) -> Tensor:
    """Mean cross entropy, in nats, of the hidden bytes."""
    return cross_entropy(model(batch.inputs, batch.masked), batch.targets[batch.masked])


@torch.no_grad()
def validation_loss(model: Encoder, corpus: Corpus, settings: Settings) -> float:
    """Mean loss over masked windows of the files kept back; the same windows for every model and every seed."""
    batches = validation_batches(corpus, settings)
    return sum(masked_loss(model, batch).item() for batch in batches) / len(batches)


def validation_batches(corpus: Corpus, settings: Settings) -> list[MaskedBatch]:
    """Return the windows that `validation_loss` uses."""
    return list(
        masked_batches(corpus.validation, length=settings.length, batch_size=1, count=VALIDATION_BATCHES, seed=0)
    )
