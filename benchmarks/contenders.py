"""Who learns in learning.py: a setting by its name, and how its model and its optimizer are made.

Must not know: data. Invariants: weights, state and arithmetic are fp32 for all but "adamw-bf16", whose weights are
rounded to bf16 after every step, and "factored-bf16"; every contender is given the same gradients' mean over trained
tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from update_rules import Adam, Apollo, Rule, RuleOptimizer, Sgd

from worker.apollo import ApolloMini

RULES: dict[str, tuple[str, Rule]] = {
    "adamw": ("AdamW, fp32", Adam()),
    "sgd": ("SGD", Sgd()),
    "mini-plain": ("APOLLO-Mini, plain torch", Apollo()),
    "mini-free": ("Mini without its limiter", Apollo(gamma=float("inf"))),
    "mini-exact": ("Mini, s = |N| / |G|", Apollo(exact=True)),
    "mini-exact-free": ("Mini, s = |N| / |G|, no limiter", Apollo(exact=True, gamma=float("inf"))),
    "mini-16": ("Mini with rank 16, one scale a matrix", Apollo(rank=16)),
    "mini-signed": ("Mini, momentum along R", Apollo(rank=16, signed=True)),
    "apollo-1": ("APOLLO rank 1", Apollo(rank=1, channels=True)),
    "apollo-16": ("APOLLO rank 16", Apollo(rank=16, channels=True)),
    "apollo-64": ("APOLLO rank 64", Apollo(rank=64, channels=True)),
    "apollo-16-signed": ("APOLLO rank 16, momentum along R", Apollo(rank=16, channels=True, signed=True)),
    "matrix": ("G over one RMS a matrix", Adam(beta1=0, second="matrix")),
    "matrix-momentum": ("momentum over one RMS a matrix", Adam(second="matrix")),
    "channel": ("G over one RMS a channel", Adam(beta1=0, second="channel")),
    "factored": ("G over row and column RMS", Adam(beta1=0, second="factored")),
    "factored-free": ("G over row and column RMS, U of any length", Adam(beta1=0, second="factored", clip=False)),
    "factored-momentum": ("momentum over row and column RMS", Adam(second="factored")),
    "element": ("G over RMS an element (AdamW, b1 = 0)", Adam(beta1=0)),
}
"""Name -> (label, rule): those that are `update_rules` over all parameters."""
LABELS = {name: label for name, (label, _) in RULES.items()} | {
    "mini": "APOLLO-Mini (worker/apollo)",
    "factored-worker": "G over row and column RMS (worker/apollo)",
    "factored-bf16": "G over row and column RMS (worker/apollo, bf16)",
    "adamw-bf16": "AdamW, bf16 weights",
    "lora": "LoRA r 16 (AdamW)",
}
FROZEN = {"": (), "embeddings": ("embed_tokens", "lm_head"), "attention": ("self_attn",), "mlp": (".mlp.",)}
"""What `Setting.freeze` may name -> parts of the parameters' names."""


@dataclass(frozen=True)
class Setting:
    """One contender at one learning rate and seed."""

    method: str
    lr: float
    seed: int = 0
    batch: int = 20
    """Conversations a version."""
    warmup: int = 0
    """Versions over which lr rises linearly."""
    freeze: str = ""
    pull: float = 0.0
    """After each step W -= pull * (W - source weights)."""
    rehearse: int = 0
    """Other answers trained with each version, none of them scored."""

    @staticmethod
    def parse(text: str) -> "Setting":
        """Of a name such as `key` gives: "mini lr=1e-05 pull=0.1". Ends the script for what is no setting."""
        method, *parts = text.split()
        kinds = {"lr": float, "seed": int, "batch": int, "warmup": int, "freeze": str, "pull": float, "rehearse": int}
        try:
            given: dict[str, Any] = {k: kinds[k](v) for k, v in (part.split("=") for part in parts)}
            setting = Setting(method, **given)
        except (KeyError, TypeError, ValueError):
            raise SystemExit(f"error: {text!r}: a setting is METHOD lr=NUMBER and any of {', '.join(kinds)}") from None
        if method not in LABELS or setting.freeze not in FROZEN:
            raise SystemExit(f"error: {text!r}: methods are {', '.join(LABELS)}; freeze is {', '.join(FROZEN)[2:]}")
        return setting

    @property
    def key(self) -> str:
        """Names its results: what differs from the default, in words."""
        kept = {name: value for name, value in asdict(self).items() if value or name in ("lr", "seed")}
        return " ".join(str(v) if k == "method" else f"{k}={v:g}" if k != "freeze" else f"freeze={v}"
                        for k, v in kept.items() if k != "batch" or v != 20)  # fmt: skip

    @property
    def label(self) -> str:
        """The key without its seed: what a curve is called."""
        text = " ".join(part for part in self.key.split() if not part.startswith("seed="))
        return text.replace(self.method, LABELS[self.method], 1).replace("lr=", "lr ")


