"""The form of a graph that NVIDIA's compiler makes the cheapest engine of: candidates are compiled, the best is kept.

The passes choose by what is known of compilers in general. Here every form in `FORMS` is really written, cast to FP16
and compiled by TensorRT for RTX, which needs no GPU; the list of its layers says how many kernels each would launch,
and how many bytes they move. The cheapest is kept; of several, the first.

It is a count, not a time. The same file, compiler and settings give the same choice, unless `TuneOptions.seconds` ends
the search: what was not tried is said. What was found of a graph is kept in the user's cache, by its content.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_cache_path

from deploycli.exporters.bundle.engine import KernelTotals
from deploycli.exporters.bundle.files import temporary_folder, write_whole
from deploycli.exporters.bundle.manifest import version_of
from deploycli.exporters.graph.lowerings import LAUNCH
from deploycli.exporters.graph.onnx_file import without_initializers, write_model
from deploycli.exporters.passes.pipeline import for_attention
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.settings import BuildSettings, ShapeRange
from deploycli.exporters.target.targets import Capability  # msgspec reads the annotation
from deploycli.exporters.tensorrt import library
from deploycli.exporters.tensorrt.traffic import compiled
from deploycli.models.codec import load
from deploycli.models.errors import BuildError, DeployError, IntegrityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnx_ir as ir

    from deploycli.exporters.passes.pipeline import Attention

BATCH = 8
"""Images of a run, where the graph takes any number."""


@dataclass(frozen=True)
class Form:
    """One way to rewrite a graph.

    Attributes:
        name: what it is called.
        without: passes that are left out.
        attention: the form of scores.
    """

    name: str
    without: frozenset[str] = frozenset()
    attention: Attention = "4d"

    @property
    def passes(self) -> tuple[frozenset[str], frozenset[str]]:
        """The passes to leave out, and those to run that are off by default."""
        without, also = for_attention(self.attention)
        return without | self.without, also


FORMS = (
    Form("default"),
    Form("scores in five dimensions", attention="5d"),
    Form("batch first", frozenset({"tokens-first", "fold-bias"})),
    Form("norms on queries and keys", frozenset({"norms-into-scores"})),
    Form("all tokens to the end", frozenset({"hoist-selections"})),
    Form("tokens in the order of the image", frozenset({"commute-permutations"})),
    Form("rows in the shape of the image", frozenset({"shape-rows"})),
    Form("projections apart", frozenset({"merge-projections", "tokens-first", "fold-bias"})),
)
"""What is tried, in this order."""


@dataclass(frozen=True)
class TuneOptions:
    """How to search.

    Attributes:
        targets: compute capabilities to compile for.
        seconds: after which nothing more is begun.
        batch: images of a run.
    """

    targets: tuple[Capability, ...] = ((8, 9),)
    seconds: float = 300
    batch: int = BATCH


@dataclass(frozen=True)
class Tried:
    """What became of a form.

    Attributes:
        form: its name.
        launches: kernels that one run launches, or None where there is no engine.
        moved: bytes of activations that they read and write for one image.
        attention: how many of them are fused attention.
        remark: why there is no engine, or of which form the graph is, too.
    """

    form: str
    launches: int | None = None
    moved: int | None = None
    attention: int = 0
    remark: str = ""

    def cost(self, batch: int) -> float:
        """Return what a run costs, in bytes: a launch takes as long as moving some."""
        return float("inf") if self.launches is None else self.launches * LAUNCH + (self.moved or 0) * batch


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    Attributes:
        best: name of the form that is kept.
        tried: all forms that were looked at, in the order of `FORMS`.
        left: names of those for which there was no time.
        compiler: version of TensorRT for RTX.
        targets: the compute capabilities.
        batch: images of a run.
    """

    best: str
    tried: tuple[Tried, ...]
    left: tuple[str, ...]
    compiler: str
    targets: tuple[Capability, ...]
    batch: int

    @property
    def form(self) -> Form:
        """The form that is kept."""
        return next(form for form in FORMS if form.name == self.best)

    @property
    def summary(self) -> str:
        """One line for a record."""
        figures = {one.form: one for one in self.tried}
        kept, default = figures[self.best], figures[FORMS[0].name]
        text = f"kept {self.best!r} of {len(self.tried)} forms: {_figures(kept)}"
        return text if kept is default else f"{text}; the default {_figures(default)}"


def _figures(one: Tried) -> str:
    return one.remark if one.launches is None else f"{one.launches} launches, {(one.moved or 0) / 1e6:.1f} MB an image"


def refuse_other_forms(options: TuneOptions | None, attention: Attention, *, rewrite: bool = True) -> None:
    """Refuse a search together with one form that it would not keep.

    Raises:
        UsageError: both were asked for.
    """
    other = "--no-rewrite" if not rewrite else f"--attention {attention}" if attention != FORMS[0].attention else ""
    if options is not None and other:
        raise UsageError(f"both --tune and {other} were given", expected="one of the two", hint=f"leave out {other}")


