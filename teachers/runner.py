"""A frozen teacher at full speed: folded, channels-last, in bf16 where that is native, in batches that fit."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ensemble_kd import distributed
from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log
from ensemble_kd.errors import ModelError
from ensemble_kd.features import FeatureTap, head_of
from ensemble_kd.inference import batch_for

_PROBE = 8
_FOLDING_ERROR = 1e-3
"""The largest relative change of a logit that folding may make."""


@dataclass(frozen=True)
class Running:
    """How teachers are run for targets."""

    batch: int | None = None
    """Images at a time; None chooses by the input's size. Halved where the memory does not suffice."""
    precision: str = "auto"
    """`float32`, `bfloat16`, or `auto`: bfloat16 where the device computes in it natively."""

    def dtype(self, device: torch.device) -> torch.dtype:
        """The type that the network computes in on that device."""
        if self.precision == "auto":
            return torch.bfloat16 if _native_bfloat16(device) else torch.float32
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


class Answers(NamedTuple):
    """What a network itself says to B images: logits (B, C), features (B, D) if wanted; float32."""

    logits: Tensor
    features: Tensor | None = None


class Runner:
    """A network set up for inference alone; the numbers of the classifier it is made from stay as they are."""

    def __init__(
        self,
        classifier: Classifier,
        label: str,
        device: torch.device,
        running: Running,
        *,
        own_code: bool,
        together: bool = False,
    ) -> None:
        """With `own_code` the network is run as it is, unfolded; `together` says that all processes run it."""
        self.device, self._dtype = device, running.dtype(device)
        self._net = (None if own_code else folded(classifier)) or classifier
        self._net = self._net.to(device)
        if device.type in ("cuda", "cpu") and not own_code:
            self._net.to(memory_format=torch.channels_last)
        self.is_folded = self._net is not classifier
        self._batch = running.batch or batch_for(classifier.card.preprocess.size, device)
        self._label, self._together = label, together
        self._tap: FeatureTap | None = None
        self._contexts: list[AbstractContextManager[object]] = []
        if self._dtype != torch.float32:
            head = _Float32Head(self._net, label, device)
            self._contexts = [torch.autocast(device.type, self._dtype), head]

    def __call__(self, pixels: Tensor, features: bool = False) -> Answers:
        """The answers to images (B, C, H, W), uint8 or float in [0, 1], on the runner's device."""
        if features and self._tap is None:
            self._tap = FeatureTap(self._net, self._label)
        if self._together:
            return self._all_at_once(pixels, features)
        while True:
            tried = min(self._batch, len(pixels))
            try:
                parts = [self._run(part, features) for part in pixels.split(self._batch)]
                break
            except RuntimeError as error:
                if tried <= 1 or not _is_lack_of_memory(error):
                    raise
            self._halve(tried)  # out here, as the error holds on to what was computed
        logits, kept = zip(*parts, strict=True)
        return Answers(torch.cat(logits), torch.cat(kept) if features else None)

    def _all_at_once(self, pixels: Tensor, features: bool) -> Answers:
        """Every process runs the network equally often: each time, all of them put its layers together."""
        parts = list(pixels.split(self._batch))
        missing = distributed.most(len(parts), pixels.device) - len(parts)
        ran = [self._run(part, features) for part in parts + [pixels[:1]] * missing]
        logits, kept = zip(*ran[: len(parts)], strict=True)
        return Answers(torch.cat(logits), torch.cat(kept) if features else None)

    @torch.inference_mode()
    def _run(self, pixels: Tensor, features: bool) -> tuple[Tensor, Tensor]:
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context)
            tap = stack.enter_context(self._tap) if features and self._tap else None
            logits = self._net(pixels).float()
            return logits, tap.take().float() if tap else logits

    def _halve(self, tried: int) -> None:
        self._batch = tried // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        text = "teacher %s: %d images at a time are too many, going on with %d"
        log.warning(text, self._label, tried, self._batch)


def _is_lack_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def folded(classifier: Classifier) -> Classifier | None:
    """A copy with each BatchNorm that follows a convolution folded into it; None where that cannot be had.

    By torch.fx, so that only networks whose forward pass is the same for all images are folded; the copy
    is held against the original on random images.
    """
    if not any(type(module) is nn.BatchNorm2d for module in classifier.net.modules()):
        return None
    pre, device = classifier.card.preprocess, next(classifier.parameters()).device
    try:
        net = fx.symbolic_trace(copy.deepcopy(classifier.net).eval())
        _fold(net)
    except Exception as error:  # neither can every network be traced nor every layer folded; many kinds
        log.debug("batch normalisation is not folded: %s", error)
        return None
    copied = Classifier(net, classifier.card).freeze().to(device)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(0, 256, (_PROBE, pre.channels, *pre.size), dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        wanted, got = (one(probe.to(device)).float() for one in (classifier, copied))
    apart = float((wanted - got).abs().amax() / wanted.abs().amax().clamp_min(1e-6))
    return copied if apart <= _FOLDING_ERROR else None


def _fold(net: fx.GraphModule) -> None:
    """Fold in place, where nothing else reads what the convolution gives."""
    modules = dict(net.named_modules())
    calls = Counter(node.target for node in net.graph.nodes if node.op == "call_module")
    for node in list(net.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv, norm = modules[str(before.target)], modules[str(node.target)]
        once = calls[before.target] == calls[node.target] == 1
        if once and isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d:
            net.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            net.graph.erase_node(node)
    net.delete_all_unused_submodules()
    net.recompile()


class _Float32Head:
    """While entered, the last layer runs outside of autocast: its rounding to bf16 would be seen in targets."""

    def __init__(self, net: Classifier, label: str, device: torch.device) -> None:
        self._kind, self._hooks = device.type, ExitStack()
        try:
            self._head: nn.Module | None = head_of(net, label)
        except ModelError:  # a network of another kind: all of it runs in bf16
            self._head = None

    def __enter__(self) -> None:
        if self._head is not None:
            for hook in (
                self._head.register_forward_pre_hook(self._before),
                self._head.register_forward_hook(self._after),
            ):
                self._hooks.callback(hook.remove)

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        torch.set_autocast_enabled(self._kind, False)
        return tuple(x.float() for x in inputs)

    def _after(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        torch.set_autocast_enabled(self._kind, True)


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported())