class Contender(Protocol):
    def step(self, lr: float) -> None:
        """One step with the gradients that are there; they are dropped."""


class Own:
    """`worker.apollo.ApolloMini` with its defaults, as `worker.trainer` makes it. matrices: its argument."""

    def __init__(self, named: Iterable[tuple[str, torch.nn.Parameter]], seed: int, matrices: str) -> None:
        self._optimizer = ApolloMini(sorted(named), lr=1.0, seed=seed, matrices=matrices)

    def step(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class OwnBf16:
    """The same over bf16 weights, stochastically rounded, from bf16 gradients, as they are in a server's memory. The
    model computes with the same numbers in fp32."""

    def __init__(self, named: Iterable[tuple[str, torch.nn.Parameter]], seed: int, matrices: str) -> None:
        self._parameters = [parameter for _, parameter in sorted(named)]
        self._kept = [torch.nn.Parameter(p.detach().bfloat16()) for p in self._parameters]
        names = [name for name, _ in sorted(named)]
        self._inner = Own(zip(names, self._kept, strict=True), seed, matrices)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            assert parameter.grad is not None
            kept.grad, parameter.grad = parameter.grad.bfloat16(), None
        self._inner.step(lr)
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            parameter.copy_(kept)


class Rounded:
    """`inner`, and after each of its steps every weight rounded to the nearest bf16 number."""

    def __init__(self, inner: Contender, parameters: list[torch.nn.Parameter]) -> None:
        self._inner, self._parameters = inner, parameters

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self._inner.step(lr)
        for parameter in self._parameters:
            parameter.copy_(parameter.bfloat16())


class Pulled:
    """`inner`, and after each of its steps W -= pull * (W - source)."""

    def __init__(self, inner: Contender, pairs: list[tuple[torch.nn.Parameter, torch.Tensor]], pull: float) -> None:
        self._inner, self._pairs, self._pull = inner, pairs, pull

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self._inner.step(lr)
        for parameter, source in self._pairs:
            parameter.lerp_(source, self._pull)


def load_model(folder: Path, device: torch.device) -> Any:
    """transformers' model of `folder` in fp32. Ends the script for one that has layers other than attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kinds = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "layer_types", None) or ()
    if any("linear" in kind or "attention" not in kind for kind in kinds):
        raise SystemExit(f"error: {folder} has recurrent layers: this benchmark packs rows for attention alone")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.to(device).eval()


def make(setting: Setting, model: Any, sources: dict[str, torch.Tensor]) -> Contender:
    """The contender over `model`, whose weights are `sources`; LoRA adds its adapters to the model in place."""
    if setting.method == "lora":
        return RuleOptimizer(_with_adapters(model, setting.seed), Adam(), seed=setting.seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in FROZEN[setting.freeze]))
    named = list(model.named_parameters())
    contender: Contender
    if setting.method == "mini":
        contender = Own(named, setting.seed, "apollo")
    elif setting.method == "factored-worker":
        contender = Own(named, setting.seed, "factored")
    elif setting.method == "factored-bf16":
        contender = OwnBf16(named, setting.seed, "factored")
    elif setting.method == "adamw-bf16":
        contender = Rounded(RuleOptimizer(named, Adam(), seed=0), [parameter for _, parameter in named])
    else:
        contender = RuleOptimizer(named, RULES[setting.method][1], seed=setting.seed)
    if setting.pull:
        contender = Pulled(contender, [(parameter, sources[name]) for name, parameter in named], setting.pull)
    return contender


def _with_adapters(model: Any, seed: int) -> list[tuple[str, torch.nn.Parameter]]:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise SystemExit("error: the contender lora needs peft: pip install -e '.[bench]'") from None
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"), model)
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def changes(model: Any, sources: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameter name -> W - source, LoRA's adapters multiplied out; what has not changed is left out."""
    if any(hasattr(module, "get_delta_weight") for module in model.modules()):
        return {f"{name}.weight": module.get_delta_weight("default").detach() for name, module in model.named_modules()
                if hasattr(module, "get_delta_weight")}  # fmt: skip
    return {name: parameter.detach() - sources[name] for name, parameter in model.named_parameters()
            if parameter.requires_grad}  # fmt: skip


StepSize = Callable[[int], float]


def rate(setting: Setting) -> StepSize:
    """Version (1 for the first) -> its learning rate."""
    return lambda version: setting.lr * min(1.0, version / setting.warmup if setting.warmup else 1.0)
