"""Build a TensorRT engine from ONNX: strongly typed, so precision is what the file says."""

from __future__ import annotations

from pathlib import Path

from deploykit import _files, gpu, store
from deploykit._tensorrt import DISTRIBUTIONS
from deploykit.dataset import Dataset
from deploykit.errors import InputError
from deploykit.formats import onnx_file
from deploykit.stages.build import child, flavour
from deploykit.stages.build.child import Talk
from deploykit.stages.build.exchange import Request
from deploykit.stages.build.flavour import INSTALL, unavailable
from deploykit.stages.build.options import BuildOptions
from deploykit.stages.build.profiles import shape_profiles
from deploykit.store import Job, Made
from deploykit.values import Artifact

__all__ = ["INSTALL", "BuildOptions", "build", "shape_profiles", "unavailable"]

LIBRARIES = (*DISTRIBUTIONS.values(), "onnx")


def build(
    source: Artifact,
    options: BuildOptions,
    *,
    out: Path,
    data: Dataset | None = None,
    force: bool = False,
    talk: Talk | None = None,
) -> Artifact:
    """Parse an ONNX model and build a serialized engine, in a process of its own.

    With `data` the optimization profile spans its real shapes. `talk` hears how far it is.

    Raises InputError: no ONNX model. MissingError: the flavour is not installed, or lacks a GPU
    that it needs. UsageError: a dynamic input without shapes, a shape that does not fit, or
    something that the flavour has not. StageError: the parser or the builder refuses the model.
    ResourceError: memory ran out. AnswerIsNo: the work is not in the precision that was asked.
    """
    if source.format != "onnx":
        raise InputError(
            f"{source.path} is {source.format}, build takes an ONNX model", hint="export it first"
        )
    name = flavour.chosen(options)
    flavour.check(name, options)
    plugins = {f"plugin {Path(p).name}": _plugin_digest(Path(p)) for p in options.plugins}
    profiles = shape_profiles(source.inputs, options, data)
    device = gpu.probe()

    def work(path: Path) -> Made:
        onnx_file.read(source.path)
        request = Request(
            onnx=source.path.absolute(),
            plan=path.absolute(),
            module="tensorrt" if name == "tensorrt" else "tensorrt_rtx",
            precision=options.precision or source.precision,
            options=options,
            profiles=profiles,
        )
        return Made(
            format="engine",
            precision=source.precision,
            inputs=source.inputs,
            outputs=source.outputs,
            facts=child.run(request, talk),
        )

    others = {**plugins, **({"shapes": data.digest} if data else {})}
    if name == "tensorrt" and isinstance(device, gpu.Gpu):
        others["gpu"] = f"{device.name} {device.compute_capability}"
    job = Job(stage="build", source=source, options=options, others=others, libraries=LIBRARIES)
    return store.produce(job, work, out=out, force=force)


def _plugin_digest(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: no such plugin library", hint="give the path of a .so file")
    return _files.sha256(path)
