"""Write the names that real TensorRT bindings have: `python make.py 11.4.0.106`.

The bindings are ordinary wheels; TensorRT's own libraries, which need the vendor's index, are stood
in for by a stub of nine functions that do nothing. It is enough to import the bindings and list
their classes; no object of TensorRT can be made, and nothing here says how it behaves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

STUB = """
void* createInferBuilder_INTERNAL(void*a,int v){return 0;}
void* createInferRefitter_INTERNAL(void*a,void*b,int v){return 0;}
void* createInferRuntime_INTERNAL(void*a,int v){return 0;}
void* createNvOnnxParserRefitter_INTERNAL(void*a,void*b,int v){return 0;}
void* createNvOnnxParser_INTERNAL(void*a,void*b,int v){return 0;}
void* getBuilderPluginRegistry(int c){return 0;}
int getNvOnnxParserVersion(void){return 0;}
void* getPluginRegistry(void){return 0;}
int initLibNvInferPlugins(void*a,const char*b){return 1;}
"""
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
LIST = """
import json, tensorrt as trt
def names(kind):
    members = getattr(kind, "__members__", None)
    return sorted(members) if members else sorted(n for n in dir(kind) if not n.startswith("__"))
public = {n: getattr(trt, n) for n in dir(trt) if not n.startswith("_")}
print(json.dumps({
    "version": trt.__version__,
    "names": sorted(public),
    "classes": {n: names(v) for n, v in public.items() if isinstance(v, type)},
}, indent=0))
"""


def main(version: str) -> None:
    """Install the bindings in a temporary folder, import them over the stub, write the names."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "stub.c").write_text(STUB)
        for library in LIBRARIES:
            soname = f"{library}.so.{version.split('.', maxsplit=1)[0]}"
            subprocess.run(
                ["gcc", "-shared", "-fPIC", "-o", folder / soname, f"-Wl,-soname,{soname}",
                 folder / "stub.c"], check=True,
            )  # fmt: skip
        wanted = [f"tensorrt-cu13-bindings=={version}", f"tensorrt-cu13=={version}"]
        for package in wanted:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
            subprocess.run([*pip, package], check=True)
        paths = {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
        listed = subprocess.run(
            [sys.executable, "-c", LIST],
            env={**os.environ, **paths}, capture_output=True, text=True, check=True,
        )  # fmt: skip
    surface = json.loads(listed.stdout)
    out = Path(__file__).with_name(f"{version}.json")
    out.write_text(json.dumps(surface, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
