"""From a trained PyTorch or ONNX model to a measured, verified INT8 engine bundle."""
