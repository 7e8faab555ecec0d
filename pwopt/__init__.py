"""pwopt: graph-rewriting optimizer for ONNX CNNs; verified, measured, never slower."""
