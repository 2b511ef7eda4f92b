"""Network health (--health_interval): gradients, updates and activations per block, and plain warnings.

Checks are at iterations 0, 1, 4, 32, 256 and every --health_interval. A check runs the model, not
compiled and without dropout, on one or a few sequences of the batch that is trained on next. It changes no
weight, no gradient and no random state that training uses.

B batch, T tokens, C channels, nh heads, hs channels per head.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nanogpt.loss import IGNORE
from nanogpt.metrics import Log
from nanogpt.model import GPT, Block, CausalSelfAttention, Position
from nanogpt.optim import AdamW, Optimizer
from nanogpt.runtime import Machine

TOKENS = 64  # of the batch that a check reads, at least one sequence
SAMPLE = 1 << 16  # weights per parameter whose update is measured
WINDOW = 100  # steps over which clipping is counted
EARLY = 500  # iterations in which activations of healthy runs grow by a factor of at most 30 (measured)
GROWTH, GROWTH_IF_FAST, FAST = 100.0, 40.0, 0.04  # FAST: update / weight
DEAD = 0.9
ENTROPY = 0.02  # mean over heads; single heads of a healthy block can look at one token
CLIPPED, SETTLED = 0.9, 500  # iterations after the warmup in which healthy runs may clip every gradient
FAR = 4.0  # times --grad_clip; gradient norms of small healthy models stay at twice nanoGPT's (measured)


def watch(step: Callable[..., Any], run: Any, log: Log) -> Callable[..., Any]:
    """Return train.py's `step` with checks; unchanged if this process holds only a part of each weight."""
    if run.optimizer.layout.sharded:
        tqdm.write("health: not checked, because the weights are sharded; --parallel=ddp keeps them whole")
        return step
    return Watch(step, run, log)