def tune(
    model: ir.Model,
    options: TuneOptions,
    rewritten: Callable[[ir.Model, Form], ir.Model],
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Tuning:
    """Compile a graph in every form; return which is the cheapest.

    Args:
        model: the graph before any pass; it stays as it is.
        options: how to search.
        rewritten: rewrites a copy of it into a form, with names for all nodes.
        progress: is told what runs.

    Raises:
        EnvironmentUnsuitable: TensorRT for RTX is not installed.
        UsageError: an input has an axis that is no batch and is not known.
        BuildError: no form could be compiled.
    """
    compiler, settings = library.version(RTX), settings_of(model, options.batch)
    cache = _cache(model, options, compiler)
    if (tuning := _kept(cache)) is not None:
        return tuning
    end = time.monotonic() + options.seconds
    tried: list[Tried] = []
    known: dict[tuple[bytes, bytes], Tried] = {}
    left = [form.name for form in FORMS]
    for number, form in enumerate(FORMS, 1):
        if tried and time.monotonic() > end:
            break
        progress(f"compiling form {number} of {len(FORMS)}: {form.name}")
        left.remove(form.name)
        candidate = rewritten(model.clone(), form)
        key = without_initializers(candidate)
        found = known.get(key)
        if found is None:
            found = known[key] = _compiled(candidate, form, settings, options)
            tried.append(found)
        else:
            tried.append(replace(found, form=form.name, remark=found.remark or f"the same graph as {found.form!r}"))
    best = min(tried, key=lambda one: one.cost(options.batch))
    if best.launches is None:
        raise BuildError(
            f"no form of the graph could be compiled: {tried[0].remark}",
            expected="a graph that TensorRT for RTX takes",
            hint="leave out --tune, and see `deploycli lint`",
        )
    tuning = Tuning(best.form, tuple(tried), tuple(left), compiler, options.targets, options.batch)
    if not left:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cache, json.dumps(asdict(tuning), indent=1).encode())
    return tuning


def _kept(cache: Path) -> Tuning | None:
    """Return what was found before; a file that is damaged is as good as none."""
    try:
        tuning = load(cache, Tuning, what="a tuning") if cache.is_file() else None
    except IntegrityError:
        return None
    is_known = tuning is not None and tuning.best in {one.form for one in tuning.tried} & {form.name for form in FORMS}
    return tuning if is_known else None


def _compiled(model: ir.Model, form: Form, settings: BuildSettings, options: TuneOptions) -> Tried:
    """Cast a graph, compile it, and count its kernels."""
    with temporary_folder() as folder:
        path = Path(folder) / "model.onnx"
        try:
            cast(model, Policy(REDUCED_TYPES["fp16"]))
            write_model(model, path)
            reading = compiled(path, settings, Path(folder) / "work", options.targets)
        except DeployError as error:
            return Tried(form.name, remark=str(error).partition("\n")[0])
    totals = KernelTotals.of(reading.kernels)
    return Tried(form.name, totals.launches, totals.moved, totals.attention)


def settings_of(model: ir.Model, batch: int) -> BuildSettings:
    """Return settings for one batch: the first axis of every input that has no number.

    Raises:
        UsageError: another axis has none.
    """
    profile: dict[str, ShapeRange] = {}
    for value in model.graph.inputs:
        dims = [] if value.shape is None else list(value.shape)
        sizes = tuple(batch if i == 0 and not isinstance(dim, int) else dim for i, dim in enumerate(dims))
        if value.shape is None or not all(isinstance(dim, int) for dim in sizes):
            raise UsageError(
                f"input {value.name} has an axis that is no batch, and no number",
                expected="numbers for all axes but the first",
                hint="leave out --tune",
            )
        fixed = tuple(int(dim) for dim in sizes if isinstance(dim, int))
        profile[value.name or ""] = ShapeRange(fixed, fixed, fixed)
    return BuildSettings(profile)


def _cache(model: ir.Model, options: TuneOptions, compiler: str) -> Path:
    """Return the file in which the result for this graph, these forms and this compiler is kept."""
    digest = hashlib.sha256()
    for part in without_initializers(model):
        digest.update(part)
    for name, value in sorted(model.graph.initializers.items()):
        digest.update(name.encode())
        digest.update(b"" if value.const_value is None else value.const_value.tobytes())
    said: Mapping[str, object] = {
        "forms": [(form.name, sorted(form.without), form.attention) for form in FORMS],
        "targets": options.targets,
        "batch": options.batch,
        "compiler": compiler,
        "tool": version_of("deploycli"),
    }
    digest.update(json.dumps(said, sort_keys=True).encode())
    return user_cache_path("deploycli") / "tune" / f"{digest.hexdigest()}.json"
