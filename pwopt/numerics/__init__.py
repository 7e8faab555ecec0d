"""Numerical algebra in plain NumPy; nothing in here knows ONNX."""
