"""The models behind the Open Inference Protocol: a bundle's policy and planner, without ledger and without orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from serving.bundle import Bundle
from serving.decide import Decisions, OnnxPlanner, OnnxPolicy
from serving.http.inference import (
    Array,
    TensorSpec,
    check_outputs,
    read_inference,
    write_inference,
)
from serving.http.limits import HttpLimits

POLICY, PLANNER = "policy", "planner"
PLATFORM = "onnxruntime_onnx"
Count = Callable[[str, int, int], None]
"""Told the model, the rows of an inference, and how many of them failed the last check."""
SHORT_VERSION = 12
"""Characters of a bundle's hash that name it too."""
DESCRIPTION = (
    "Stateless: nothing is recorded, neither drawdown ladder nor kill switch is asked, and no order comes of it. "
    "Decisions to trade on are made by /decide."
)


class BundleSource(Protocol):
    """Whoever has the bundles; the decision engine."""

    @property
    def bundle(self) -> Bundle:
        """In force."""
        ...

    @property
    def challenger(self) -> Bundle | None:
        """In shadow."""
        ...


class TensorMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """Name, type and shape of a tensor; -1 is any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelParameters(msgspec.Struct, frozen=True, kw_only=True):
    """What the protocol has no field for."""

    description: str
    stateless: bool
    optional_inputs: list[str]
    max_batch_size: int
    state_names: list[str]
    """Columns of `state`, raw units."""
    action_names: list[str]
    rule_set_hash: str


class ModelMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """A model as the protocol describes it."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: ModelParameters


class UnknownModelError(LookupError):
    """No such model or version; `str()` says which there are."""


class Model(NamedTuple):
    """One model of one bundle."""

    name: str
    bundle: Bundle
    decide: Callable[[Array, Array | None], Decisions]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int

    @property
    def version(self) -> str:
        """The bundle's hash."""
        return self.bundle.hash

    def infer(self, body: bytes, header_length: bytes | None, count: Count) -> tuple[bytes, int | None]:
        """Answer a request.

        Args: header_length: length of the JSON part in front of binary tensors, as a header says; count: told of it.
        Returns: body, and the length of its JSON part where binary tensors follow.
        Raises: InferenceRequestError.
        """
        request, arrays = read_inference(body, header_length, self.inputs, self.max_batch)
        check_outputs(request, self.outputs)
        decisions = self.decide(arrays["state"], arrays.get("caller_masks"))
        count(self.name, len(decisions), int(decisions.overridden.sum()))
        return write_inference(request, self.name, self.version, self.outputs, _arrays(decisions))


class Models:
    """The models of the bundle in force and of the challenger, by name and version."""

    def __init__(self, source: BundleSource, limits: HttpLimits) -> None:
        self._source, self._limits = source, limits
        self._made: dict[tuple[str, str], Model] = {}

    def find(self, name: str, version: str | None = None) -> Model:
        """A model. Args: version: a bundle's hash or its first characters; None is the bundle in force.

        Raises: UnknownModelError.
        """
        in_force = self._source.bundle
        if version is None and _offers(in_force, name):
            return self._model(name, in_force)
        bundles = {bundle.hash: bundle for bundle in self._bundles() if _offers(bundle, name)}
        if not bundles:
            raise UnknownModelError(f"model: expected one of {self.names}, was {name[:80]!r}")
        wanted = in_force.hash if version is None else version
        for digest, bundle in bundles.items():
            if wanted in (digest, digest[:SHORT_VERSION]):
                return self._model(name, bundle)
        raise UnknownModelError(f"version of {name!r}: expected one of {list(bundles)}, was {wanted[:80]!r}")

    @property
    def names(self) -> list[str]:
        """Models that some bundle has."""
        return [name for name in (POLICY, PLANNER) if any(_offers(bundle, name) for bundle in self._bundles())]

    def metadata(self, name: str, version: str | None = None) -> ModelMetadata:
        """A model described. Raises: UnknownModelError."""
        model = self.find(name, version)
        manifest = model.bundle.manifest
        versions = [bundle.hash for bundle in self._bundles() if _offers(bundle, name)]
        return ModelMetadata(
            name=name,
            versions=list(dict.fromkeys(versions)),
            platform=PLATFORM,
            inputs=_described(model.inputs),
            outputs=_described(model.outputs),
            parameters=ModelParameters(
                description=DESCRIPTION,
                stateless=True,
                optional_inputs=[spec.name for spec in model.inputs if spec.optional],
                max_batch_size=model.max_batch,
                state_names=list(manifest.state_names),
                action_names=list(manifest.actions.names),
                rule_set_hash=manifest.rule_set_hash,
            ),
        )

    def _bundles(self) -> Iterator[Bundle]:
        yield self._source.bundle
        challenger = self._source.challenger
        if challenger is not None:
            yield challenger

    # Sessions are heavy, what is made here is not: a bundle that is gone leaves with the next one that comes.
    def _model(self, name: str, bundle: Bundle) -> Model:
        model = self._made.get((name, bundle.hash))
        if model is None or model.bundle is not bundle:
            model = _make(name, bundle, self._limits)
            kept = {bundle.hash for bundle in self._bundles()}
            self._made = {key: old for key, old in self._made.items() if key[1] in kept} | {(name, bundle.hash): model}
        return model


def _make(name: str, bundle: Bundle, limits: HttpLimits) -> Model:
    num_columns, num_actions = len(bundle.manifest.state_names), len(bundle.manifest.actions.names)
    planner = name == PLANNER
    decider = OnnxPlanner(bundle) if planner else OnnxPolicy(bundle)
    outputs = [
        TensorSpec("action", "INT64"),
        TensorSpec("probabilities", "FP32", num_actions),
        TensorSpec("action_masks", "BOOL", num_actions),
        TensorSpec("value", "FP32"),
        TensorSpec("fallback", "BOOL"),
        TensorSpec("overridden", "BOOL"),
    ]
    return Model(
        name,
        bundle,
        decider.decide,
        (TensorSpec("state", "FP32", num_columns), TensorSpec("caller_masks", "BOOL", num_actions, optional=True)),
        (*outputs, *([TensorSpec("planned", "BOOL")] if planner else [])),
        limits.max_planner_batch if planner else limits.max_batch,
    )


def _offers(bundle: Bundle, name: str) -> bool:
    return name == POLICY or (name == PLANNER and bundle.planner_session is not None)


def _described(specs: tuple[TensorSpec, ...]) -> list[TensorMetadata]:
    return [TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape) for spec in specs]


def _arrays(decisions: Decisions) -> Mapping[str, Array]:
    return {
        "action": np.asarray(decisions.actions),
        "probabilities": decisions.probabilities,
        "action_masks": decisions.action_masks,
        "value": decisions.value,
        "fallback": decisions.fallback,
        "overridden": decisions.overridden,
        "planned": decisions.planned,
    }
