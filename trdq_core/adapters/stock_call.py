"""A pipeline's own `__call__` as something to be asked: what it takes, how it encodes prompts, and running it in parts.

Sampling always runs the stock `__call__`. What it does before and after its loop is run by it as well, with the denoiser or
the scheduler answering at once, so no family needs code of its own for latents, packing or decoding.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from trdq_core.errors import ModelError


class EncodeCall(NamedTuple):
    """One call of `encode_prompt` in a pipeline's `__call__`: the names it assigns to, and its keyword arguments."""

    targets: tuple[str, ...]
    arguments: Mapping[str, ast.expr]


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function by name, `self` left out."""
    found = dict(inspect.signature(function).parameters)
    found.pop("self", None)
    return found


def encode_calls(pipeline: DiffusionPipeline) -> list[EncodeCall]:
    """The calls of `encode_prompt` that the pipeline's own `__call__` makes, in order; ModelError if it makes none."""
    kind = type(pipeline)
    encode = getattr(kind, "encode_prompt", None)
    found: list[EncodeCall] = []
    if encode is not None:
        names = list(parameters_of(encode))
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.__call__))))
        for node in ast.walk(tree):
            call = node.value if isinstance(node, ast.Assign) else None
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "self.encode_prompt":
                arguments = dict(zip(names, call.args, strict=False))
                arguments |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
                assert isinstance(node, ast.Assign)  # it has the value looked at above
                found.append(EncodeCall(_names(node.targets[0]), arguments))
    if not found:
        raise ModelError(
            f"pipeline {kind.__name__}: its call does not encode prompts with encode_prompt, so texts cannot be given to it; "
            "hand over embeddings with provide()."
        )
    return found


def _names(target: ast.expr) -> tuple[str, ...]:
    elements = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
    return tuple(element.id if isinstance(element, ast.Name) else "_" for element in elements)


def encode(pipeline: DiffusionPipeline, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the pipeline's `__call__` would hold after encoding: its names for embeddings and masks, both branches.

    `settings` go before the defaults of `__call__`: prompt, negative_prompt, device and so on.
    """
    taken = parameters_of(type(pipeline).__call__)
    known = {name: one.default for name, one in taken.items() if one.default is not inspect.Parameter.empty}
    known |= {"do_classifier_free_guidance": True, "do_true_cfg": True, "has_neg_prompt": True, **settings}
    held: dict[str, Any] = {}
    for call in encode_calls(pipeline):
        arguments = {name: _value(expression, known) for name, expression in call.arguments.items()}
        result = pipeline.encode_prompt(**{name: value for name, (value, known_) in arguments.items() if known_})
        results = result if isinstance(result, tuple) and len(call.targets) > 1 else (result,)
        held |= {name: value for name, value in zip(call.targets, results, strict=False) if name not in held}
    return {name: value for name, value in held.items() if name in taken and value is not None}


def _value(expression: ast.expr, known: Mapping[str, Any]) -> tuple[Any, bool]:
    """The value of an argument's expression, and whether it can be told without running the call."""
    if isinstance(expression, ast.Constant):
        return expression.value, True
    name = expression.attr if isinstance(expression, ast.Attribute) else getattr(expression, "id", None)
    return (known[name], True) if name in known else (None, False)


class Halt(Exception):
    """Everything wanted of this call of the pipeline has been seen."""


class Answer(tuple):
    """What a denoiser or a scheduler returns, read as a tuple or by name."""

    @property
    def sample(self) -> Any:
        """The prediction."""
        return self[0]

    @property
    def prev_sample(self) -> Any:
        """The latents after a step."""
        return self[0]


@contextmanager
def replaced(owner: object, name: str, value: Any) -> Iterator[Any]:
    """Let the attribute `name` of one object be `value` while the context is open; yields what it was."""
    own = vars(owner).get(name, _MISSING)
    before = getattr(owner, name)
    # Modules and configurations watch what is set on them; their dictionaries do not.
    vars(owner)[name] = value
    try:
        yield before
    finally:
        if own is _MISSING:
            del vars(owner)[name]
        else:
            vars(owner)[name] = own


_MISSING = object()


@contextmanager
def undisturbed(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Let the pipeline be called while a call of it is under way, which then finds guidance and scheduler as they were.

    Both keep the state of a call in themselves: the strength of the guidance, timesteps, past predictions.
    """
    before = dict(vars(pipeline))
    vars(pipeline)["scheduler"] = copy.deepcopy(pipeline.scheduler)
    try:
        yield
    finally:
        vars(pipeline).clear()
        vars(pipeline).update(before)


@contextmanager
def starting_from(pipeline: DiffusionPipeline, latents: Tensor) -> Iterator[None]:
    """Let the pipeline begin with `latents` as they are, whatever it would draw and however it would scale them."""
    if not hasattr(pipeline, "prepare_latents"):
        with _first_input(pipeline, latents):
            yield
        return

    def prepared(*args: Any, **kwargs: Any) -> Any:
        drawn = before(*args, **kwargs)
        return (latents, *drawn[1:]) if isinstance(drawn, tuple) else latents

    with replaced(pipeline, "prepare_latents", prepared) as before:
        yield


@contextmanager
def _first_input(pipeline: DiffusionPipeline, latents: Tensor) -> Iterator[None]:
    """The same for pipelines that draw latents in their call: their first input is exchanged on its way to the denoiser."""
    fresh = True

    def scaled(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal fresh
        first, fresh = fresh, False
        taken = torch.cat([latents] * (len(value) // len(latents))).to(value) if first else value
        return before(taken, *args, **kwargs)

    with replaced(pipeline.scheduler, "scale_model_input", scaled) as before:
        yield


@contextmanager
def silent_denoiser(denoiser: nn.Module, seen: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Let `denoiser` return zeros at once; `seen` is told the arguments of each call. Nothing is computed."""
    config = getattr(denoiser, "config", {})
    twice = config.get("out_channels") == 2 * (config.get("in_channels") or 0)  # a learned variance comes along

    def forward(*args: Any, **kwargs: Any) -> Answer:
        seen(args, kwargs)
        first = args[0] if args else kwargs[next(iter(parameters_of(type(denoiser).forward)))]
        if isinstance(first, (list, tuple)):
            return Answer(([torch.zeros_like(one) for one in first],))
        zeros = torch.zeros_like(first)
        return Answer((torch.cat([zeros, zeros], 1) if twice and zeros.dim() > 3 else zeros,))

    with replaced(denoiser, "forward", forward):
        yield
