"""ONNX Runtime as a Python backend of Triton; for a model whose first axis is the batch."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        path = folder / config["default_model_filename"]
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests):
        arrays = [
            [pb.get_input_tensor_by_name(r, n).as_numpy() for n in self.inputs] for r in requests
        ]
        feed = {n: np.concatenate([a[i] for a in arrays]) for i, n in enumerate(self.inputs)}
        outputs, start, responses = self.session.run(self.outputs, feed), 0, []
        for one in arrays:
            end = start + len(one[0])
            parts = zip(self.outputs, outputs, strict=True)
            tensors = [pb.Tensor(n, y[start:end]) for n, y in parts]
            responses.append(pb.InferenceResponse(tensors))
            start = end
        return responses
