"""Each bad input: its exit code, two lines, and nothing at the final path."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deploykit.values import Artifact
from tests.cli.conftest import Command
from tests.conftest import FACTORY, FASHION, TEACHER

SHAPE = ("--input-shape", "images:1x1x28x28")
CALIBRATION = FASHION / "calibration.npz"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


def test_a_factory_file_that_is_not_there(deploykit: Command, out: Path) -> None:
    told = deploykit("export", "nowhere.py:net", *SHAPE, "-o", out / "m.onnx")
    assert told.code == 3
    assert "nowhere.py" in told.lines[0]
    assert not list(out.iterdir())


def test_a_precision_that_the_target_does_not_have(
    deploykit: Command, teacher_onnx: Artifact, out: Path
) -> None:
    given = ("--calibration-data", CALIBRATION, "--precision", "fp8", "-o", out / "m.onnx")
    told = deploykit("quantize", teacher_onnx.path, *given)
    assert told.code == 2
    assert told.lines == [
        "error: ort-cpu has no FP8 kernels: it would compute in float, with rounding in between",
        "  fix: take --target tensorrt, or --precision int8",
    ]
    assert not list(out.iterdir())


def test_a_factory_that_is_not_in_its_file(deploykit: Command, out: Path) -> None:
    told = deploykit("export", FACTORY.replace(":resnet", ":resnt"), *SHAPE, "-o", out / "m.onnx")
    assert told.code == 3
    assert "did you mean 'resnet'?" in told.lines[1]
    assert not list(out.iterdir())


def test_a_factory_that_raises(deploykit: Command, out: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def net():\n    raise RuntimeError('no weights here')\n")
    told = deploykit("export", f"{tmp_path / 'bad.py'}:net", *SHAPE, "-o", out / "m.onnx")
    assert told.code == 3
    assert "RuntimeError: no weights here" in told.lines[0]


def test_a_file_that_fails_to_import(deploykit: Command, out: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import no_such_library\n")
    told = deploykit("export", f"{tmp_path / 'bad.py'}:net", *SHAPE, "-o", out / "m.onnx")
    assert told.code == 3
    assert "no_such_library" in told.lines[0]


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_checkpoint_of_another_model(
    deploykit: Command, out: Path, tmp_path: Path, change: str
) -> None:
    state = load_file(TEACHER)
    if change == "missing":
        del state["classifier.bias"]
    elif change == "unknown":
        state["head.extra"] = torch.zeros(3)
    else:
        state["classifier.weight"] = torch.zeros(10, 65)
    save_file(state, tmp_path / "w.safetensors")
    told = deploykit(
        "prune", FACTORY, "--weights", tmp_path / "w.safetensors", *SHAPE, "-o", out / "p"
    )
    assert told.code == 3
    named = {"missing": "classifier.bias", "unknown": "head.extra", "shape": "classifier.weight"}
    assert named[change] in told.lines[0]
    assert not list(out.iterdir())


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_is_refused_and_never_run(
    deploykit: Command, out: Path, tmp_path: Path, writer: str
) -> None:
    path, marker = tmp_path / "w.pt", tmp_path / "it-ran"
    if writer == "torch":
        torch.save({"w": _Payload(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(_Payload(marker)))
    told = deploykit("export", FACTORY, "--weights", path, *SHAPE, "-o", out / "m.onnx")
    assert told.code == 3
    assert "pickles are never run" in told.lines[1]
    assert not marker.exists()
    assert not list(out.iterdir())


def test_a_state_dict_without_pickle_payload_is_fine(
    deploykit: Command, out: Path, tmp_path: Path
) -> None:
    torch.save(load_file(TEACHER), tmp_path / "w.pt")
    told = deploykit("inspect", FACTORY, "--weights", tmp_path / "w.pt", *SHAPE)
    assert told.code == 0
    assert "images: float32[batch, 1, 28, 28]" in told.out


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"pixels": np.zeros((4, 1, 28, 28), np.float32)}, "'images'"),
        ({"images": np.zeros((4, 1, 28, 30), np.float32)}, "28, 30)"),
        ({"images": np.zeros((4, 1, 28, 28), np.int64)}, "int64"),
        ({"images": np.zeros((0, 1, 28, 28), np.float32)}, "empty"),
        ({"images": np.full((4, 1, 28, 28), np.inf, np.float32)}, "infinite"),
        ({"images": np.array([{}, {}], object)}, "not a readable .npz"),
    ],
    ids=["name", "shape", "dtype", "empty", "not finite", "objects"],
)
def test_bad_calibration_data(
    deploykit: Command,
    out: Path,
    tmp_path: Path,
    teacher_onnx: Artifact,
    arrays: dict[str, np.ndarray],
    named: str,
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    told = deploykit(
        "quantize", teacher_onnx.path, "--calibration-data", tmp_path / "data.npz",
        "-o", out / "q.onnx",
    )  # fmt: skip
    assert told.code == 3
    assert named in told.lines[0]
    assert not list(out.iterdir())


def test_random_calibration_is_refused(
    deploykit: Command, out: Path, teacher_onnx: Artifact
) -> None:
    told = deploykit(
        "quantize", teacher_onnx.path, "--calibration-data", "random", "-o", out / "q.onnx"
    )
    assert told.code == 3
    assert "random" in told.lines[0]


def test_a_dynamic_axis_without_a_shape(deploykit: Command, out: Path) -> None:
    told = deploykit(
        "export", FACTORY, *SHAPE, "--dynamic-axis", "pictures:2=height", "-o", out / "m.onnx"
    )
    assert told.code == 2
    assert "not there" in told.lines[0]
    assert "--input-shape pictures:" in told.lines[1]


def test_a_factory_without_inputs(deploykit: Command, out: Path) -> None:
    told = deploykit("export", FACTORY, "-o", out / "m.onnx")
    assert told.code == 2
    assert "--input-shape" in told.lines[1]


def test_inputs_that_the_model_does_not_run_on(deploykit: Command, out: Path) -> None:
    told = deploykit("export", FACTORY, "--input-shape", "images:1x3x28x28", "-o", out / "m.onnx")
    assert told.code == 3
    assert "does not run on images: float32[batch, 3, 28, 28]" in told.lines[0]


def test_an_unknown_backend(deploykit: Command, teacher_onnx: Artifact) -> None:
    told = deploykit("bench", teacher_onnx.path, "--backend", "ortcpu", "--data", CALIBRATION)
    assert told.code == 2
    assert told.lines[1] == "  fix: did you mean 'ort-cpu'?"


def test_an_unknown_command_and_an_unknown_option(deploykit: Command) -> None:
    assert deploykit("quantise").lines[1] == "  fix: did you mean 'quantize'?"
    told = deploykit("quantize", "m.onnx", "--calibration-dta", "x")
    assert told.code == 2
    assert "calibration-data" in told.lines[0]


def test_an_unknown_metric(deploykit: Command, teacher_onnx: Artifact) -> None:
    told = deploykit("evaluate", teacher_onnx.path, "--data", CALIBRATION, "--metric", "top-1")
    assert told.code == 2
    assert told.lines[1] == "  fix: did you mean 'top1'?"


@pytest.mark.parametrize("force", [False, True])
def test_output_that_exists_is_kept_unless_forced(
    deploykit: Command, tmp_path: Path, teacher: Artifact, force: bool
) -> None:
    path = tmp_path / "pruned"
    path.write_text("somebody's notes")
    more = ["--force"] if force else []
    told = deploykit("prune", teacher.path, "--ratio", "0.3", "-o", path, *more)
    if force:
        assert told.code == 0
        assert (path / "weights.safetensors").is_file()
    else:
        assert told.code == 2
        assert "exists already" in told.lines[0]
        assert path.read_text() == "somebody's notes"
    assert {p.name for p in tmp_path.iterdir()} == {"pruned"}


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.1", "half"])
def test_a_ratio_out_of_range(deploykit: Command, out: Path, teacher: Artifact, ratio: str) -> None:
    told = deploykit("prune", teacher.path, "--ratio", ratio, "-o", out / "p")
    assert told.code == 2
    assert "ratio" in told.lines[0]
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.onnx", b""),
        ("noise.onnx", bytes(range(256)) * 40),
        ("renamed.onnx", b"PK\x03\x04 a zip"),
        ("pointer.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ],
)
def test_files_that_are_no_onnx(
    deploykit: Command, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    told = deploykit("inspect", tmp_path / name)
    assert told.code == 3
    assert name in told.lines[0]


def test_a_truncated_onnx(deploykit: Command, tmp_path: Path, teacher_onnx: Artifact) -> None:
    path = tmp_path / "half.onnx"
    path.write_bytes(teacher_onnx.path.read_bytes()[:200_000])
    told = deploykit("inspect", path)
    assert told.code == 3


def test_a_model_changed_behind_its_record(
    deploykit: Command, tmp_path: Path, teacher: Artifact
) -> None:
    told = deploykit("prune", teacher.path, "--ratio", "0.3", "-o", tmp_path / "p")
    assert told.code == 0
    weights = tmp_path / "p" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    told = deploykit("inspect", tmp_path / "p")
    assert told.code == 5
    assert "not the file that its record describes" in told.lines[0]


def test_a_read_only_folder(deploykit: Command, tmp_path: Path, teacher: Artifact) -> None:
    told = deploykit("prune", teacher.path, "--ratio", "0.3", "-o", "/proc/pruned")
    assert told.code == 2
    assert "/proc" in told.lines[0]


def test_a_bug_is_told_as_one(
    deploykit: Command, monkeypatch: pytest.MonkeyPatch, teacher: Artifact
) -> None:
    from deploykit.cli import tell

    def broken(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(tell, "_text", broken)
    told = deploykit("inspect", teacher.path)
    assert told.code == 1
    assert "ZeroDivisionError: planted" in told.lines[0]
    with pytest.raises(ZeroDivisionError):
        deploykit("--traceback", "inspect", teacher.path)


@pytest.mark.parametrize("stage", ["prune", "export", "quantize", "package"])
def test_a_full_disk(stage: str, tmp_path: Path, teacher: Artifact, teacher_onnx: Artifact) -> None:
    """Files may not grow beyond 20 kB: the write fails in the middle, inside a library."""
    out = tmp_path / "result"
    words = {
        "prune": ("prune", teacher.path, "--ratio", "0.3"),
        "export": ("export", teacher.path),
        "quantize": ("quantize", teacher_onnx.path, "--calibration-data", CALIBRATION,
                     "--calibration-samples", "8"),
        "package": ("package", teacher_onnx.path, "--data", CALIBRATION),
    }[stage]  # fmt: skip
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({20_000}, {20_000}))"
    code = f"{limit}\nfrom deploykit.__main__ import main\nmain()"
    command = [sys.executable, "-c", code, *map(str, words), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 6, done.stderr
    assert "no space left to write it" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_name_that_the_file_system_cannot_hold(
    deploykit: Command, tmp_path: Path, teacher_onnx: Artifact
) -> None:
    out = tmp_path / ("m" * 245 + ".onnx")
    told = deploykit("quantize", teacher_onnx.path, "--calibration-data", CALIBRATION, "-o", out)
    assert told.code == 2
    assert "File name too long" in told.lines[0]
    assert not list(tmp_path.iterdir())


def test_a_required_option_left_out(deploykit: Command, tmp_path: Path, teacher: Artifact) -> None:
    told = deploykit("prune", teacher.path, "-o", tmp_path / "m")
    assert told.code == 2
    assert "give either a ratio or a speedup" in told.lines[0]


def test_a_metric_that_prints_leaves_stdout_to_the_document(
    deploykit: Command, tmp_path: Path, teacher_onnx: Artifact
) -> None:
    (tmp_path / "m.py").write_text("def one(*_):\n    print('here')\n    return 1\n")
    told = deploykit(
        "evaluate", teacher_onnx.path, "--data", CALIBRATION, "--metric", f"{tmp_path}/m.py:one",
        "--json",
    )  # fmt: skip
    assert json.loads(told.out)["score"] == {"value": 1.0, "low": None, "high": None}
    assert "here" in told.err


def test_a_metric_that_is_not_there_is_told_before_the_work(
    deploykit: Command, tmp_path: Path, teacher_onnx: Artifact
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'name = "r"\n[model]\npath = "{teacher_onnx.path}"\n[gates]\nmetric = "no.py:metric"\n'
        f'[data]\ncalibration = "{CALIBRATION}"\nevaluation = "{FASHION / "evaluation.npz"}"\n'
    )
    told = deploykit("run", recipe, "-o", tmp_path / "out")
    assert told.code == 3
    assert "no such file" in told.lines[0]
    assert not (tmp_path / "out").exists()


def test_scoring_on_the_calibration_data_is_refused(
    deploykit: Command, tmp_path: Path, teacher_onnx: Artifact
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'name = "r"\n[model]\npath = "{teacher_onnx.path}"\n'
        f'[data]\ncalibration = "{CALIBRATION}"\nevaluation = "{CALIBRATION}"\n'
    )
    told = deploykit("run", recipe, "-o", tmp_path / "out")
    assert told.code == 3
    assert "512 of 512 evaluation samples are in the calibration data" in told.lines[0]
    assert not (tmp_path / "out").exists()


def test_no_is_an_answer_and_no_error(deploykit: Command, teacher: Artifact, out: Path) -> None:
    told = deploykit("export", teacher.path, "--tolerance", "1e-12", "-o", out / "m.onnx")
    assert told.code == 7
    assert told.err.splitlines()[0].startswith("   no: output 'logits' differs from PyTorch")


def test_a_factory_is_no_reference(deploykit: Command, teacher_onnx: Artifact) -> None:
    told = deploykit("compare", FACTORY, teacher_onnx.path, "--data", CALIBRATION)
    assert told.code == 2
    assert "needs its trained weights" in told.lines[0]


@pytest.mark.parametrize("stage", ["prune", "quantize"])
def test_force_does_not_delete_somebody_s_folder(
    deploykit: Command, tmp_path: Path, teacher: Artifact, teacher_onnx: Artifact, stage: str
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("four years")
    words = {
        "prune": (teacher.path, "--ratio", "0.3"),
        "quantize": (teacher_onnx.path, "--calibration-data", CALIBRATION),
    }[stage]
    told = deploykit(stage, *words, "-o", tmp_path / "home", "--force")
    assert told.code == 2
    assert "did not write" in told.lines[0]
    assert (tmp_path / "home" / "thesis.txt").read_text() == "four years"


@pytest.mark.parametrize("where", ["factory", "data", "metric"])
def test_user_code_that_exits_is_no_success(
    deploykit: Command, out: Path, tmp_path: Path, teacher_onnx: Artifact, where: str
) -> None:
    code = tmp_path / "user.py"
    code.write_text("def f(*a, **k):\n    raise SystemExit(0)\n")
    words = {
        "factory": ("export", f"{code}:f", *SHAPE, "-o", out / "m.onnx"),
        "data": ("evaluate", teacher_onnx.path, "--data", f"{code}:f", "--metric", "top1"),
        "metric": ("evaluate", teacher_onnx.path, "--data", CALIBRATION, "--metric", f"{code}:f"),
    }[where]
    told = deploykit(*words)
    assert told.code == 3
    assert "raises SystemExit" in told.lines[0]


def test_data_that_differs_at_each_call(
    deploykit: Command, tmp_path: Path, teacher_onnx: Artifact
) -> None:
    code = tmp_path / "user.py"
    code.write_text(
        "import numpy as np\n"
        "def f():\n"
        "    yield {'images': np.random.rand(1, 28, 28).astype('float32')}\n"
    )
    told = deploykit("compare", teacher_onnx.path, teacher_onnx.path, "--data", f"{code}:f")
    assert told.code == 3
    assert "other samples the second time" in told.lines[0]


@pytest.mark.parametrize("target", [np.arange(8) + 100, -np.arange(1, 9), np.ones(8, bool)])
def test_labels_that_are_no_classes(
    deploykit: Command, tmp_path: Path, teacher_onnx: Artifact, target: np.ndarray
) -> None:
    images = np.zeros((8, 1, 28, 28), np.float32)
    np.savez(tmp_path / "d.npz", images=images, target=target)
    told = deploykit(
        "evaluate", teacher_onnx.path, "--data", tmp_path / "d.npz", "--metric", "top1"
    )
    assert told.code == 3
    assert "'target'" in told.lines[0]
    assert "index of its class" in told.lines[1]


def test_constant_calibration_images(
    deploykit: Command, out: Path, tmp_path: Path, teacher_onnx: Artifact
) -> None:
    np.savez(tmp_path / "d.npz", images=np.zeros((8, 1, 28, 28), np.float32))
    told = deploykit(
        "quantize", teacher_onnx.path, "--calibration-data", tmp_path / "d.npz",
        "-o", out / "q.onnx",
    )  # fmt: skip
    assert told.code == 3
    assert "constant input" in told.lines[1]
    assert not list(out.iterdir())


def test_the_root_is_no_output(deploykit: Command, teacher: Artifact) -> None:
    assert deploykit("prune", teacher.path, "--ratio", "0.3", "-o", "/", "--force").code == 2


def test_json_is_json_for_a_metric_without_interval(
    deploykit: Command, tmp_path: Path, teacher_onnx: Artifact
) -> None:
    code = tmp_path / "user.py"
    code.write_text("def f(*a):\n    return 0.5\n")
    told = deploykit(
        "evaluate", teacher_onnx.path, "--data", CALIBRATION, "--metric", f"{code}:f", "--json"
    )

    def refuse(word: str) -> None:
        raise AssertionError(word)

    document = json.loads(told.out, parse_constant=refuse)
    assert document["score"] == {"value": 0.5, "low": None, "high": None}
