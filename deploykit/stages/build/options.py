"""How to build."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from deploykit.values import Precision, Value

Flavour = Literal["auto", "tensorrt", "tensorrt-rtx"]
Compatibility = Literal["none", "ampere-plus", "same-compute-capability"]
Tiling = Literal["none", "fast", "moderate", "full"]


class BuildOptions(Value):
    """How to build; shapes are written as trtexec writes them, `name:1x3x224x224`.

    A name that is given again is for the next optimization profile.
    """

    flavour: Flavour = Field(
        default="auto", description="tensorrt or tensorrt-rtx; auto takes the one installed"
    )
    min_shapes: tuple[str, ...] = Field(default=(), description="smallest shapes, name:1x3x224x224")
    opt_shapes: tuple[str, ...] = Field(
        default=(),
        description="shapes to optimize for; a name given again is for the next profile",
    )
    max_shapes: tuple[str, ...] = Field(default=(), description="largest shapes")
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1,),
        description="with --shapes-from: smallest, optimal and largest batch, or one for all",
    )
    gpu: tuple[str, ...] = Field(
        default=(),
        description="compute capabilities to build for, such as sm89 (tensorrt-rtx only); "
        "by default a portable engine for sm80 and newer",
    )
    optimization_level: int = Field(default=3, ge=0, le=5, description="builder effort, 0 to 5")
    workspace_mib: int | None = Field(
        default=None, ge=1, description="device memory a layer may use; by default all"
    )
    timing_cache: str | None = Field(
        default=None, description="file of measured kernel times, read and added to (tensorrt only)"
    )
    version_compatible: bool = Field(
        default=False, description="runs on later versions too, at some cost (tensorrt only)"
    )
    hardware_compatibility: Compatibility = Field(
        default="none", description="further GPUs that the engine runs on, at some cost"
    )
    weight_streaming: bool = Field(
        default=False, description="weights may stay in host memory, for models larger than the GPU"
    )
    strip_weights: bool = Field(default=False, description="leave out weights that a refit gives")
    refit: bool = Field(default=False, description="weights can be replaced later")
    tf32: bool = Field(default=True, description="FP32 layers may compute in TF32")
    sparsity: bool = Field(default=False, description="use kernels for weights that are 2:4 sparse")
    tiling: Tiling = Field(default="none", description="search effort for tiling across layers")
    plugins: tuple[str, ...] = Field(
        default=(), description="plugin libraries (.so): native code that is loaded and run"
    )
    precision: Precision | None = Field(
        default=None,
        description="what the work must be in, or exit code 7; by default what the file is in",
    )
    min_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the multiply-accumulates that must be in that precision",
    )