class Watch:
    """A step function that takes train.py's step and, when due, checks the network before and after it."""

    def __init__(self, step: Callable[..., Any], run: Any, log: Log):
        """`run`: the train.Run of this process; `log` receives a row of event "health" per check."""
        self.step, self.run, self.log = step, run, log
        self.norms: deque[Tensor] = deque(maxlen=WINDOW)  # gradient norms before clipping
        self.first: dict[str, Any] = {}  # row of the first check
        self.told: set[str] = set()

    def due(self, iter_num: int) -> bool:
        interval = self.run.config.health_interval
        return iter_num % interval == 0 or (iter_num < interval and iter_num in (1, 4, 32, 256))

    def __call__(self, function: Any, optimizer: Optimizer, *others: Any) -> Any:
        """Take a step with the arguments of train.train_step."""
        run, iter_num, (*_, lr, clip) = self.run, self.run.progress.iter_num, others
        if not self.due(iter_num):
            result = self.step(function, optimizer, *others)
            self.norms.append(result[1].clone())  # a CUDA graph reuses its memory
            return result
        idx, targets, *_ = next(run.batches.step(iter_num))
        rows = max(1, TOKENS // idx.shape[1])
        row = examine(run.model, idx[:rows], targets[:rows], run.machine)
        before = [p.detach().flatten()[:SAMPLE].clone() for p in optimizer.parameters]
        result = self.step(function, optimizer, *others)
        self.norms.append(result[1].clone())
        row |= {"update": update_ratios(len(run.model.h), optimizer, before)}
        row["clipped"] = int((torch.stack(list(self.norms)) > clip).sum()) if clip else 0
        row["gain_decay"] = gain_decay(optimizer, before, lr)
        self.first = self.first or row
        notes = self.warnings(iter_num, row, clip)
        row["warnings"] = list(notes)
        self.log.write("health", iter_num, run.batches.tokens_before(iter_num + 1), **row)
        for kind in notes.keys() - self.told:
            tqdm.write(f"health: iteration {iter_num}: {notes[kind]}")
        self.told |= notes.keys()
        return result

    def warnings(self, iter_num: int, row: dict[str, Any], clip: float) -> dict[str, str]:
        """Return a sentence, by kind, for everything that is wrong in `row`."""
        config, vocab, notes = self.run.config, self.run.model.config.vocab_size, {}
        slower = "lower --learning_rate" + " and --muon_lr" * (config.optimizer == "muon")
        loss, uniform, norms = row["loss"], math.log(vocab), row["grad_norm"]
        from_scratch = config.init_from in ("scratch", "auto") and not self.run.resumed
        if self.first is row and iter_num == 0 and from_scratch and loss > uniform + 1:
            text = f"the first loss is {loss:.2f}, not {uniform:.2f} as for equal probabilities: the logits "
            notes["start"] = text + "start too large; a tied LM head needs small embeddings (--init=gpt2)"
        if loss > self.first["loss"] + max(0.5, 0.1 * self.first["loss"]):
            notes["rise"] = f"the loss rose from {self.first['loss']:.2f} to {loss:.2f}: {slower}"
        if row["copied"] > 0.9:
            text = f"{row['copied']:.0%} of the targets equal the token at their position"
            notes["targets"] = f"{text}: shift them"
        if row["leak"] > 1e-3:
            notes["mask"] = f"losses depend on later tokens (by {row['leak']:.2g}): the mask shows the future"
        if row["gain_decay"]:
            text = f"weight decay ({row['gain_decay']:.2g}) shrinks the norms' gains"
            notes["decay"] = f"{text}: decay matrices only"
        clipped, after = row["clipped"], config.warmup_iters * config.decay_lr + SETTLED
        far = len(self.norms) == WINDOW and torch.stack(list(self.norms)).median() > FAR * clip
        if far and iter_num >= after and clipped > CLIPPED * WINDOW:
            text = f"clipped in {clipped} of the last {WINDOW} steps"
            notes["clip"] = f"{text}: {slower} or raise --grad_clip={clip:g}"
        growth, update = row["activation"][-1] / self.first["activation"][-1], max(row["update"])
        if iter_num < EARLY and growth > (GROWTH_IF_FAST if update > FAST else GROWTH) and from_scratch:
            text = f"activations grew {growth:.0f}-fold, and a step changes a block by {update:.1%}"
            notes["growth"] = f"{text}: {slower}"
        partly = config.freeze or config.train_only or config.lora_rank
        for block, norm in enumerate(norms):
            if iter_num >= 2 and norm < 1e-4 * max(norms) and not partly:
                text = f"block {block} gets no gradient: its output is cut off, or it is frozen"
                notes[f"dead {block}"] = text
            if (dead := row["dead"][block]) > DEAD:
                text = f"{dead:.0%} of block {block}'s MLP units are off for all tokens"
                notes[f"off {block}"] = f"{text}: {slower}"
            if (spread := row["entropy"][block]) < ENTROPY:
                text = f"attention of block {block} has collapsed to single tokens (entropy {spread:.1%})"
                notes["entropy"] = f"{text}: {slower} or set --qk_norm=True"
        return notes


def examine(model: GPT, idx: Tensor, targets: Tensor, machine: Machine) -> dict[str, Any]:
    """Return the state of `model` on idx and targets, both (B, T): lists hold one value per block."""
    n_layer = len(model.h)
    stats: dict[str, list[Tensor]] = {"activation": [], "dead": [], "entropy": []}
    hidden: list[Tensor] = []
    function, was_training = machine.in_dtype(model), model.training
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def note(kind: str, value: Callable[..., Tensor]) -> Callable[..., None]:
        return lambda module, *given: stats[kind].append(value(module, *given))

    handles = [model.ln_f.register_forward_hook(lambda module, given, out: hidden.append(out.detach()))]
    for module in model.modules():
        if isinstance(module, Block):
            size = note("activation", lambda module, given, out: rms(out))
            handles.append(module.register_forward_hook(size))
            off = note("dead", lambda module, given: dead_fraction(given[0]))
            handles.append(module.mlp.c_proj.register_forward_pre_hook(off))
        elif isinstance(module, CausalSelfAttention):
            handles.append(module.register_forward_hook(note("entropy", attention_entropy)))
    model.eval()
    try:
        with torch.enable_grad():  # attention differs without
            loss = function(idx, targets)[1]
            grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        leak = future_leak(function, idx, targets, model.config.vocab_size)
        model.train(was_training)
    squares = [0.0] * n_layer
    for (name, _), grad in zip(named, grads, strict=True):
        if name.startswith("h.") and grad is not None:
            squares[int(name.split(".")[1])] += float(grad.float().square().sum())
    with torch.no_grad():
        logits = model.head(hidden[0][0, -16:].float())
    scored = targets != IGNORE
    shifted = float((idx[:, 1:] == targets[:, :-1])[scored[:, :-1]].float().mean())
    return {
        "loss": float(loss.detach()),
        "copied": float((idx == targets)[scored].float().mean()) if shifted < 0.9 else 0.0,
        "leak": leak,
        "logit_std": float(logits.std(dim=-1).mean()),
        "grad_norm": [math.sqrt(square) for square in squares],
        **{kind: torch.stack(values[:n_layer]).tolist() for kind, values in stats.items()},
    }


def future_leak(function: Callable[..., Any], idx: Tensor, targets: Tensor, vocab_size: int) -> float:
    """Return how much the losses of the first half of a sequence depend on the tokens of the second."""
    idx, targets = idx[:1, :32], targets[:1, :32]
    half = idx.shape[1] // 2
    other = torch.cat([idx[:, :half], (idx[:, half:] + 1) % vocab_size], dim=1)
    with torch.enable_grad():
        first, second = (function(ids, targets, None, "none")[1].detach()[:, :half] for ids in (idx, other))
    return float((first - second).abs().max()) if half else 0.0


def rms(x: Tensor) -> Tensor:
    return x.detach().float().square().mean().sqrt()


def dead_fraction(activations: Tensor) -> Tensor:
    """Return the fraction of hidden units that are off for every token of activations (B, T, units)."""
    peaks = activations.detach().flatten(0, -2).float().abs().amax(dim=0)
    return (peaks <= 1e-3 * peaks.max()).float().mean()


@torch.no_grad()
def attention_entropy(attn: CausalSelfAttention, given: tuple[Any, ...], out: Tensor) -> Tensor:
    """Return the entropy of attention in the first sequence, 1: uniform, 0: one token; mean over heads
    and the queries of the second half."""
    x: Tensor = given[0][:1]
    position: Position = given[1]
    T = x.shape[1]
    qk = attn.c_attn(x)[..., : sum(attn.qkv_widths[:2])].view(1, T, -1, attn.head_size).transpose(1, 2)
    q, k = position.rotate(attn.qk_norm(qk)).split(attn.qk_heads, dim=1)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q[:, :, T // 2 :] @ k.mT).float() * attn.head_size**-0.5
    bias = position.bias(T)
    if bias is None:
        bias = torch.full((1, T, T), -torch.inf, device=x.device).triu(1)
    scores += bias[:, T // 2 :]
    highest = torch.arange(T // 2 + 1, T + 1, device=x.device).log().clamp(min=1e-6)
    return (torch.special.entr(torch.softmax(scores, dim=-1)).sum(dim=-1) / highest).mean()


def update_ratios(n_layer: int, optimizer: Optimizer, before: list[Tensor]) -> list[float]:
    """Return, per block, the largest ratio of update norm to weight norm among the matrices AdamW trains.
    Muon's are left out, as its learning rate sets the norm of their updates; so are zeros (new adapters)."""
    rules = [rule for rule, _ in optimizer.rules if isinstance(rule, AdamW)]
    adam = [param.name for rule in rules for param in rule.partitioned]
    ratios = [0.0] * n_layer
    for (name, p), old in zip(optimizer.named, before, strict=True):
        if name.startswith("h.") and p.dim() >= 2 and name in adam and (norm := float(old.norm())):
            block, change = int(name.split(".")[1]), p.detach().flatten()[:SAMPLE] - old
            ratios[block] = max(ratios[block], float(change.norm()) / norm)
    return ratios


def gain_decay(optimizer: Optimizer, before: list[Tensor], lr: float) -> float:
    """Return the weight decay that the last update applied to the gains of the norms, 0 if there was none.

    It is derived from the part of the update that AdamW's state does not explain.
    """
    adam = next((rule for rule, _ in optimizer.rules if isinstance(rule, AdamW)), None)
    decays = []
    for (name, p), old in zip(optimizer.named, before, strict=True):
        if adam is None or p.dim() != 1 or "ln_" not in name or not name.endswith("weight"):
            continue
        average, square = adam.exp_avg[name].flatten()[:SAMPLE], adam.exp_avg_sq[name].flatten()[:SAMPLE]
        if average.shape != old.shape:  # this rank holds a part of the state
            continue
        steps, options = float(adam.steps), adam.config
        average, square = average / (1 - options.beta1**steps), square / (1 - options.beta2**steps)
        explained = old - lr * average / (square.sqrt() + 1e-8)
        decays.append((explained - p.detach().flatten()[:SAMPLE]) / (lr * old))
    if not decays:
        return 0.0
    decay = torch.cat(decays)
    return float(decay.median()) if (decay > 1e-3).float().mean() > 0.99 else 0.0
